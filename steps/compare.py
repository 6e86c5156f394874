"""Paired comparison of the tuned model with its base and the champion; `promote` decides by its result."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

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
from gpt2core.types import Comparison, Sample
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


@dataclass(frozen=True)
class Champion:
    """The artifacts of the model version in the target stage, loaded from the store."""

    name: str  # name/number of the model version
    adapter: Path
    sha256: str  # of the adapter
    base: Path
    trained_on: list[Record]


class NotComparable(Exception):
    """There is no comparison with the champion; the message becomes the comparison's note."""


# Not cached: the champion changes between runs.
@step(enable_cache=False, output_materializers={"compared_samples": SampleListMaterializer})
def compare(
    samples: list[Sample], test_records: list[Record], adapter: Path, evaluate: EvaluateConfig, promote: PromoteConfig
) -> tuple[Annotated[list[Sample], "compared_samples"], Annotated[Comparison, "comparison"], Annotated[str, "same_as"]]:
    """Compare the tuned model with its base, and with the champion on test records that this was not trained on.

    `same_as` is the champion's model version if this run produced the same adapter, else "". If it did, the comparison
    of the champion's own run is returned, provided that its answers are equal.
    """
    tuned, base = [sample.tuned for sample in samples], [sample.base for sample in samples]
    comparison = Comparison(differences(tuned, base, [sample.group for sample in samples]), "", None, "")
    same_as = ""
    try:
        version = _champion_version(promote)
        comparison = replace(comparison, champion=version_name(version))
        champion = _load(version)
        if champion.sha256 == directory_sha256(adapter):
            samples, comparison = _stored_comparison(samples, comparison, version)
            same_as = version_name(version)
        else:
            samples, comparison = _with_champion(champion, samples, comparison, test_records, evaluate, promote)
    except NotComparable as reason:
        comparison = replace(comparison, note=str(reason))
    if evaluate.judge.url:
        samples, judged = judge_answers(samples, evaluate.judge)
        comparison = replace(comparison, judge=judged)
    attach_metadata("comparison", {"champion": comparison.champion, "note": comparison.note})
    return samples, comparison, same_as


def _champion_version(promote: PromoteConfig) -> ModelVersionResponse:
    if promote.champion == "ignore":
        raise NotComparable("promote.champion is ignore")
    version = in_stage(get_step_context().model.name, promote.stage)
    if version is None:
        raise NotComparable(f"no model version is in stage {promote.stage} yet")
    return version


def _load(version: ModelVersionResponse) -> Champion:
    name = version_name(version)
    with _noting(f"the files of the champion {name} cannot be read"):
        train, val, adapter, base = (
            _artifact(version, artifact) for artifact in ("train_records", "val_records", "adapter", "base")
        )
        return Champion(name, adapter, directory_sha256(adapter), base, train + val)


def _artifact(version: ModelVersionResponse, name: str) -> Any:
    artifact = version.get_artifact(name)
    if artifact is None:
        raise ValueError(f"it has no artifact {name}")
    return artifact.load()


@contextmanager
def _noting(problem: str) -> Iterator[None]:
    """Context manager: an error of a file, an artifact or the hub means that there is no comparison."""
    try:
        yield
    except (KeyError, ValueError, OSError, RuntimeError, HubError) as error:  # ZenML raises RuntimeError for a list
        raise NotComparable(f"{problem}: {error}") from None


def _stored_comparison(
    samples: list[Sample], comparison: Comparison, version: ModelVersionResponse
) -> tuple[list[Sample], Comparison]:
    """Return samples and comparison of the champion's own run if its answers are equal, else those of this run."""
    if all(version.get_artifact(name) is not None for name in ("compared_samples", "comparison")):
        with _noting(f"the champion {comparison.champion} cannot be evaluated"):
            compared, earlier = (_artifact(version, name) for name in ("compared_samples", "comparison"))
        if [sample.without_champion() for sample in compared] == samples:
            return compared, earlier
    return samples, replace(comparison, note=f"the champion {comparison.champion} has the same adapter")


def _with_champion(
    champion: Champion,
    samples: list[Sample],
    comparison: Comparison,
    test_records: list[Record],
    evaluate: EvaluateConfig,
    promote: PromoteConfig,
) -> tuple[list[Sample], Comparison]:
    """Return samples and comparison with the champion's answers to the records that it was not trained on."""
    unseen = unseen_records(test_records, champion.trained_on)
    if len(unseen) < 2:
        seen = len(test_records) - len(unseen)
        raise NotComparable(f"the champion {champion.name} was trained on {seen} of {len(test_records)} test records")
    with _noting(f"the champion {champion.name} cannot be evaluated"):
        answers = _answers(champion, [test_records[i] for i in unseen], evaluate)
    answered = dict(zip(unseen, answers.answers, strict=True))
    samples = [replace(sample, champion=answered.get(i)) for i, sample in enumerate(samples)]
    groups, tuned = [samples[i].group for i in unseen], [samples[i].tuned for i in unseen]
    note = f"compared with the champion {champion.name} on {len(unseen)} of {len(samples)} test records"
    if len(unseen) < len(samples):
        note += ", on which it was not trained"
    if any(new.reference_tokens != old.reference_tokens for new, old in zip(tuned, answers.answers, strict=True)):
        note += "; perplexity is compared per token of the tuned model's tokenizer"
    return samples, replace(
        comparison,
        tuned_vs_champion=differences(tuned, answers.answers, groups),
        note=note,
        lower_bound=non_inferiority_bound(tuned, answers.answers, groups, promote.metric, promote.alpha),
        champion_scores=answers.scores,
        champion_intervals=intervals(answers.answers, groups),
    )


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
