"""Typed artifacts: a step gets what the previous step returned, stored as JSON and cached by content."""

import errno
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
from zenml import pipeline, step
from zenml.materializers import PathMaterializer

from gpt2core.metrics import RecordScores, Scores
from gpt2core.types import Answer, Evaluation, FamilyScores, Lineage, Sample, SplitPart, SplitSummary, TrainSummary
from steps.materializers import DirectoryMaterializer, SampleListMaterializer, output_directory
from steps.promote import Promotion
from tests.helpers import make_lineage

SCORES = RecordScores(exact_match=1.0, token_f1=1.0, rouge_l=1.0, nll=math.inf)
SAMPLES = [
    Sample("Line\u2028break é?", "", "yes", Answer("no", True, SCORES), Answer("yes", True, SCORES), "plural"),
    Sample("Two?", "input", "yes", Answer("", False, SCORES), Answer("yes", False, replace(SCORES, nll=0.25), 2, 0.5)),
]
MEANS = Scores(exact_match=0.1, token_f1=0.2, rouge_l=0.3, perplexity=4.0, finished=1.0)
EVALUATION = Evaluation(MEANS, MEANS, {"plural": FamilyScores(1, 0.0, 1.0)}, TrainSummary(1.0, None, 10.0, 5.0))
SPLIT = SplitSummary(*(SplitPart(digit * 64, 3) for digit in "123"))
PROMOTION = Promotion(True, "staging", "gpt2-instruct/1", "better")


@step(output_materializers={"samples": SampleListMaterializer}, enable_cache=False)
def produce() -> tuple[
    Annotated[list[Sample], "samples"],
    Annotated[Evaluation, "metrics"],
    Annotated[SplitSummary, "split"],
    Annotated[Lineage, "lineage"],
    Annotated[Promotion, "promotion"],
]:
    return SAMPLES, EVALUATION, SPLIT, make_lineage(), PROMOTION


@step(enable_cache=True)
def consume(
    samples: list[Sample], metrics: Evaluation, split: SplitSummary, lineage: Lineage, promotion: Promotion
) -> None:
    assert (samples, metrics, split, lineage, promotion) == (SAMPLES, EVALUATION, SPLIT, make_lineage(), PROMOTION)


@pipeline
def pass_on() -> None:
    consume(*produce())


def test_typed_artifacts_reach_the_next_step_unchanged_and_are_cached_by_content():
    first, second = pass_on(), pass_on()
    assert first.steps["consume"].status.value == "completed"
    assert second.steps["produce"].status.value == "completed"
    assert second.steps["consume"].status.value == "cached"


def test_typed_artifacts_are_stored_as_json_and_load_without_the_pipeline():
    outputs = {name: versions[0] for name, versions in pass_on().steps["produce"].outputs.items()}
    assert {name: version.load() for name, version in outputs.items()} == {
        "samples": SAMPLES,
        "metrics": EVALUATION,
        "split": SPLIT,
        "lineage": make_lineage(),
        "promotion": PROMOTION,
    }
    lines = Path(outputs["samples"].uri, "samples.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [sample.to_json() for sample in SAMPLES]
    for name, value in {"metrics": EVALUATION, "split": SPLIT, "lineage": make_lineage()}.items():
        assert json.loads(Path(outputs[name].uri, "data.json").read_text()) == value.to_json()


@step(output_materializers={"directory": DirectoryMaterializer}, enable_cache=False)
def write_directory() -> Annotated[Path, "directory"]:
    with output_directory("written-") as directory:
        (directory / "file").write_text("content")
    return directory


@pipeline
def directories() -> None:
    write_directory()


def test_a_directory_is_stored_and_its_temporary_original_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    [version] = directories().steps["write_directory"].outputs["directory"]
    assert (version.load() / "file").read_text() == "content"
    assert list(tmp_path.glob("written-*")) == []


def test_a_damaged_directory_is_refused_by_the_name_of_its_artifact():
    [version] = directories().steps["write_directory"].outputs["directory"]
    [archive] = Path(version.uri).iterdir()
    content = bytearray(archive.read_bytes())
    content[4] ^= 1  # the time in gzip's header, which no check sum of its own covers
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=f"{archive} is damaged: sha256 .*, but .* was recorded.* run again"):
        version.load()


def test_the_directory_of_a_failing_step_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), output_directory("written-"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_directory_is_named_with_its_free_space(monkeypatch):
    [version] = directories().steps["write_directory"].outputs["directory"]

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PathMaterializer, "load", fail)
    with pytest.raises(OSError, match=rf"No space left on device \([\d,]+ bytes free\): '{tempfile.gettempdir()}/"):
        version.load()
