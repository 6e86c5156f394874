"""Typed records as JSON: the inverse of each other, and every wrong value named by its path."""

import json

import pytest

from gpt2core.metrics import RecordScores
from gpt2core.types import Answer, FamilyScores, Lineage, Sample, TrainSummary
from tests.helpers import make_lineage


def test_a_lineage_survives_json():
    lineage = make_lineage(bento="gpt2-instruct:x")
    assert Lineage.from_json(json.loads(json.dumps(lineage.to_json()))) == lineage


def test_unknown_keys_are_ignored_and_fields_with_a_default_may_be_missing():
    data = make_lineage().to_json() | {"newer": 1}
    del data["bento"]
    assert Lineage.from_json(data) == make_lineage()
    assert FamilyScores.from_json({"records": 1, "base": 0, "tuned": 1}) == FamilyScores(1, 0.0, 1.0, [], [])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("run",), 3, "Lineage.run is 3; it must be an object"),
        (("run", "name"), 3, "Lineage.run.name is 3; it must be str"),
        (("versions",), [], r"Lineage.versions is \[\]; it must be an object"),
        (("versions", "torch"), 2, "Lineage.versions.torch is 2"),
        (("adapter", "targets"), "q", "Lineage.adapter.targets is 'q'; it must be a list"),
        (("adapter", "targets"), ["q", 1], r"Lineage.adapter.targets\[1\] is 1"),
        (("adapter", "rank"), False, "Lineage.adapter.rank is False; it must be int"),
        (("commit", "dirty"), "no", "Lineage.commit.dirty is 'no'; it must be bool"),
    ],
)
def test_a_value_of_another_type_is_named_by_its_path(path, value, message):
    data = json.loads(json.dumps(make_lineage().to_json()))
    *parents, key = path
    inner = data
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    with pytest.raises(ValueError, match=message):
        Lineage.from_json(data)


def test_a_sample_of_an_early_run_is_read():
    scores = {"exact_match": 1.0, "token_f1": 1.0, "rouge_l": 1.0, "nll": 0.5}
    record = {"instruction": "Say yes.", "input": "", "output": "yes", "family": ""}
    line = record | {"base": "no", "tuned": "yes", "finished": True}
    line |= {f"{model}_{name}": value for model in ("base", "tuned") for name, value in scores.items()}
    right = RecordScores(**scores)
    answers = (Answer("no", False, right), Answer("yes", True, right))
    assert Sample.from_json(line) == Sample("Say yes.", "", "yes", *answers)


def test_a_missing_key_is_named_and_null_is_read_where_it_is_allowed():
    with pytest.raises(ValueError, match="TrainSummary has no 'tokens_seen'"):
        TrainSummary.from_json({"loss": 1, "val_loss": None})
    summary = TrainSummary.from_json({"loss": 1, "val_loss": None, "tokens_seen": 2, "tokens_per_second": 3.5})
    assert summary == TrainSummary(1.0, None, 2.0, 3.5)
