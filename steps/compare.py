import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from zenml import get_step_context, step
from zenml.models import ModelVersionResponse

from gpt2core.checkpoint import directory_sha256, load_adapter, load_pretrained
from gpt2core.data import Record, same_question
from gpt2core.evaluate import Answers
from gpt2core.evaluate import evaluate as evaluate_model
from gpt2core.lora import merge_lora
from gpt2core.model import best_device
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import Answer, Comparison, Sample
from steps.adapters.base import open_base, read_base
from steps.adapters.hub import HubError
from steps.adapters.judge import judge_answers
from steps.adapters.progress import counting_progress
from steps.adapters.rouge import rouge_l
from steps.adapters.statistics import differences, intervals, worst_difference
from steps.config import EvaluateConfig, PromoteConfig
from steps.materializers import SampleListMaterializer
from steps.metadata import attach_metadata
from steps.promote import in_stage, version_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Champion:
    """The artifacts of the model version in the target stage, loaded from the store."""

    adapter: Path
    base: Path
    trained_on: list[Record]


# Not cached: the champion changes between runs.
@step(enable_cache=False, output_materializers={"compared_samples": SampleListMaterializer})
def compare(
    samples: list[Sample], test_records: list[Record], adapter: Path, evaluate: EvaluateConfig, promote: PromoteConfig
) -> tuple[Annotated[list[Sample], "compared_samples"], Annotated[Comparison, "comparison"], Annotated[str, "repeats"]]:
    """Compare the tuned model with its base, and with the champion on test records that it was not trained on.

    `repeats` is "" unless this run's adapter is the champion's; then it is the champion's model version, and the
    comparison is that of the run that was promoted.
    """
    tuned, base = _answers_of(samples, "tuned", "base")
    against_base = differences(tuned, base, [sample.group for sample in samples])
    comparison, repeats = Comparison(against_base, "", None, ""), ""
    ignored = promote.champion == "ignore"
    version = None if ignored else in_stage(get_step_context().model.name, promote.stage)
    if ignored:
        comparison = replace(comparison, note="promote.champion is ignore")
    elif version is None:
        comparison = replace(comparison, note=f"no model version is in stage {promote.stage} yet")
    else:
        samples, comparison, repeats = _with_champion(
            samples, comparison, version, test_records, adapter, evaluate, promote
        )
    if evaluate.judge.url:
        samples, judged = judge_answers(samples, evaluate.judge)
        comparison = replace(comparison, judge=judged)
    attach_metadata("comparison", {"champion": comparison.champion, "note": comparison.note})
    return samples, comparison, repeats


def _with_champion(
    samples: list[Sample],
    comparison: Comparison,
    version: ModelVersionResponse,
    test_records: list[Record],
    adapter: Path,
    evaluate: EvaluateConfig,
    promote: PromoteConfig,
) -> tuple[list[Sample], Comparison, str]:
    comparison = replace(comparison, champion=version_name(version))
    name = f"the champion {comparison.champion}"
    try:
        champion = _load(version)
    except (KeyError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: ZenML's, for a list
        return samples, replace(comparison, note=f"the files of {name} cannot be read: {error}"), ""
    try:
        if directory_sha256(champion.adapter) == directory_sha256(adapter):
            return *_earlier(samples, comparison, version), comparison.champion
        unseen = unseen_records(test_records, champion.trained_on)
        if len(unseen) < 2:
            seen = len(test_records) - len(unseen)
            note = f"{name} was trained on {seen} of {len(test_records)} test records"
            return samples, replace(comparison, note=note), ""
        answers = _answers(champion, [test_records[i] for i in unseen], evaluate)
    except (ValueError, OSError, RuntimeError, HubError) as error:
        return samples, replace(comparison, note=f"{name} cannot be evaluated: {error}"), ""
    for i, answer in zip(unseen, answers.answers, strict=True):
        samples[i] = samples[i].with_champion(answer)
    common = [samples[i] for i in unseen]
    groups = [sample.group for sample in common]
    tuned, rival = _answers_of(common, "tuned", "champion")
    comparison = replace(
        comparison,
        tuned_vs_champion=differences(tuned, rival, groups),
        note=f"compared with {name} on {len(unseen)} of {len(samples)} test records"
        + (", those that it was not trained on" if len(unseen) < len(samples) else "")
        + ("" if _same_tokens(tuned, rival) else "; perplexity is compared per token of the tuned model's tokenizer"),
        worst=worst_difference(tuned, rival, groups, promote.metric, promote.alpha),
        champion_scores=answers.scores,
        champion_intervals=intervals(rival, groups),
    )
    return samples, comparison, ""


def _earlier(
    samples: list[Sample], comparison: Comparison, version: ModelVersionResponse
) -> tuple[list[Sample], Comparison]:
    """The comparison of the champion's own run, if its answers are equal."""
    stored = [found for name in ("compared_samples", "comparison") if (found := version.get_artifact(name)) is not None]
    if len(stored) == 2:
        compared, earlier = (artifact.load() for artifact in stored)
        if [sample.without_champion() for sample in compared] == samples:
            return compared, earlier
    return samples, replace(comparison, note=f"the champion {comparison.champion} has the same adapter")


def _answers_of(samples: Sequence[Sample], *models: str) -> list[list[Answer]]:
    return [[sample.answer(model) for sample in samples] for model in models]


def _same_tokens(tuned: Sequence[Answer], rival: Sequence[Answer]) -> bool:
    return all(new.reference_tokens == old.reference_tokens for new, old in zip(tuned, rival, strict=True))


def _load(version: ModelVersionResponse) -> Champion:
    """
    Raises:
        KeyError: an artifact was deleted.
    """
    loaded = {}
    for artifact in ("train_records", "val_records", "adapter", "base"):
        found = version.get_artifact(artifact)
        if found is None:
            raise KeyError(f"it has no artifact {artifact}")
        loaded[artifact] = found.load()
    return Champion(loaded["adapter"], loaded["base"], loaded["train_records"] + loaded["val_records"])


def unseen_records(test_records: Sequence[Record], trained_on: Sequence[Record]) -> list[int]:
    """Indices of the test records whose question and group are not in the champion's training or validation data."""
    questions = {same_question(record) for record in trained_on}
    groups = {record["group"] for record in trained_on if record.get("group")}
    return [
        i
        for i, record in enumerate(test_records)
        if same_question(record) not in questions and record.get("group", "") not in groups
    ]


def _answers(champion: Champion, records: Sequence[Record], evaluate: EvaluateConfig) -> Answers:
    base = open_base(champion.base)
    tokenizer, model = load_tokenizer(base), load_pretrained(base, device=best_device())
    merge_lora(load_adapter(model, champion.adapter, read_base(champion.base).sha256))
    with counting_progress("evaluate champion", len(records)) as show:
        return evaluate_model(model, tokenizer, records, evaluate.max_new_tokens, evaluate.batch_size, rouge_l, show)
