"""The page at /, in a real browser, against a real service."""

import json
import re
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
from tests.bentos.client import metric
from tests.helpers import wait_until

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TRICKY = 'Say "it\'s" & `pwd` $HOME \\ 100%\nfür <b>mich</b>'


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: chromium)")
    expect.set_options(timeout=60_000)  # milliseconds; 5 s are not enough on a busy machine
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@contextmanager
def opened(browser, url: str, **options):
    """The page; afterwards checks that the console is empty and that no other host was contacted."""
    console, requested = [], []
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda message: console.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{url}/")
    expect(page.locator("#model")).to_contain_text("run-17")
    yield page
    context.close()
    # the browser logs a status of 400 as an error; some tests cause one
    assert [text for text in console if "status of 400" not in text] == []
    assert [address for address in requested if not address.startswith((f"{url}/", "data:"))] == []


@pytest.fixture
def page(browser, url):
    with opened(browser, url) as page:
        yield page


def send(page: Page, instruction: str, **fields: str) -> None:
    page.fill("#instruction", instruction)
    if any(name not in ("input",) for name in fields):
        page.locator("details", has_text="Sampling").first.evaluate("details => details.open = true")
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#ask")


def answer(page: Page, number: int = 0) -> str:
    card = page.locator("article").nth(number)
    expect(card).to_have_attribute("aria-busy", "false")
    return card.locator(".text").text_content()


def predict_answer(url: str, **body) -> str:
    return requests.post(f"{url}/predict", json=body, timeout=60).json()["answer"]


def test_the_answer_is_shown_with_token_count_and_latency(page, url):
    page.evaluate("let now = 0; performance.now = () => now += 10")  # events that arrive in one read have no rate
    send(page, "Say hello.", input="twice", max_new_tokens="20")
    assert answer(page) == predict_answer(url, instruction="Say hello.", input="twice", max_new_tokens=20)
    assert re.match(r"20 tokens; first after 10 ms, then \d+ tokens/s", page.locator(".figures").text_content())


def test_sampling_and_stop_texts_reach_the_service(page, url):
    send(page, "Say hello.", temperature="1.5", top_k="50", top_p="0.9", seed="7", max_new_tokens="12")
    sampling = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 7, "max_new_tokens": 12}
    whole = predict_answer(url, instruction="Say hello.", **sampling)
    assert answer(page) == whole
    send(page, "Say hello.", stop=whole[4:8])
    assert answer(page) == predict_answer(url, instruction="Say hello.", stop=[whole[4:8]], **sampling)


def test_base_and_tuned_answer_side_by_side(page, url):
    page.check("#compare")
    send(page, "Say hello.", max_new_tokens="12")
    answers = [answer(page, 0), answer(page, 1)]
    assert answers == [
        predict_answer(url, instruction="Say hello.", max_new_tokens=12, adapter=name)
        for name in ("base", "gpt2-instruct")
    ]
    assert answers[0] != answers[1]
    first, second = (page.locator("article").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"]


def test_stop_cancels_the_completion(page, url):
    page.evaluate(
        """() => new MutationObserver(() => {
             if (document.querySelector("article .text")?.textContent) document.querySelector("#stop-button").click();
           }).observe(document.querySelector("#answers"), {childList: true, subtree: true})"""
    )
    cancelled = 'gpt2_requests_total{adapter="gpt2-instruct",finish_reason="cancelled"}'
    before, end = metric(url, cancelled), time.monotonic() + 60
    while metric(url, cancelled) == before and time.monotonic() < end:  # a nano model may finish first
        send(page, "Say hello.", temperature="1", max_new_tokens="90")
        expect(page.locator("article")).to_have_attribute("aria-busy", "false")
    assert metric(url, cancelled) > before
    expect(page.locator(".figures")).to_have_text("stopped")
    wait_until(lambda: metric(url, "gpt2_running_requests") == 0, 20, "an idle engine")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("instruction", " ", "instruction"), ("temperature", "warm", "temperature"), ("max_new_tokens", "9999", "128")],
)
def test_an_error_is_shown_and_its_field_is_marked(page, field, value, expected):
    send(page, "Say hello.", **{field: value} if field != "instruction" else {})
    if field == "instruction":
        send(page, value)
    expect(page.get_by_role("alert")).to_contain_text(expected)
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(f"#{field}")).to_be_focused()
    page.fill(f"#{field}", "Say hello." if field == "instruction" else "1")
    page.click("#ask")
    answer(page)
    expect(page.locator(f"#{field}")).not_to_have_attribute("aria-invalid", "true")


