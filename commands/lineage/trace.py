"""`python run.py lineage NAME`: the tree of data, run, artifacts, model version, Bento and deployments for any name."""

from collections import defaultdict

from zenml.client import Client
from zenml.utils.pagination_utils import depaginate

from commands.lineage.names import resolve
from commands.lineage.runs import TracedRun
from commands.lineage.tree import data_node, draw

# Sweeps are left out: they have many adapters and no Bento.
FINETUNINGS = {"pipeline": "finetune_pipeline", "sort_by": "desc:created"}


def trace(name: str) -> str:
    """Draw the trees of all runs that the name refers to, one tree per data split.

    Args:
        name: a run's name or id, a model version, a Bento's tag, or the start of the sha256 of a data part or adapter.

    Raises:
        LineageError: no run or several runs match; lists candidates.
    """
    runs = [TracedRun(run) for run in depaginate(Client().list_pipeline_runs, **FINETUNINGS)]
    runs = [run for run in runs if run.names]
    resolved = resolve(name, runs)
    deployments = list(depaginate(Client().list_artifact_versions, artifact="deployment", hydrate=True))
    by_data: dict[tuple[str, ...], list[TracedRun]] = defaultdict(list)
    for run in runs:
        if resolved in run.names:
            by_data[run.data].append(run)
    return "\n".join(draw(data_node(group, deployments)) for group in by_data.values())
