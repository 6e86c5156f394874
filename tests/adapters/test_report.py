import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt2core.metrics import METRICS, RecordScores, Scores
from gpt2core.types import Answer, Comparison, Evaluation, FamilyScores, Sample, TrainSummary
from steps.adapters import statistics
from steps.adapters.data_check import check_data
from steps.adapters.report import word_diff, write_curves
from steps.adapters.report import write_report as write_checked_report
from steps.adapters.statistics import with_intervals

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "{{ 7 * 7 }}",
    "]]>",
]


def scores(answer: str, reference: str, nll: float) -> RecordScores:
    equal = float(answer == reference)
    return RecordScores(exact_match=equal, token_f1=equal, rouge_l=equal, nll=nll)


def sample(i: int, base: str = "", tuned: str = "yes", family: str = "plural", nll: float | None = None) -> Sample:
    nll = 0.5 + i if nll is None else nll
    return Sample(
        instruction=f"Question {i}?",
        input=f"input {i}",
        output="yes",
        base=Answer(base, False, scores(base, "yes", nll)),
        tuned=Answer(tuned, True, scores(tuned, "yes", nll), confidence=0.9),
        family=family,
    )


def with_texts(sample: Sample, base: str, tuned: str) -> Sample:
    """Return the sample with other answers of the same scores."""
    return replace(sample, base=replace(sample.base, text=base), tuned=replace(sample.tuned, text=tuned))


def evaluation(samples: Sequence[Sample]) -> Evaluation:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    base, tuned = (
        Scores(mean([s.exact_match for s in scores]), token_f1=0.25, rouge_l=0.125, perplexity=12.375, finished=1.0)
        for scores in ([s.base.scores for s in samples], [s.tuned.scores for s in samples])
    )
    members = {name: [s for s in samples if s.family == name] for name in {s.family for s in samples if s.family}}
    by_family = {
        name: FamilyScores(
            len(of), mean([s.base.scores.exact_match for s in of]), mean([s.tuned.scores.exact_match for s in of])
        )
        for name, of in sorted(members.items())
    }
    return with_intervals(samples, Evaluation(base, tuned, by_family, TrainSummary(0.5, None, 100.0, 50.0)))


def differences(samples: Sequence[Sample], other: str) -> dict:
    sides = [[getattr(sample, side) for sample in samples] for side in ("tuned", other)]
    return statistics.differences(*sides, [""] * len(samples))


TRAIN = [{"instruction": f"Name number {i}.", "input": "", "output": str(i)} for i in range(20)]


def write_report(samples, evaluation, directory, title, comparison=None, test=TRAIN[:1]):
    comparison = comparison or Comparison(
        differences(samples, "base"), "", None, "no model version is in stage staging"
    )
    return write_checked_report(samples, evaluation, comparison, check_data(TRAIN, [], test), directory, title)


class Page(HTMLParser):
    """The cells of each table by the heading above it, and every URL that the page loads."""

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
def samples():
    return [sample(i, tuned="yes" if i % 3 else "no", family=("plural", "capital")[i % 2]) for i in range(12)]


@pytest.fixture(scope="module")
def written(samples, tmp_path_factory):
    return write_report(samples, evaluation(samples), tmp_path_factory.mktemp("report"), "run <1>")


@pytest.fixture(scope="module")
def page(written):
    return Page(written[0].read_text())


def test_the_page_has_every_metric_of_base_and_tuned_model_side_by_side(page):
    table = {cells[0]: cells[1:4] for cells in page.tables["Scores"][1:]}
    assert table.keys() == {metric.heading for metric in METRICS.values()}
    assert table["Exact match"][:2] == ["00 to 0.2425", "0.66670.3906 to 0.8619"]  # Wilson's intervals of 0 and 8 of 12
    assert table["Exact match"][2].startswith("+0.6667")
    assert table["Perplexity"][2].startswith("+0")


def test_the_page_has_exact_match_by_family(page):
    table = {cells[0]: cells[1:4] for cells in page.tables["Exact match by family"]}
    assert table["capital"] == table["plural"] == ["6", "0 %0 to 39", "67 %30 to 90"]


