"""Posts the outcome of a run to a webhook, if GPT2_INSTRUCT_WEBHOOK is set."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse
from zenml.utils.dashboard_utils import get_run_url

from pipelines.processes import Process
from steps.adapters.webhook import post

VARIABLE = "GPT2_INSTRUCT_WEBHOOK"  # not a key of the configuration: webhook URLs are secrets

logger = logging.getLogger(__name__)


@contextmanager
def notifying_webhook(pipeline: str) -> Iterator[None]:
    """Context manager: post the outcome of the run in the block. Errors of the webhook are logged as warnings."""
    url = os.environ.get(VARIABLE, "")
    if not url:
        yield
        return
    try:
        yield
    except BaseException as error:
        _post(url, pipeline, "failed", str(error) or type(error).__name__)
        raise
    _post(url, pipeline, "completed", "")


def _post(url: str, pipeline: str, status: str, reason: str) -> None:
    try:
        post(url, _message(pipeline, status, reason))
    # any exception: ZenML's store may have failed; without its text, which contains the URL
    except Exception as error:
        logger.warning("the webhook in %s was not notified that the run %s: %s", VARIABLE, status, type(error).__name__)


def _message(pipeline: str, status: str, reason: str) -> dict[str, Any]:
    """Build the message. Slack, Mattermost and others show `text`; the other keys are for programs."""
    run = _run_of_this_process(pipeline)
    failed = [] if run is None else [name for name, step in run.steps.items() if step.status == ExecutionStatus.FAILED]
    content = {
        "pipeline": pipeline,
        "run": run and run.name,
        "status": status,
        "step": failed[0] if failed else None,
        "reason": reason or None,
        "link": run and get_run_url(run),
    }
    text = f"{run.name if run else pipeline}: {status}"
    text += f" in step {failed[0]}" if failed else ""
    text += f": {reason}" if reason else ""
    return {"text": text} | content


def _run_of_this_process(pipeline: str) -> PipelineRunResponse | None:
    """Return the run that this process started; None if ZenML has not recorded it."""
    ours = Process.current().to_json()
    runs = Client().list_pipeline_runs(pipeline=pipeline, sort_by="desc:created", size=10, hydrate=True).items
    return next((run for run in runs if run.config.extra.get("process") == ours), None)
