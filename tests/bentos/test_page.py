"""The page at /, in a real browser, against a real service."""

import json
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest
import requests
from playwright.sync_api import Page, expect, sync_playwright

from deploy import bento
from deploy.server import serve
from deploy.verify import request_answer

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TRICKY = 'Say "it\'s" & `pwd` $HOME \\ 100%\nfür <b>mich</b>'
LINEAGE = {
    "run": {"id": "run-17", "name": "finetune-17"},
    "commit": {"sha": "c" * 40, "dirty": False},
    "data": {"train": "a" * 64},
    "base": {"name": "gpt2-nano", "revision": "", "sha256": "b" * 64},
    "adapter": {"rank": 4, "sha256": "d" * 64},
    "metrics": {"base": {"exact_match": 0.0}, "tuned": {"exact_match": 0.8125}},
}


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return bento.build(base_dir, adapter_dir, LINEAGE)


@pytest.fixture(scope="module")
def url(tag):
    with serve(tag) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; Debian's package chromium is one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@contextmanager
def opened(browser, url: str, **options):
    """The page; afterwards, nothing was said in the console and nobody else was asked."""
    said, asked = [], []
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/")
    expect(page.locator("#model")).to_contain_text("finetune-17")
    yield page
    context.close()
    # a status of 400 is an error in the browser's eyes, and one that a test may have wanted
    assert [text for text in said if "status of 400" not in text] == []
    assert [address for address in asked if not address.startswith((f"{url}/", "data:"))] == []


@pytest.fixture
def page(browser, url):
    with opened(browser, url) as page:
        yield page


def ask(page: Page, instruction: str, **fields: str) -> None:
    page.fill("#instruction", instruction)
    if any(name not in ("input",) for name in fields):
        page.locator("details", has_text="Sampling").first.evaluate("details => details.open = true")
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#ask")


def answered(page: Page, number: int = 0) -> str:
    card = page.locator("article").nth(number)
    expect(card).to_have_attribute("aria-busy", "false")
    return card.locator(".text").text_content()


def predict(url: str, **body) -> str:
    return requests.post(f"{url}/predict", json=body, timeout=60).json()["answer"]


def gauge(url: str, start: str) -> float:
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def test_the_answer_is_predicts_with_tokens_and_times_beside_it(page, url):
    ask(page, "Say hello.", input="twice", max_new_tokens="20")
    assert answered(page) == predict(url, instruction="Say hello.", input="twice", max_new_tokens=20)
    expect(page.locator(".figures")).to_contain_text("20 tokens; first after")
    expect(page.locator(".figures")).to_contain_text("tokens/s")


def test_sampling_and_stops_reach_the_service(page, url):
    ask(page, "Say hello.", temperature="1.5", top_k="50", top_p="0.9", seed="7", max_new_tokens="12")
    sampling = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 7, "max_new_tokens": 12}
    whole = predict(url, instruction="Say hello.", **sampling)
    assert answered(page) == whole
    ask(page, "Say hello.", stop=whole[4:8])
    assert answered(page) == predict(url, instruction="Say hello.", stop=[whole[4:8]], **sampling)


