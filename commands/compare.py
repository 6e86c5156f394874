"""Compares finished runs: configuration, data, scores with intervals, changed answers, curves."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zenml.client import Client

from commands.lineage.runs import TracedRun
from commands.stage_link import linked_run
from gpt2core.metrics import METRICS
from gpt2core.types import Difference, Sample
from steps.adapters.comparison import Compared, ComparedRun, write_comparison
from steps.adapters.download import without_secrets
from steps.adapters.statistics import differences, intervals, score
from steps.outputs import LINKS, outputs_dir, shared_path


class CompareError(ValueError):
    """A name that is not a finished run, or runs without common test records."""


def compare(names: Sequence[str]) -> tuple[str, Path]:
    """Compare runs; return a table for the terminal, and the path of outputs/compare.html.

    Args:
        names: two or more of: a run's name or id, latest, staging, production.

    Raises:
        CompareError: a name is unknown, or the runs have no test record in common.
    """
    traced = [_find(name) for name in names]
    answered = [{_key(sample): sample for sample in run.artifacts["samples"].load()} for run in traced]
    common = [key for key in answered[0] if all(key in samples for samples in answered)]
    if not common:
        shown = " and ".join(run.run.name for run in traced)
        raise CompareError(f"{shown} have no test record in common{_other_data(traced)}")
    runs = [_read(run, [samples[key] for key in common]) for run, samples in zip(traced, answered, strict=True)]
    by_record = [list(samples) for samples in zip(*(run.samples for run in runs), strict=True)]
    compared = Compared(
        runs=runs,
        changed_values=_changed([run.values for run in runs]),
        differences=[_differences(run, runs[0]) for run in runs[1:]],
        changed_answers=[answers for answers in by_record if len({s.tuned.scores.exact_match for s in answers}) > 1],
    )
    return _table(compared), write_comparison(compared, shared_path("compare.html"))


def _find(name: str) -> TracedRun:
    try:
        run = TracedRun(Client().get_pipeline_run(linked_run(name)))
    except KeyError:
        link = outputs_dir() / name
        if name in LINKS and not link.is_symlink():
            hint = "`make run` starts a run" if name == "latest" else "no model has been promoted to this stage yet"
            raise CompareError(f"{link} does not exist: {hint}") from None
        raise CompareError(f"there is no run {name!r}; `ls outputs` shows the names of finished runs") from None
    if "samples" not in run.artifacts:
        raise CompareError(f"the run {name} did not finish its evaluation")
    return run


def _parameters(run: TracedRun) -> dict[str, str]:
    return dict(_flat(run.run.config.parameters or {}))


def _changed(values: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return each run's value, "" if it has none, for the keys whose values differ."""
    keys = dict.fromkeys(key for each in values for key in each)
    rows = {key: [each.get(key, "") for each in values] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _other_data(runs: Sequence[TracedRun]) -> str:
    """Return the end of a message: the values that choose and split the records, if the runs' values differ."""
    rows = _changed([_parameters(run) for run in runs])
    different = [f"{key} is {' and '.join(row)}" for key, row in rows.items() if key.split(".")[0] in ("seed", "data")]
    return f": {', '.join(different)}" if different else ""


def _read(run: TracedRun, samples: list[Sample]) -> ComparedRun:
    values = _parameters(run)
    values |= {f"data, {part}": digest[:12] for part, digest in zip(("train", "val", "test"), run.data, strict=True)}
    values["commit"] = run.lineage.commit.sha[:12] if run.lineage else ""
    answers = [sample.tuned for sample in samples]
    ci95 = intervals(answers, [sample.group for sample in samples])
    scores = {metric: (score(answers, metric), ci95[metric]) for metric in METRICS}
    return ComparedRun(run.run.name, values, samples, scores, run.artifacts["history"].load())


def _differences(run: ComparedRun, first: ComparedRun) -> dict[str, Difference]:
    new, old = ([sample.tuned for sample in side.samples] for side in (run, first))
    return differences(new, old, [sample.group for sample in run.samples])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = str(value)
            yield f"{prefix}{key}", without_secrets(text) if "://" in text else text


def _key(sample: Sample) -> tuple[str, str, str]:
    return sample.instruction, sample.input, sample.output


def _table(compared: Compared) -> str:
    """Format as plain text: differences of the configurations, then scores."""
    rows = [["", *(run.name for run in compared.runs)]]
    rows += [[key, *values] for key, values in compared.changed_values.items()]
    for name, metric in METRICS.items():
        cells = []
        for run in compared.runs:
            score, ci = run.scores[name]
            cells.append(f"{score:.4g}" + (f" ({ci[0]:.4g} to {ci[1]:.4g})" if ci else ""))
        rows.append([metric.heading, *cells])
        changes = [
            f"{d[name].difference:+.4g}, p {d[name].p_value:.2g}" + (" *" if d[name].p_value < 0.05 else "")
            for d in compared.differences
        ]
        rows.append(["  difference", "", *changes])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    n = len(compared.runs[0].samples)
    changed = len(compared.changed_answers)
    return "\n".join([*lines, "", f"{n} test records in common; {changed} are correct in one run and wrong in another"])
