"""The steps of the monitoring pipeline. They are not cached, because the log changes under the same name."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from zenml import get_step_context, step
from zenml.client import Client
from zenml.models import ArtifactVersionResponse, PipelineRunResponse
from zenml.types import HTMLString
from zenml.utils.pagination_utils import depaginate

from gpt2core.files import atomic_write
from gpt2core.types import NAME
from steps.adapters.drift import Drift, Signal, measure, write_drift
from steps.adapters.webhook import WebhookError, post
from steps.config import MonitorConfig
from steps.metadata import attach_metadata
from steps.outputs import check_run_name, json_text, shared_path
from steps.traffic import Traffic, ratings_of, read_traffic, summary

logger = logging.getLogger(__name__)


@step(enable_cache=False)
def detect_drift(
    monitor: MonitorConfig,
) -> tuple[Annotated[Drift, "drift"], Annotated[HTMLString, "drift_report"]]:
    """Compare the request log with the served run; also written to outputs/monitoring/<run name>/."""
    traffic = read_traffic(monitor.log)
    if traffic.problems:
        logger.warning("%d lines of the log cannot be read:\n%s", len(traffic.problems), summary(traffic.problems))
    run = _served_run(traffic, monitor)
    artifacts = _artifacts_of(run)
    digest = str(artifacts["adapter"].run_metadata["sha256"])
    completions = [completion for completion in traffic.completions if completion.adapter_sha256 == digest]
    completions = completions[-monitor.max_requests :]
    ratings = ratings_of(traffic, completions)
    signals: list[Signal] = []
    evidently = ""
    if len(completions) >= monitor.min_requests:
        train, samples = (_load(run, artifacts[name]) for name in ("train_records", "samples"))
        signals, evidently = measure(completions, ratings, train, samples, monitor)
    drift = Drift(
        drifted=any(signal.drifted for signal in signals),
        verdict=_verdict(run.name, len(completions), signals, monitor),
        run=run.name,
        adapter_sha256=digest,
        requests=len(completions),
        first=completions[0].time if completions else "",
        last=completions[-1].time if completions else "",
        signals=signals,
        finish_reasons=dict(Counter(completion.finish_reason for completion in completions).most_common()),
        ratings=dict(ratings.most_common()),
        unreadable=len(traffic.problems),
        lost=traffic.lost,
    )
    page = write_drift(drift, evidently)
    directory = report_directory(get_step_context().pipeline_run.name)
    atomic_write(directory / "drift.html", page.encode())
    atomic_write(directory / "drift.json", json_text(drift.to_json()).encode())
    attach_metadata(
        "drift", {"drifted": drift.drifted, "verdict": drift.verdict, "run": run.name, "requests": drift.requests}
    )
    return drift, HTMLString(page)


@step(enable_cache=False)
def alert(drift: Drift, monitor: MonitorConfig) -> Annotated[list[str], "alerted"]:
    """Notify the stack's alerter and the webhook of drift; return the names of those that were notified.

    Raises:
        RuntimeError: the alerter or the webhook failed. The other one is notified anyway.
    """
    if not drift.drifted:
        return []
    message = f"{drift.verdict} Report: {report_directory(get_step_context().pipeline_run.name) / 'drift.html'}"
    alerted, failed = [], []
    alerter = Client().active_stack.alerter
    if alerter is not None:
        try:
            if not alerter.post(message):
                raise RuntimeError("it did not post the message")
            alerted.append(f"alerter {alerter.name}")
        except Exception as error:  # any exception of the alerter's library
            failed.append(f"the alerter {alerter.name} failed: {error}")
    if monitor.webhook:
        try:
            post(_webhook_url(monitor.webhook), {"text": message, "drift": drift.to_json()})
            alerted.append("webhook")
        except WebhookError as error:
            failed.append(str(error))
    if failed:
        raise RuntimeError(f"{'; '.join(failed)}. {message}")
    return alerted


def report_directory(run_name: str) -> Path:
    """Return the directory of a monitoring run's drift.html and drift.json.

    Raises:
        ValueError: see `check_run_name`.
    """
    check_run_name(run_name)
    return shared_path("monitoring") / run_name


def _served_run(traffic: Traffic, monitor: MonitorConfig) -> PipelineRunResponse:
    """Find the run whose model served this traffic.

    Raises:
        ValueError: the run cannot be found.
    """
    if monitor.run:
        try:
            return Client().get_pipeline_run(monitor.run)
        except KeyError:
            raise ValueError(f"monitor.run: there is no run {monitor.run!r}") from None
    newest = traffic.completions[-monitor.max_requests :]
    served = [completion.adapter_sha256 for completion in newest if completion.model == NAME]
    if not served:
        raise ValueError(f"{monitor.log} has no completion of the tuned model; set monitor.run to compare with a run")
    digest = Counter(served).most_common(1)[0][0]
    trained = Client().list_artifact_versions(
        artifact="adapter", run_metadata=f"sha256:contains:{digest}", sort_by="desc:created", hydrate=True
    )
    runs = [artifact.producer_pipeline_run_id for artifact in trained if artifact.producer_pipeline_run_id is not None]
    if not runs:  # the run that trained it was deleted; later runs have it from the cache
        ids = {artifact.id for artifact in trained}
        newest_first = {"name": "finetune", "sort_by": "desc:created", "hydrate": True}
        steps = depaginate(Client().list_run_steps, **newest_first) if ids else []
        runs = [step.pipeline_run_id for step in steps if ids & {version.id for version in step.outputs["adapter"]}]
    if runs:
        return Client().get_pipeline_run(runs[0])
    raise ValueError(f"no run in this ZenML store has the adapter {digest} that {monitor.log} names; set monitor.run")


def _artifacts_of(run: PipelineRunResponse) -> dict[str, ArtifactVersionResponse]:
    """Return the outputs of the run's steps, by name.

    Raises:
        ValueError: the run has no adapter, training records or answers.
    """
    artifacts = {name: found[0] for each in run.steps.values() for name, found in each.outputs.items() if found}
    if not {"adapter", "train_records", "samples"} <= artifacts.keys():
        raise ValueError(f"the run {run.name} did not finish its evaluation; set monitor.run to one that did")
    return artifacts


def _load(run: PipelineRunResponse, artifact: ArtifactVersionResponse) -> Any:
    try:
        return artifact.load()
    except (KeyError, ValueError, OSError, RuntimeError) as error:  # ZenML raises RuntimeError for a list
        raise ValueError(
            f"the files of the run {run.name} cannot be read: {error}; finetune again with its configuration, which "
            "repeats the steps without files, and set monitor.run to the new run"
        ) from None


def _verdict(run: str, requests: int, signals: Sequence[Signal], monitor: MonitorConfig) -> str:
    if requests < monitor.min_requests:
        return f"Not decided: {requests} completions of {run}, and monitor.min_requests is {monitor.min_requests}."
    drifted = [f"{signal.name} ({signal.change:.3g}, limit {signal.limit:g})" for signal in signals if signal.drifted]
    if not drifted:
        return f"No drift: {requests} completions of {run} resemble its evaluation."
    return f"Drift of {run} in {requests} completions: {', '.join(drifted)}."


def _webhook_url(webhook: str) -> str:
    """
    Raises:
        WebhookError: the environment variable is not set.
    """
    if not webhook.startswith("$"):
        return webhook
    url = os.environ.get(webhook[1:], "")
    if not url:
        raise WebhookError(f"monitor.webhook is {webhook}, but that environment variable is not set")
    return url
