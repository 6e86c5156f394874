from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2core.metrics import RecordScores
from gpt2core.types import Answer, Sample
from steps import compare as compare_module
from steps.compare import Champion, compare, unseen_records
from steps.config import EvaluateConfig, PromoteConfig

WRONG, RIGHT = RecordScores(0.0, 0.0, 0.0, 2.0), RecordScores(1.0, 1.0, 1.0, 1.0)
SAMPLES = [Sample(f"Say {i}.", "", str(i), Answer("no", False, WRONG), Answer(str(i), True, RIGHT)) for i in range(4)]
RECORDS = [{"instruction": sample.instruction, "input": "", "output": sample.output} for sample in SAMPLES]


class BrokenVersion:
    """A champion without a file of its training records: ZenML's error for a list is a RuntimeError."""

    name, model = "7", SimpleNamespace(name="gpt2-instruct")

    def get_artifact(self, name):
        def load():
            raise RuntimeError(f"Metadata file not found at {name}/metadata.json")

        return SimpleNamespace(load=load)


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """The comparison with `BrokenVersion` in the stage."""
    monkeypatch.setattr(compare_module, "in_stage", lambda *_: BrokenVersion())
    monkeypatch.setattr(compare_module, "get_step_context", lambda: SimpleNamespace(model=BrokenVersion.model))
    monkeypatch.setattr(compare_module, "attach_metadata", lambda *_: None)

    def run(**promote):
        _, comparison, same_as = compare.entrypoint(
            list(SAMPLES), RECORDS, tmp_path, EvaluateConfig(), PromoteConfig(**promote)
        )
        assert same_as == ""
        return comparison

    return run


def test_a_champion_with_a_missing_file_does_not_stop_the_run(compared):
    comparison = compared()
    assert comparison.champion == "gpt2-instruct/7"
    assert "the files of the champion gpt2-instruct/7 cannot be read: Metadata file not found" in comparison.note


def test_an_ignored_champion_is_not_loaded(compared):
    comparison = compared(champion="ignore")
    assert (comparison.champion, comparison.note) == ("", "promote.champion is ignore")


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_champion_with_another_tokenizer_is_compared_on_the_same_text(compared, monkeypatch, tokens):
    same = [Answer(str(i), True, replace(RIGHT, nll=1.0 / tokens), tokens) for i in range(4)]
    champion = Champion("gpt2-instruct/7", Path("adapter"), "another", Path("base"), [])
    answers = SimpleNamespace(answers=same, scores=None)
    for name, value in (("_load", champion), ("_answers", answers)):
        monkeypatch.setattr(compare_module, name, lambda *_, value=value: value)
    monkeypatch.setattr(compare_module, "directory_sha256", str)
    comparison = compared()
    perplexity = comparison.tuned_vs_champion["perplexity"]
    assert (perplexity.difference, perplexity.p_value) == (0.0, 1.0)  # both lose 1 nat per reference
    assert ("per token of the tuned model's tokenizer" in comparison.note) is (tokens == 2)


def test_a_champion_is_compared_on_records_whose_question_and_group_it_has_not_seen():
    trained_on = [
        {"instruction": "Capital?", "input": "France", "output": "Paris", "group": "france"},
        {"instruction": "Hello.", "input": "", "output": "Hello."},
    ]
    test = [
        {"instruction": "Capital?", "input": "France", "output": "Lyon"},  # the same question
        {"instruction": "River?", "input": "Paris", "output": "Seine", "group": "france"},
        {"instruction": "Capital?", "input": "Peru", "output": "Lima", "group": "peru"},
        {"instruction": "Goodbye.", "output": "Goodbye."},
    ]
    assert unseen_records(test, trained_on) == [2, 3]
