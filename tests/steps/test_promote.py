from dataclasses import replace
from types import SimpleNamespace

import pytest

from gpt2core.types import Comparison, Difference
from steps import promote as promote_module
from steps.config import PromoteConfig
from steps.promote import compared_on, decide, promote

GAIN = Difference("exact_match", 0.5, [0.4, 0.6], 1e-9, 110, "exact McNemar")
SAME = replace(GAIN, difference=0.0, ci95=[-0.03, 0.03], p_value=1.0)
ALONE = Comparison({"exact_match": GAIN}, "", None, "no model version is in stage staging yet")
UNSURE = replace(ALONE, tuned_vs_base={"exact_match": replace(GAIN, p_value=0.2)})
BESIDE = replace(ALONE, champion="gpt2-instruct/3", tuned_vs_champion={"exact_match": SAME}, lower_bound=-0.03)


@pytest.mark.parametrize(
    ("comparison", "values", "promoted", "reason"),
    [
        (ALONE, {}, True, "better than the base"),
        (ALONE, {"champion": "required"}, False, "no model version is in stage staging yet"),
        (replace(ALONE, tuned_vs_base={"exact_match": SAME}), {}, False, "not better than the base"),
        (
            UNSURE,
            {},
            False,
            "not shown to be better",
        ),
        (
            UNSURE,
            {"alpha": 0.3},
            True,
            "better than",
        ),
        (BESIDE, {}, True, "as good as the champion"),
        (BESIDE, {"margin": 0.01}, False, "not shown to be as good as the champion"),
        (replace(BESIDE, lower_bound=-0.3), {}, False, "worse by at most 0.3000, and the margin is 0.05"),
        (replace(BESIDE, lower_bound=-0.3), {"champion": "ignore"}, True, "promote.champion is ignore"),
        (replace(BESIDE, lower_bound=None, note="on 2 of 9 records"), {}, False, "too few independent test records"),
        (
            replace(BESIDE, tuned_vs_champion=None, lower_bound=None, note="it was trained on them"),
            {},
            False,
            "trained on them",
        ),
    ],
)
def test_the_gate(comparison, values, promoted, reason):
    found = decide(comparison, PromoteConfig(**values))
    assert found[0] is promoted
    assert reason in found[1]


def test_a_lower_perplexity_is_better():
    lower = replace(GAIN, metric="perplexity", difference=-3.0, ci95=[-4.0, -2.0])
    comparison = replace(ALONE, tuned_vs_base={"perplexity": lower})
    assert decide(comparison, PromoteConfig(metric="perplexity"))[0] is True
    higher = replace(lower, difference=3.0)
    assert decide(replace(ALONE, tuned_vs_base={"perplexity": higher}), PromoteConfig(metric="perplexity"))[0] is False


@pytest.fixture
def promoted(monkeypatch):
    """Run the step for version 5 while the given version is in the stage; returns its output and the new stages."""

    def run(comparison, now, **values):
        stages = []
        name = "gpt2-instruct"
        own = SimpleNamespace(name=name, version="5", set_stage=lambda stage, force: stages.append(stage))
        found = SimpleNamespace(name=now, model=SimpleNamespace(name=name)) if now else None
        monkeypatch.setattr(promote_module, "get_step_context", lambda: SimpleNamespace(model=own))
        monkeypatch.setattr(promote_module, "in_stage", lambda *_: found)
        monkeypatch.setattr(promote_module, "attach_metadata", lambda *_: None)
        monkeypatch.setattr(promote_module, "log_metadata", lambda **_: None)
        metrics = SimpleNamespace(to_json=lambda: {"base": {}, "tuned": {}})
        return promote.entrypoint(comparison, "", metrics, PromoteConfig(**values)), stages

    return run


@pytest.mark.parametrize(("comparison", "now"), [(ALONE, "4"), (BESIDE, "4"), (BESIDE, "")])
def test_a_champion_that_changed_during_the_run_is_not_replaced(promoted, comparison, now):
    found, stages = promoted(comparison, now)
    assert (found.promoted, found.stage, stages) == (False, "", [])
    assert "the champion changed during the run" in found.reason
    assert "run again" in found.reason


@pytest.mark.parametrize(
    ("comparison", "now", "values"),
    [(ALONE, "", {}), (BESIDE, "3", {}), (BESIDE, "5", {}), (ALONE, "4", {"champion": "ignore"})],
)
def test_the_champion_that_was_compared_or_ignored_is_replaced(promoted, comparison, now, values):
    found, stages = promoted(comparison, now, **values)
    assert (found.promoted, stages) == (True, ["staging"])


def test_metrics_json_has_both_comparisons():
    found = compared_on(BESIDE, "exact_match")
    assert found["tuned_vs_base"]["ci95"] == [0.4, 0.6]
    assert found["tuned_vs_champion"]["difference"] == 0.0
    assert compared_on(ALONE, "exact_match")["tuned_vs_champion"] is None