def test_the_page_works_with_the_keyboard_alone(page, url):
    expect(page.locator("#instruction")).to_be_focused()
    page.keyboard.type("Say hello.")
    page.keyboard.press("Control+Enter")
    assert answer(page) == predict_answer(url, instruction="Say hello.")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement !== document.body"):
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert {"input", "adapter", "compare", "ask", "SUMMARY"} <= reached


def test_one_click_sends_an_example(page):
    page.get_by_role("button", name="category of an onion").click()
    assert answer(page)
    assert page.input_value("#input") == "onion"


def test_generated_text_is_never_html(page, url):
    page.route(
        "**/predict",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body='data: {"answer": "<img src=x onerror=alert(1)>", "finish_reason": null}\n\ndata: [DONE]\n\n',
        ),
    )
    send(page, "Say hello.")
    assert answer(page) == "<img src=x onerror=alert(1)>"
    assert page.locator("article img").count() == 0


def respond(page, answer: str, n_tokens: int) -> None:
    """Respond to the page's requests with this answer instead of the model's."""
    usage = {"prompt_tokens": 9, "completion_tokens": n_tokens, "total_tokens": 9 + n_tokens}
    event = json.dumps({"answer": answer, "finish_reason": "stop", "usage": usage}, ensure_ascii=False)
    body = f"data: {event}\n\ndata: [DONE]\n\n"
    page.route("**/predict", lambda route: route.fulfill(content_type="text/event-stream; charset=utf-8", body=body))


def test_an_answer_without_text_says_so(page, url):
    respond(page, "", 1)
    send(page, "Say nothing.")
    assert answer(page) == ""
    text = page.locator("article .text")
    assert text.evaluate("element => getComputedStyle(element, '::after').content") == '"(no text)"'
    assert page.locator("article .figures").text_content().startswith("1 token; ")


def test_an_answer_in_a_script_from_right_to_left_ends_at_its_left(page, url):
    respond(page, "ירושלים.", 5)
    send(page, "Name the city.")
    assert answer(page) == "ירושלים."
    first, last = page.locator("article .text").evaluate("""element => [0, element.textContent.length - 1].map((at) => {
        const range = new Range();
        range.setStart(element.firstChild, at);
        range.setEnd(element.firstChild, at + 1);
        return range.getBoundingClientRect().x;
    })""")
    assert last < first


def test_the_curl_command_sends_the_same_request(page, url):
    page.fill("#instruction", TRICKY)
    page.locator("summary", has_text="As curl").click()
    command = page.input_value("#curl")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answers = "".join(
        json.loads(line[6:])["answer"] for line in done.stdout.split("\n\n") if line.startswith("data: {")
    )
    assert answers == predict_answer(url, instruction=TRICKY)
    page.click("#copy")
    expect(page.locator("#copied")).not_to_be_empty()


def test_the_lineage_is_shown(page, bento_tag):
    lineage = bento.lineage(bento_tag)
    page.locator("summary", has_text="Lineage").click()
    table = page.locator("#lineage")
    for text in ("run-17", "c" * 40, "1" * 64, lineage.base.sha256, lineage.adapter.sha256, "exact match", "0.5"):
        expect(table).to_contain_text(text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_does_not_scroll_sideways_and_colors_have_contrast(browser, url, scheme):
    with opened(browser, url, viewport={"width": 360, "height": 740}, color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        page.check("#compare")
        send(page, "Say hello.", max_new_tokens="40")
        answer(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for selector in ("h1", "#model", "label", ".hint", "#ask", "article .text", ".figures", "footer a", "th"):
            ratio = page.locator(selector).first.evaluate(CONTRAST)
            assert ratio >= 4.5, (selector, ratio)


def test_the_browser_asks_for_the_token_and_sends_it_with_every_request(bento_tag, browser, monkeypatch):
    monkeypatch.setenv("GPT2_API_TOKEN", "s3cret-token")
    with serve(bento_tag) as url:
        assert requests.get(url, timeout=10).status_code == 401
        with opened(browser, url, http_credentials={"username": "me", "password": "s3cret-token"}) as page:
            send(page, "Say hello.", max_new_tokens="8")
            assert answer(page) == request_answer(url, "Say hello.", "", 8)


# WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of an element's color and the first background behind it
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