def test_the_page_shows_flips_and_the_worst_answers(page):
    flips = page.tables["Changed answers"]
    assert [cells[0] for cells in flips[1:]] == [f"Question {i}?" for i in (1, 2, 4, 5, 7, 8, 10, 11)]
    worst = page.tables["Wrong answers furthest from the reference"]
    assert [cells[0] for cells in worst[1:]] == [f"Question {i}?" for i in (9, 6, 3, 0)]


def test_a_worse_model_than_the_champion_and_leaked_records_are_said_first(tmp_path):
    samples = [sample(i, tuned="yes" if i < 20 else "no") for i in range(30)]
    right = Answer("yes", True, scores("yes", "yes", 0.5), 2)
    samples = [replace(each, champion=right) for each in samples]
    champion = Comparison(
        differences(samples, "base"),
        "gpt2-instruct/3",
        differences(samples, "champion"),
        "compared with the champion gpt2-instruct/3 on 30 of 30 test records",
        champion_scores=Scores(1.0, 1.0, 1.0, 1.5, 1.0),
        champion_intervals={metric: [0.5, 1.0] for metric in METRICS},
    )
    test = [TRAIN[0], {**TRAIN[1], "output": "one"}, {"instruction": "What else?", "input": "", "output": "Nothing."}]
    text = write_report(samples, evaluation(samples), tmp_path, "run", champion, test)[0].read_text()
    verdict = text[text.index('id="verdict"') : text.index('id="scores"')]
    for part in (
        "The tuned model gives more correct answers than the base, but fewer than the champion.",
        "66.7 %",
        "gpt2-instruct/3",
        "-33.3 percentage points",
    ):
        assert part in verdict
    assert "1 test records are also training records, and 1 more ask a question" in verdict
    flips = Page(text).tables["Changed answers"]
    assert [cells[0] for cells in flips[1:11]] == [f"Question {i}?" for i in range(20, 30)]


def test_a_word_diff_marks_what_is_missing_and_what_is_new():
    assert word_diff("the <red> fox", "the fox & dog") == "the<del> &lt;red&gt;</del> fox<ins> &amp; dog</ins>"


def test_the_page_has_every_answer(page, samples):
    assert [cells[:5] for cells in page.tables["All answers"][1:]] == [
        [each.instruction, each.input, each.output, each.base.text, each.tuned.text] for each in samples
    ]


def test_the_page_contains_evidentlys_report(page):
    [frame] = [attributes for tag, attributes in page.tags if tag == "iframe"]
    assert "additionalGraphs" in frame["srcdoc"]
    assert len(frame["srcdoc"]) > 1_000_000


def test_no_page_loads_anything_from_elsewhere(page, tmp_path):
    [frame] = [attributes for tag, attributes in page.tags if tag == "iframe"]
    for loaded in (page.loaded, Page(frame["srcdoc"]).loaded, Page(write_curves([], tmp_path, "x").read_text()).loaded):
        assert [url for url in loaded if not url.startswith(("#", "data:"))] == []


def test_hostile_text_stays_text(tmp_path):
    hostile = [
        replace(with_texts(sample(i, family=text), base=text, tuned=text), instruction=text, input=text, output=text)
        for i, text in enumerate(HOSTILE)
    ]
    harmless = [sample(i, family=f"family {i}") for i in range(len(HOSTILE))]
    before = Page(write_report(harmless, evaluation(harmless), tmp_path, "run")[0].read_text())
    html, data = write_report(hostile, evaluation(hostile), tmp_path, HOSTILE[0])
    page = Page(html.read_text())
    assert [cells[:5] for cells in page.tables["All answers"][1:]] == [[text] * 5 for text in HOSTILE]
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in before.tags}
    assert page.loaded == before.loaded
    assert json.loads(data.read_text())["metrics"]["by_family"].keys() == set(HOSTILE)
    curves = write_curves([{"step": 1, "train/loss": 1.0}], tmp_path, HOSTILE[0])
    assert "<script>alert" not in curves.read_text()


def test_the_json_has_the_metrics_and_evidentlys_figures(written, samples):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(written[1].read_text(), parse_constant=refuse)
    assert data["metrics"] == evaluation(samples).to_json()
    assert data["data"]["same_record"] == 1
    values = {metric["metric_name"]: metric["value"] for metric in data["evidently"]["metrics"]}
    assert values["RowCount()"] == 12


