"""Builds the Bento, and verifies it as a running service before any other step may use it."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from zenml import get_step_context, step

from deploy import bento
from deploy.server import verify_bento
from deploy.source import describe_commit, describe_versions
from gpt2core.types import Commit, Evaluation, Lineage, LineageMetrics, RunRef, Sample, SplitSummary
from steps.adapters.base import open_base, read_base
from steps.adapters.model_card import evaluated_card
from steps.cache import code_of
from steps.config import EvaluateConfig, PackageConfig
from steps.metadata import attach_metadata


@step(cache_policy=code_of(__name__, *bento.MODULES, files=bento.BUILD_FILES, also=bento.kernels_sha256))
def package(
    base: Path,
    adapter: Path,
    samples: list[Sample],
    metrics: Evaluation,
    split: SplitSummary,
    package: PackageConfig,
    evaluate: EvaluateConfig,
) -> tuple[Annotated[str, "bento"], Annotated[Lineage, "lineage"]]:
    """Build the Bento, serve it, compare its answers with those of `evaluate`, and return its tag and lineage."""
    context = get_step_context()
    lineage = Lineage(
        run=RunRef(str(context.pipeline_run.id), context.pipeline_run.name),
        model_version=f"{context.model.name}/{context.model.version}",
        commit=_commit(context.pipeline_run.config.extra),
        versions=describe_versions(),
        data=split.digests,
        base=read_base(base),
        adapter=bento.describe_adapter(adapter),
        metrics=LineageMetrics(metrics.base, metrics.tuned, metrics.train),
    )
    card = evaluated_card(adapter, lineage, metrics, split.test, "A BentoML service of the adapter on its base.")
    tag = bento.build(open_base(base), adapter, lineage, card)
    verified = samples[: package.smoke_prompts]
    verify_bento(tag, verified, evaluate.max_new_tokens, metrics.device)
    attach_metadata("bento", {"tag": tag, "smoke_prompts": len(verified)})
    return tag, replace(lineage, bento=tag)


def _commit(extra: dict[str, object]) -> Commit:
    """Return the commit that was recorded when the run started, because a step's container has no git."""
    recorded = extra.get("commit")
    return Commit.from_json(recorded) if isinstance(recorded, dict) else describe_commit()
