"""The files of a sweep's results, with names of variants that matplotlib and Markdown give a meaning."""

import pytest

from gpt2core.trials import Trial
from steps.adapters.sweep_report import write_sweep
from steps.config import SweepConfig

LABELS = (r"lr $\frac$", "_hidden", "a|b", "a\nb", "plain")


@pytest.fixture
def written(tmp_path):
    sweep = SweepConfig(variants={label: {} for label in LABELS}, variable="x|y", metrics=("exact_match",))
    trials = [
        Trial(label, seed, "a machine", {"exact_match": 0.5}, [[1, 2.0], [2, 1.0]] if seed or label != "plain" else [])
        for label in LABELS
        for seed in sweep.seeds
    ]
    write_sweep(trials, sweep, tmp_path)
    return tmp_path


def test_the_plot_shows_every_label_as_it_is(written):
    plot = (written / "plot.svg").read_text()
    for label in LABELS:
        shown = [f"<!-- {line} -->" for line in label.split("\n")]
        assert all(plot.count(line) == 2 for line in shown), label  # in the legend and at the axis


def test_a_label_is_one_cell_of_the_table(written):
    rows = (written / "table.md").read_text().splitlines()
    assert rows == [
        r"| x\|y | exact_match |",
        "|---|---|",
        r"| lr $\\frac$ | 0.5 ± 0 |",
        "| _hidden | 0.5 ± 0 |",
        r"| a\|b | 0.5 ± 0 |",
        "| a b | 0.5 ± 0 |",
        "| plain | 0.5 ± 0 |",
    ]


def test_large_numbers_have_all_digits_before_the_point(tmp_path):
    sweep = SweepConfig(variants={"LoRA": {}}, variable="x", metrics=("exact_match",))
    trials = [Trial("LoRA", seed, "a machine", {"exact_match": n}, []) for seed, n in enumerate((12_288.0, 13_056.4))]
    write_sweep(trials, sweep, tmp_path)
    assert "| LoRA | 12672 ± 543 |" in (tmp_path / "table.md").read_text()


def test_a_single_value_has_no_standard_deviation(tmp_path):
    sweep = SweepConfig(variants={"LoRA": {}}, variable="x", metrics=("exact_match",), seeds=(0,))
    write_sweep([Trial("LoRA", 0, "a machine", {"exact_match": 0.5}, [])], sweep, tmp_path)
    assert "| LoRA | 0.5 |" in (tmp_path / "table.md").read_text()
    assert "standard deviation" not in (tmp_path / "report.html").read_text()
