import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt2core.metrics import exact_match_by_family
from steps.adapters.report import write_curves, write_report

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "{{ 7 * 7 }}",
    "]]>",
]


def row(i: int, base: str = "", tuned: str = "yes", output: str = "yes", family: str = "plural", **values) -> dict:
    answers = {"base": base, "tuned": tuned}
    scores = {
        f"{side}_{name}": float(answer == output) if name != "nll" else 0.5 + i
        for side, answer in answers.items()
        for name in ("exact_match", "token_f1", "rouge_l", "nll")
    }
    about = {
        "instruction": f"Question {i}?",
        "input": f"input {i}",
        "output": output,
        "finished": True,
        "family": family,
    }
    return {**about, **answers, **scores, **values}


def metrics_of(rows: list[dict]) -> dict:
    sides = {
        side: {
            "exact_match": sum(row[f"{side}_exact_match"] for row in rows) / len(rows),
            "token_f1": 0.25,
            "rouge_l": 0.125,
            "perplexity": 12.375,
            "finished": 1.0,
        }
        for side in ("base", "tuned")
    }
    return {**sides, "by_family": exact_match_by_family(rows), "train": {"loss": 0.5, "val_loss": None}}


class Page(HTMLParser):
    """Texts of the cells of each table, by the heading above it; and every outside address that is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.heading, self.tables, self.loaded, self.tags = "", {}, [], []
        self._into = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name in ("src", "href", "action", "data") or name.startswith("on"):
                self.loaded.append(value)
        if tag in ("h1", "h2"):
            self.heading, self._into = "", "heading"
        elif tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
            self._into = "cell"

    def handle_endtag(self, tag):
        if tag in ("h1", "h2", "td", "th"):
            self._into = None

    def handle_data(self, data):
        if self._into == "heading":
            self.heading += data
        elif self._into == "cell":
            self.tables[self.heading][-1][-1] += data


@pytest.fixture(scope="module")
def rows():
    return [row(i, tuned="yes" if i % 3 else "no", family=("plural", "capital")[i % 2]) for i in range(12)]


@pytest.fixture(scope="module")
def written(rows, tmp_path_factory):
    return write_report(rows, metrics_of(rows), tmp_path_factory.mktemp("report"), "run <1>")


@pytest.fixture(scope="module")
def page(written):
    return Page(written[0].read_text())


def test_the_page_puts_the_scores_of_base_and_tuned_side_by_side(page):
    table = {cells[0]: cells[1:4] for cells in page.tables["Scores"]}
    assert table["Exact match"] == ["0", "0.6667", "+0.6667"]
    assert table["Perplexity"] == ["12.38", "12.38", "+0"]


def test_the_page_has_exact_match_by_family(page):
    table = {cells[0]: cells[1:4] for cells in page.tables["Exact match by family"]}
    assert table["capital"] == ["6", "0 %", "67 %"]
    assert table["plural"] == ["6", "0 %", "67 %"]


def test_the_page_shows_right_and_wrong_examples_worst_first(page):
    best, worst = (
        [cells[0] for cells in page.tables[heading][1:]]
        for heading in ("Right now, and the base was furthest from it", "Furthest from the reference")
    )
    assert best == [f"Question {i}?" for i in (11, 10, 8, 7, 5)]
    assert worst == [f"Question {i}?" for i in (9, 6, 3, 0)]


def test_the_page_has_every_answer(page, rows):
    assert [cells[:5] for cells in page.tables["All answers"][1:]] == [
        [row["instruction"], row["input"], row["output"], row["base"], row["tuned"]] for row in rows
    ]


def test_the_page_holds_evidentlys_report(page):
    [frame] = [attributes for tag, attributes in page.tags if tag == "iframe"]
    assert "additionalGraphs" in frame["srcdoc"]
    assert len(frame["srcdoc"]) > 1_000_000


def test_nothing_is_loaded_from_elsewhere(page, written, tmp_path):
    [frame] = [attributes for tag, attributes in page.tags if tag == "iframe"]
    for loaded in (page.loaded, Page(frame["srcdoc"]).loaded, Page(write_curves([], tmp_path, "x").read_text()).loaded):
        assert [address for address in loaded if not address.startswith(("#", "data:"))] == []


@pytest.mark.parametrize("text", HOSTILE)
def test_an_answer_stays_text_whatever_it_holds(text, tmp_path):
    keys = ("instruction", "input", "output", "base", "tuned", "family")
    rows = [row(0) | dict.fromkeys(keys, text), row(1)]
    before = Page(write_report([row(0), row(1)], metrics_of([row(0)]), tmp_path, "run")[0].read_text())
    html, data = write_report(rows, metrics_of(rows), tmp_path, text)
    page = Page(html.read_text())
    assert page.tables["All answers"][1][:5] == [text] * 5
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in before.tags}
    assert page.loaded == before.loaded
    assert json.loads(data.read_text())["metrics"]["by_family"].keys() == {text, "plural"}
    assert "<script>alert" not in write_curves([{"step": 1, "train/loss": 1.0}], tmp_path, text).read_text()


def test_the_json_has_the_metrics_and_evidentlys_figures(written, rows):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(written[1].read_text(), parse_constant=refuse)
    assert data["metrics"] == metrics_of(rows)
    values = {metric["metric_name"]: metric["value"] for metric in data["evidently"]["metrics"]}
    assert values["RowCount()"] == 12


@pytest.mark.parametrize(
    "rows",
    [
        [row(0)],
        [row(0, tuned="")],
        [row(i, tuned="no") for i in range(3)],
        [row(i, family="") for i in range(3)],
        [row(0, tuned_nll=float("inf"), base_nll=float("nan")), row(1)],
        [row(0, tuned="word " * 20_000), row(1, tuned="é 東 🙂\u0000")],
    ],
    ids=["one row", "an empty answer", "all wrong", "no families", "no finite loss", "long and odd texts"],
)
def test_a_report_of_odd_rows_is_written(rows, tmp_path):
    html, data = write_report(rows, metrics_of(rows), tmp_path, "run")
    assert len(Page(html.read_text()).tables["All answers"]) == len(rows) + 1
    assert json.loads(data.read_text())["metrics"]


def test_the_curves_have_a_line_for_each_value_over_the_steps_that_know_it(tmp_path):
    history = [
        {"step": 5, "train/loss": 1.25, "train/learning_rate": 0.001, "train/grad_norm": 3.5},
        {"step": 10, "train/loss": 0.75, "val/loss": 0.875},
    ]
    text = write_curves(history, tmp_path, "run").read_text()
    data = text[text.index("[", text.rindex("Plotly.newPlot(")) :]
    traces, _ = json.JSONDecoder().raw_decode(data)
    found = {trace["name"]: (trace.get("x", []), trace.get("y", [])) for trace in traces}
    assert found["train/loss"] == ([5, 10], [1.25, 0.75])
    assert found["val/loss"] == ([10], [0.875])


@pytest.mark.parametrize("history", [[], [{"step": 1}]])
def test_curves_without_points_are_written(history, tmp_path):
    assert write_curves(history, tmp_path, "run").stat().st_size > 0


@pytest.mark.slow
def test_a_browser_shows_the_page_without_an_error_and_filters_its_rows(written, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    page = Path(tmp_path / "page.html")
    check = (
        "<script>addEventListener('load', () => { search.value = 'question 1'; filter();"
        "document.body.append(`rows ${shown.textContent}.`) })</script></body>"
    )
    page.write_text(written[0].read_text().replace("</body>", check))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    blocked = ["--host-resolver-rules=MAP * 0.0.0.0", "--virtual-time-budget=10000", f"--user-data-dir={tmp_path}/user"]
    done = subprocess.run([*command, *blocked, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "rows 3 of 12." in done.stdout  # questions 1, 10 and 11
    assert "CONSOLE" not in done.stderr
