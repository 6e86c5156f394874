"""Checks that outputs/staging and outputs/production link to the model that is in the stage now."""

import logging

from gpt2core.types import Lineage
from steps.model_versions import adapter_of, in_stage, version_name
from steps.outputs import outputs_dir

logger = logging.getLogger(__name__)


def linked_run(name: str) -> str:
    """Return the name of the run that outputs/latest, staging or production links to; any other name as it is."""
    link = outputs_dir() / name
    return link.resolve().name if link.is_symlink() else name


def check_stage_link(stage: str) -> None:
    """Raise ValueError if the stage contains another model than outputs/<stage>, because it was changed in ZenML.

    If the ZenML store has no model in the stage, for example because outputs/ was copied from another machine, only a
    warning is logged.

    Raises:
        FileNotFoundError, ValueError: the lineage is missing or damaged, or the stage contains another model.
    """
    link = outputs_dir() / stage
    if not link.is_dir():
        return  # the command reports the missing directory
    lineage = Lineage.from_json_file(link / "lineage.json")
    model, run = lineage.model_version.partition("/")[0], link.resolve().name
    version = in_stage(model, stage)
    if version is None:
        logger.warning("%s is the run %s, but this ZenML store has no model version in stage %s", link, run, stage)
        return
    digest = adapter_of(version)
    if digest not in ("", lineage.adapter.sha256):  # "" if the artifact was deleted
        raise ValueError(
            f"{link} is the run {run} with the adapter {lineage.adapter.sha256[:12]}, but {version_name(version)} in "
            f"stage {stage} has the adapter {digest[:12]}; repeat the run of {version_name(version)}, which corrects "
            f"the link, or use the name of a run instead of {stage}"
        )
