"""Paired comparison of the tuned model with its base and the champion; `promote` decides by its result."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from zenml import get_step_context, step
from zenml.models import ModelVersionResponse

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.data import Record, same_question
from gpt2core.evaluate import Answers
from gpt2core.evaluate import evaluate as evaluate_model
from gpt2core.files import directory_sha256
from gpt2core.lora import merge_lora
from gpt2core.model import best_device
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import Answer, Comparison, Sample
from steps.adapters.base import open_base, read_base
from steps.adapters.hub import HubError
from steps.adapters.judge import judge_answers
from steps.adapters.progress import counting_progress
from steps.adapters.rouge import rouge_l
from steps.adapters.statistics import differences, intervals, non_inferiority_bound
from steps.config import EvaluateConfig, PromoteConfig
from steps.materializers import SampleListMaterializer
from steps.metadata import attach_metadata
from steps.model_versions import in_stage, version_name

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
) -> tuple[Annotated[list[Sample], "compared_samples"], Annotated[Comparison, "comparison"], Annotated[str, "same_as"]]:
    """Compare the tuned model with its base, and with the champion on test records that this was not trained on.

    `same_as` is the champion's model version if this run produced the same adapter, else "". If it did, the comparison
    of the champion's own run is returned, provided that its answers are equal.
    """
    tuned, base = _answers_of(samples, "tuned", "base")
    against_base = differences(tuned, base, [sample.group for sample in samples])
    comparison, same_as = Comparison(against_base, "", None, ""), ""
    ignored = promote.champion == "ignore"
    version = None if ignored else in_stage(get_step_context().model.name, promote.stage)
    if ignored:
        comparison = replace(comparison, note="promote.champion is ignore")
    elif version is None:
        comparison = replace(comparison, note=f"no model version is in stage {promote.stage} yet")
    else:
        samples, comparison, same_as = _with_champion(
            samples, comparison, version, test_records, adapter, evaluate, promote
        )
    if evaluate.judge.url:
        samples, judged = judge_answers(samples, evaluate.judge)
        comparison = replace(comparison, judge=judged)
    attach_metadata("comparison", {"champion": comparison.champion, "note": comparison.note})
    return samples, comparison, same_as


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
    except (KeyError, ValueError, OSError, RuntimeError) as error:  # ZenML raises RuntimeError for a list
        return samples, replace(comparison, note=f"the files of {name} cannot be read: {error}"), ""
    try:
        if directory_sha256(champion.adapter) == directory_sha256(adapter):
            return *_stored_comparison(samples, comparison, version), comparison.champion
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
    tuned, champion_answers = _answers_of(common, "tuned", "champion")
    comparison = replace(
        comparison,
        tuned_vs_champion=differences(tuned, champion_answers, groups),
        note=f"compared with {name} on {len(unseen)} of {len(samples)} test records"
        + (", on which it was not trained" if len(unseen) < len(samples) else "")
        + (
            ""
            if _same_tokens(tuned, champion_answers)
            else "; perplexity is compared per token of the tuned model's tokenizer"
        ),
        worst=non_inferiority_bound(tuned, champion_answers, groups, promote.metric, promote.alpha),
        champion_scores=answers.scores,
        champion_intervals=intervals(champion_answers, groups),
    )
    return samples, comparison, ""


def _stored_comparison(
    samples: list[Sample], comparison: Comparison, version: ModelVersionResponse
) -> tuple[list[Sample], Comparison]:
    """Return samples and comparison of the champion's own run if its answers are equal, else those of this run."""
    stored = [found for name in ("compared_samples", "comparison") if (found := version.get_artifact(name)) is not None]
    if len(stored) == 2:
        compared, earlier = (artifact.load() for artifact in stored)
        if [sample.without_champion() for sample in compared] == samples:
            return compared, earlier
    return samples, replace(comparison, note=f"the champion {comparison.champion} has the same adapter")


def _answers_of(samples: Sequence[Sample], *models: str) -> list[list[Answer]]:
    return [[sample.answer(model) for sample in samples] for model in models]


def _same_tokens(tuned: Sequence[Answer], champion_answers: Sequence[Answer]) -> bool:
    return all(new.reference_tokens == old.reference_tokens for new, old in zip(tuned, champion_answers, strict=True))


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
    """Return the indices of the test records whose question and group are not in `trained_on`."""
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
