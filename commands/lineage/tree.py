"""The tree from data to deployments, and its drawing as text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zenml.models import ArtifactVersionResponse

from commands.lineage.runs import TracedRun
from gpt2core.data import Split
from gpt2core.types import Lineage


@dataclass
class Node:
    text: str
    children: "list[Node]" = field(default_factory=list)


def data_node(runs: Sequence[TracedRun], deployments: Sequence[ArtifactVersionResponse]) -> Node:
    """Build the tree of runs that share their data."""
    first = runs[0]
    node = Node(f"data from {_origin(first)}")
    for part, digest in zip(Split._fields, first.data, strict=True):
        node.children.append(Node(f"{part}: {first.metadata(f'{part}_records', 'records')} records, sha256 {digest}"))
    node.children += [_run_node(run, deployments) for run in runs]
    return node


def draw(node: Node) -> str:
    return "\n".join([node.text, *_branches(node)])


def _origin(run: TracedRun) -> str:
    location, digest = run.metadata("records", "location"), run.metadata("records", "file_sha256")
    if not location:  # a run of an earlier version
        return str(run.metadata("records", "source")) or "an unknown source"
    return f"{location}, sha256 {digest}" if digest else str(location)


def _run_node(run: TracedRun, deployments: Sequence[ArtifactVersionResponse]) -> Node:
    node = Node(f"run {run.run.name} ({run.run.status.value}), id {run.run.id}")
    if "base" in run.artifacts:
        revision = f" at revision {run.metadata('base', 'revision')}" if run.metadata("base", "revision") else ""
        name = f"{run.metadata('base', 'name')}{revision}, sha256 {run.metadata('base', 'sha256')}"
        node.children.append(Node(f"prepare_base: base {name}{_cached(run, 'prepare_base')}"))
    if "adapter" in run.artifacts:
        digest = run.metadata("adapter", "sha256")
        node.children.append(Node(f"finetune: adapter, sha256 {digest}{_cached(run, 'finetune')}"))
    if "metrics" in run.artifacts:
        base, tuned = (run.metadata("metrics", model)["exact_match"] for model in ("base", "tuned"))
        scores = f"exact match {base:.3f} of the base, {tuned:.3f} of the tuned model"
        node.children.append(Node(f"evaluate: {scores}{_cached(run, 'evaluate')}"))
    bento = [_bento_node(run.lineage, deployments)] if run.lineage else []
    if run.model_versions:
        number, *stage = run.model_versions
        stages = f" ({stage[0].rpartition('/')[2]})" if stage else ""
        node.children.append(Node(f"model version {number}{stages}", bento))
    else:
        node.children += bento
    return node


def _cached(run: TracedRun, step: str) -> str:
    original = run.cached_from(step)
    return f" (cached, of run {original})" if original else ""


def _bento_node(lineage: Lineage, deployments: Sequence[ArtifactVersionResponse]) -> Node:
    commit = lineage.commit.sha + (" with uncommitted changes" if lineage.commit.dirty else "")
    builder = f"built in {lineage.run.name} as {lineage.model_version}"
    node = Node(f"package: Bento {lineage.bento}, {builder}, from commit {commit}")
    for deployment in deployments:
        about = deployment.run_metadata
        if about.get("bento") == lineage.bento and about.get("target") not in (None, "none"):
            node.children.append(Node(_deployment(deployment, about)))
    if not node.children:
        node.children.append(Node("not deployed; in the Bento store"))
    return node


def _deployment(deployment: ArtifactVersionResponse, about: Mapping[str, Any]) -> str:
    keys = ("namespace", "image", "image_id", "url", "revision")
    where = ", ".join(f"{key} {about[key]}" for key in keys if about.get(key) not in (None, ""))
    by = f", by run {about['run']}" if "run" in about else ", manually"
    when = f"{deployment.created:%Y-%m-%d %H:%M:%S}"
    text = f"deploy: {about['target']}, {about.get('outcome')} on {when}{by}: {where}"
    reason = about.get("reason", "") if about.get("outcome") != "deployed" else ""
    return f"{text}. {reason}".replace("\n", " ") if reason else text


def _branches(node: Node) -> Iterable[str]:
    for child in node.children:
        last = child is node.children[-1]
        yield ("└─ " if last else "├─ ") + child.text
        for line in _branches(child):
            yield ("   " if last else "│  ") + line
