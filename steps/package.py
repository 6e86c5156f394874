from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from zenml import get_step_context, step
from zenml.client import Client

from deploy import bento
from deploy.server import verify_bento
from deploy.source import describe_versions
from gpt2core.types import BaseRef, Commit, Lineage, LineageMetrics, RunRef, Sample
from steps.adapters.base import describe_base, open_base
from steps.cache import code_of
from steps.config import EvaluateConfig, PackageConfig
from steps.metadata import describe


def missing_bentos() -> str:
    """Bentos that earlier runs built and the store no longer has. In the cache key, so that they are built again."""
    versions = Client().list_artifact_versions(artifact="bento", size=1000).items
    return " ".join(sorted(tag for version in versions if not bento.exists(tag := str(version.run_metadata["tag"]))))


@step(
    cache_policy=code_of(
        __name__, "bentos.service", "deploy.containers.proxy", folder="bentos", cache_func=missing_bentos
    )
)
def package(
    base: Path,
    adapter: Path,
    samples: list[dict[str, Any]],
    metrics: dict[str, Any],
    split: dict[str, Any],
    package: PackageConfig,
    evaluate: EvaluateConfig,
) -> tuple[Annotated[str, "bento"], Annotated[dict[str, Any], "lineage"]]:
    """Build the Bento, then serve and ask it: it must answer as the model did in `evaluate`. Its tag and lineage."""
    context = get_step_context()
    lineage = Lineage(
        run=RunRef(str(context.pipeline_run.id), context.pipeline_run.name),
        model_version=f"{context.model.name}/{context.model.version}",
        # of where the run was started; a container has no git
        commit=Commit.from_json(context.pipeline_run.config.extra["commit"]),
        versions=describe_versions(),
        data={name: about["sha256"] for name, about in split.items()},
        base=BaseRef.from_json(describe_base(base)),
        adapter=bento.describe_adapter(adapter),
        metrics=LineageMetrics.from_json(metrics),
    )
    tag = bento.build(open_base(base), adapter, lineage)
    verified = [Sample.from_json(sample) for sample in samples[: package.smoke_prompts]]
    verify_bento(tag, verified, evaluate.max_new_tokens, metrics.get("device", "cpu"))
    describe("bento", {"tag": tag, "smoke_prompts": len(verified)})
    return tag, replace(lineage, bento=tag).to_json()