@pytest.mark.parametrize(
    "samples",
    [
        [sample(0, tuned="", family="")],
        [sample(i, tuned="no", family="") for i in range(3)],
        [
            sample(0, nll=float("inf")),
            with_texts(sample(1, nll=float("nan")), base="", tuned="word " * 20_000 + "é 東 🙂\u0000"),
        ],
    ],
    ids=["one sample with an empty answer", "all wrong, no families", "no finite loss, long and unusual text"],
)
def test_a_report_of_unusual_samples_is_written(samples, tmp_path):
    html, data = write_report(samples, evaluation(samples), tmp_path, "run")
    assert len(Page(html.read_text()).tables["All answers"]) == len(samples) + 1
    assert json.loads(data.read_text())["metrics"]


def test_the_curves_have_a_line_for_each_value_over_the_steps_that_logged_it(tmp_path):
    history = [
        {"step": 5, "train/loss": 1.25, "train/learning_rate": 0.001, "train/grad_norm": 3.5},
        {"step": 10, "train/loss": 0.75, "val/loss": 0.875, "system/cpu_utilization": 0.5, "system/memory_mib": 300.0},
    ]
    text = write_curves(history, tmp_path, "run").read_text()
    data = text[text.index("[", text.rindex("Plotly.newPlot(")) :]
    traces, _ = json.JSONDecoder().raw_decode(data)
    found = {trace["name"]: (trace.get("x", []), trace.get("y", [])) for trace in traces}
    assert found["training loss"] == ([5, 10], [1.25, 0.75])
    assert found["validation loss"] == found["best validation loss"] == ([10], [0.875])
    assert found["CPU utilization"] == ([10], [0.5])
    assert found["memory of the process"] == ([10], [300.0])
    assert not {"GPU utilization", "GPU memory"} & found.keys()
    legend = {trace["name"] for trace in traces if trace.get("showlegend", True)}
    lines = {"training loss", "validation loss", "best validation loss"}
    assert legend == lines | {"CPU utilization", "memory of the process"}


@pytest.mark.parametrize("history", [[], [{"step": 1}]])
def test_curves_without_points_are_written(history, tmp_path):
    assert write_curves(history, tmp_path, "run").stat().st_size > 0


def in_browser(html: Path, tmp_path: Path, text: str) -> str:
    """Open the page in Chromium, which must log nothing, and return the value of this JavaScript expression."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    page = Path(tmp_path / "page.html")
    check = f"<script>addEventListener('load', () => document.body.append(`[found ${{{text}}}]`))</script></body>"
    page.write_text(html.read_text().replace("</body>", check))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    blocked = ["--host-resolver-rules=MAP * 0.0.0.0", "--virtual-time-budget=10000", f"--user-data-dir={tmp_path}/user"]
    window = "--window-size=600,900"
    done = subprocess.run([*command, *blocked, window, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    return done.stdout.rpartition("[found ")[2].partition("]")[0]


@pytest.mark.slow
def test_a_browser_shows_the_page_without_errors_and_filters_its_rows(written, tmp_path):
    text = "(search.value = 'question 1', filter(), shown.textContent)"
    assert in_browser(written[0], tmp_path, text) == "3 of 12"  # questions 1, 10 and 11


@pytest.mark.slow
def test_a_browser_shows_text_from_right_to_left_where_it_begins_so(tmp_path):
    samples = [replace(sample(0), instruction="עיר?"), sample(1)]
    html, _ = write_report(samples, evaluation(samples), tmp_path, "run")
    text = """[...document.querySelectorAll('#all td:first-child')].map((cell) => {
        const range = new Range(), text = cell.firstChild;
        const [first, last] = [0, text.length - 1].map((at) => {
            range.setStart(text, at);
            range.setEnd(text, at + 1);
            return range.getBoundingClientRect().x;
        });
        return last < first ? 'leftward' : 'rightward';
    })"""
    assert in_browser(html, tmp_path, text) == "leftward,rightward"


@pytest.mark.slow
def test_a_long_name_of_a_family_does_not_make_the_page_scroll_sideways(tmp_path):
    samples = [sample(i, family="a long name of a family " * 8) for i in range(3)]
    html, _ = write_report(samples, evaluation(samples), tmp_path, "run")
    assert in_browser(html, tmp_path, "document.documentElement.scrollWidth <= innerWidth") == "true"