def test_base_and_tuned_answer_side_by_side(page, url):
    page.check("#compare")
    ask(page, "Say hello.", max_new_tokens="12")
    answers = [answered(page, 0), answered(page, 1)]
    assert answers == [
        predict(url, instruction="Say hello.", max_new_tokens=12, adapter=name) for name in ("base", "gpt2-instruct")
    ]
    assert answers[0] != answers[1]
    first, second = (page.locator("article").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"]


def test_an_answer_is_stopped_and_is_no_longer_computed(page, url):
    page.evaluate(
        """() => new MutationObserver(() => {
             if (document.querySelector("article .text")?.textContent) document.querySelector("#stop-button").click();
           }).observe(document.querySelector("#answers"), {childList: true, subtree: true})"""
    )
    cancelled = 'gpt2_requests_total{adapter="gpt2-instruct",finish_reason="cancelled"}'
    before, end = gauge(url, cancelled), time.monotonic() + 20
    while gauge(url, cancelled) == before and time.monotonic() < end:  # this model is soon done
        ask(page, "Say hello.", temperature="1", max_new_tokens="90")
        expect(page.locator("article")).to_have_attribute("aria-busy", "false")
    assert gauge(url, cancelled) > before
    expect(page.locator(".figures")).to_have_text("stopped")
    while gauge(url, "gpt2_running_requests") and time.monotonic() < end:
        time.sleep(0.05)
    assert gauge(url, "gpt2_running_requests") == 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("instruction", " ", "instruction"), ("temperature", "warm", "temperature"), ("max_new_tokens", "9999", "128")],
)
def test_what_is_wrong_is_said_in_words_and_the_field_is_marked(page, field, value, said):
    ask(page, "Say hello.", **{field: value} if field != "instruction" else {})
    if field == "instruction":
        ask(page, value)
    expect(page.get_by_role("alert")).to_contain_text(said)
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(f"#{field}")).to_be_focused()
    page.fill(f"#{field}", "Say hello." if field == "instruction" else "1")
    page.click("#ask")
    answered(page)
    expect(page.locator(f"#{field}")).not_to_have_attribute("aria-invalid", "true")


def test_it_is_used_by_the_keyboard_alone(page, url):
    expect(page.locator("#instruction")).to_be_focused()
    page.keyboard.type("Say hello.")
    page.keyboard.press("Control+Enter")
    assert answered(page) == predict(url, instruction="Say hello.")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement !== document.body"):
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert {"input", "adapter", "compare", "ask", "SUMMARY"} <= reached


def test_an_example_is_asked_by_one_click(page):
    page.get_by_role("button", name="category of an onion").click()
    assert answered(page)
    assert page.input_value("#input") == "onion"


def test_what_the_model_says_is_text(page, url):
    page.route(
        "**/predict",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body='data: {"answer": "<img src=x onerror=alert(1)>", "finish_reason": null}\n\ndata: [DONE]\n\n',
        ),
    )
    ask(page, "Say hello.")
    assert answered(page) == "<img src=x onerror=alert(1)>"
    assert page.locator("article img").count() == 0


def test_the_curl_command_asks_the_same_in_a_shell(page, url):
    page.fill("#instruction", TRICKY)
    page.locator("summary", has_text="As curl").click()
    command = page.input_value("#curl")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answers = "".join(
        json.loads(line[6:])["answer"] for line in done.stdout.split("\n\n") if line.startswith("data: {")
    )
    assert answers == predict(url, instruction=TRICKY)
    page.click("#copy")
    expect(page.locator("#copied")).not_to_be_empty()


def test_the_lineage_is_shown(page):
    page.locator("summary", has_text="Where it comes from").click()
    table = page.locator("#lineage")
    for text in ("run-17", "c" * 40, "a" * 64, "b" * 64, "d" * 64, "exact match", "0.8125"):
        expect(table).to_contain_text(text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll_and_colours_have_contrast(browser, url, scheme):
    with opened(browser, url, viewport={"width": 360, "height": 740}, color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        page.check("#compare")
        ask(page, "Say hello.", max_new_tokens="40")
        answered(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for selector in ("h1", "#model", "label", ".hint", "#ask", "article .text", ".figures", "footer a", "th"):
            ratio = page.locator(selector).first.evaluate(CONTRAST)
            assert ratio >= 4.5, (selector, ratio)


def test_a_token_is_asked_for_by_the_browser_and_goes_with_every_request(tag, browser, monkeypatch):
    monkeypatch.setenv("GPT2_API_TOKEN", "s3cret-token")
    with serve(tag) as url:
        assert requests.get(url, timeout=10).status_code == 401
        with opened(browser, url, http_credentials={"username": "me", "password": "s3cret-token"}) as page:
            ask(page, "Say hello.", max_new_tokens="8")
            assert answered(page) == request_answer(url, "Say hello.", "", 8)


# WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of an element's colour and the first background behind it
CONTRAST = """element => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element, ground;
  for (; behind; behind = behind.parentElement) {
    ground = rgb(getComputedStyle(behind).backgroundColor);
    if (ground.length === 3 || ground[3] > 0) break;
  }
  const [high, low] = [luminance(rgb(getComputedStyle(element).color)), luminance(ground)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}"""
