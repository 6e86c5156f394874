"""From any of their names to all of it: data, run, artifacts, model version, Bento, deployments. Asks ZenML's store."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from zenml.client import Client
from zenml.models import ArtifactVersionResponse, PipelineRunResponse
from zenml.utils.pagination_utils import depaginate

SPLITS = ("train", "val", "test")
SHOWN = 10  # candidates of an ambiguous name


class LineageError(ValueError):
    """A name that nothing has, or more than one thing."""


def trace(name: str) -> str:
    """The tree that a run's name or id, a model version, a Bento's tag, or (the start of) a sha256 belongs to.

    Raises:
        LineageError: with the candidates.
    """
    runs = [Traced(run) for run in depaginate(Client().list_pipeline_runs, sort_by="desc:created")]
    runs = [run for run in runs if run.names]
    wanted = _resolve(name, runs)
    deployments = list(depaginate(Client().list_artifact_versions, artifact="deployment", hydrate=True))
    found = [run for run in runs if wanted in run.names]
    data: dict[tuple[str, ...], list[Traced]] = {}
    for run in found:
        data.setdefault(run.data, []).append(run)
    return "\n".join(_draw(_data_node(group, deployments)) for group in data.values())


class Traced:
    """A run, with what its artifacts say of themselves. A step that was cached has the artifacts of an earlier run."""

    def __init__(self, run: PipelineRunResponse) -> None:
        self.run = run
        outputs = [step.outputs.items() for step in run.steps.values()]
        self.artifacts = {name: versions[0] for step in outputs for name, versions in step if versions}

    def known(self, artifact: str, key: str) -> Any:
        """Metadata of an artifact; "" where the run did not come so far."""
        return self.artifacts[artifact].run_metadata.get(key, "") if artifact in self.artifacts else ""

    @cached_property
    def data(self) -> tuple[str, ...]:
        """The sha256 of each split."""
        return tuple(str(self.known(f"{split}_records", "sha256")) for split in SPLITS)

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """What its Bento answers at /metadata; empty where there is none."""
        return dict(self.artifacts["lineage"].load()) if "lineage" in self.artifacts else {}

    @cached_property
    def model_versions(self) -> list[str]:
        """By number, and by stage where it has one."""
        version = self.run.model_version
        if version is None:
            return []
        return [f"{version.model.name}/{each}" for each in (version.name, version.stage) if each]

    @cached_property
    def names(self) -> dict[str, str]:
        """All that it can be asked for by, with what each is; empty if it made nothing that is traced."""
        digests = dict(zip(self.data, SPLITS, strict=True))
        if not any(digests):
            return {}
        names = {digest: f"{split} records" for digest, split in digests.items()}
        names |= {str(self.known("adapter", "sha256")): "adapter", str(self.known("bento", "tag")): "Bento"}
        names |= dict.fromkeys(self.model_versions, "model version")
        names |= {self.run.name: "run", str(self.run.id): "run's id"}
        names.pop("", None)
        return names


def _resolve(name: str, runs: list[Traced]) -> str:
    """The one name that is meant: the whole of it, or what begins like that."""
    names = {known: kind for run in reversed(runs) for known, kind in run.names.items()}
    if name in names:
        return name
    found = sorted(known for known in names if name and known.startswith(name))
    if len(found) == 1:
        return found[0]
    if found:
        shown = "".join(f"\n  {known}  ({names[known]})" for known in found[:SHOWN])
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise LineageError(f"{name!r} begins {len(found)} names; give more of the one you mean:{shown}{more}")
    if not names:
        raise LineageError("ZenML's store holds no run of a finetuning pipeline yet; `make run` makes one")
    near = get_close_matches(name, names, n=3) or list(runs[0].names)
    shown = "".join(f"\n  {known}  ({names[known]})" for known in near)
    raise LineageError(
        f"nothing is called {name!r}: it may be a run's name or id, a model version, a Bento's tag, or the start of a "
        f"sha256 of records or adapter. There are, for instance:{shown}"
    )


@dataclass
class Node:
    text: str
    children: "list[Node]" = field(default_factory=list)


def _data_node(runs: list[Traced], deployments: list[ArtifactVersionResponse]) -> Node:
    first = runs[0]
    node = Node(f"data from {first.known('records', 'source') or 'an unknown source'}")
    for split, digest in zip(SPLITS, first.data, strict=True):
        node.children.append(Node(f"{split}: {first.known(f'{split}_records', 'records')} records, sha256 {digest}"))
    node.children += [_run_node(run, deployments) for run in runs]
    return node


def _run_node(run: Traced, deployments: list[ArtifactVersionResponse]) -> Node:
    node = Node(f"run {run.run.name} ({run.run.status.value}), id {run.run.id}")
    if "base" in run.artifacts:
        revision = f" at revision {run.known('base', 'revision')}" if run.known("base", "revision") else ""
        name = f"{run.known('base', 'name')}{revision}, sha256 {run.known('base', 'sha256')}"
        node.children.append(Node(f"prepare_base: base {name}{_cached(run, 'prepare_base')}"))
    if "adapter" in run.artifacts:
        digest = run.known("adapter", "sha256")
        node.children.append(Node(f"finetune: adapter, sha256 {digest}{_cached(run, 'finetune')}"))
    if "metrics" in run.artifacts:
        base, tuned = (run.known("metrics", side)["exact_match"] for side in ("base", "tuned"))
        scores = f"exact match {base:.3f} of the base, {tuned:.3f} of the tuned model"
        node.children.append(Node(f"evaluate: {scores}{_cached(run, 'evaluate')}"))
    bento = [_bento_node(run, deployments)] if run.lineage else []
    if run.model_versions:
        number, *stage = run.model_versions
        stages = f" ({stage[0].rpartition('/')[2]})" if stage else ""
        node.children.append(Node(f"model version {number}{stages}", bento))
    else:
        node.children += bento
    return node


def _cached(run: Traced, step: str) -> str:
    original = run.run.steps[step].original_step_run_id
    return "" if original is None else f" (cached, of run {Client().get_run_step(original).pipeline_run_id})"


def _bento_node(run: Traced, deployments: list[ArtifactVersionResponse]) -> Node:
    lineage = run.lineage
    commit = lineage["commit"]["sha"] + (" and uncommitted changes" if lineage["commit"]["dirty"] else "")
    builder = f"built in {lineage['run']['name']} as {lineage['model_version']}"
    node = Node(f"package: Bento {lineage['bento']}, {builder}, of commit {commit}")
    for deployment in deployments:
        about = deployment.run_metadata
        if about.get("bento") == lineage["bento"] and about.get("target") not in (None, "none"):
            node.children.append(Node(_deployment(deployment, about)))
    if not node.children:
        node.children.append(Node("not deployed; it is in the Bento store"))
    return node


def _deployment(deployment: ArtifactVersionResponse, about: dict[str, Any]) -> str:
    shown = ("namespace", "image", "image_id", "url", "revision")
    where = ", ".join(f"{key} {about[key]}" for key in shown if about.get(key) not in (None, ""))
    by = f", by run {about['run']}" if "run" in about else ", by hand"
    when = f"{deployment.created:%Y-%m-%d %H:%M:%S}"
    text = f"deploy: {about['target']}, {about.get('outcome')} on {when}{by}: {where}"
    reason = about.get("reason", "") if about.get("outcome") != "deployed" else ""
    return f"{text}. {reason}".replace("\n", " ") if reason else text


def _draw(node: Node) -> str:
    return "\n".join([node.text, *_branches(node)])


def _branches(node: Node) -> Iterable[str]:
    for child in node.children:
        last = child is node.children[-1]
        yield ("└─ " if last else "├─ ") + child.text
        for line in _branches(child):
            yield ("   " if last else "│  ") + line
