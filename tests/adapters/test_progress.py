import logging

from steps.adapters import progress


def test_without_a_terminal_a_line_with_steps_and_losses_is_logged_every_few_seconds(caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    seen = []
    with (
        caplog.at_level(logging.INFO),
        progress.training_progress("pretrain", 20, lambda step, values: seen.append(step)) as log,
    ):
        log(10, {"train/loss": 2.0, "train/learning_rate": 0.1})
        log(20, {"val/loss": 1.5})
    assert [record.message for record in caplog.records] == [
        "pretrain: 10 of 20, train loss 2.000",
        "pretrain: 20 of 20, train loss 2.000, val loss 1.500",
    ]
    assert seen == [10, 20]


def test_lines_are_not_logged_more_often(caplog):
    with caplog.at_level(logging.INFO), progress.counting_progress("answers", 3) as show:
        for done in range(3):
            show(done)
    assert caplog.records == []
