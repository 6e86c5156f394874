"""The split_data step: what it says about the parts."""

from steps.config import DataConfig
from steps.split_data import split_data


def test_the_summary_counts_questions_that_are_also_in_the_train_part(monkeypatch):
    monkeypatch.setattr("steps.split_data.attach_metadata", lambda artifact, about: None)
    records = [{"instruction": f"Q{i}", "input": "", "output": "a", "part": "train"} for i in range(5)]
    records += [{"instruction": "q1 ", "input": "", "output": "b", "part": "test"}]
    records += [
        {"instruction": f"New {i}", "input": "", "output": "a", "part": part}
        for i in (1, 2)
        for part in ("val", "test")
    ]
    *_, summary = split_data.entrypoint(records, DataConfig(), 0)
    assert (summary.train.in_train, summary.val.in_train, summary.test.in_train) == (None, 0, 1)
