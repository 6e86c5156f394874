"""Experiment tracking by wandb. A failure of wandb is logged as a warning and the step continues.

A training run is one wandb run. Its id is the same when training is resumed and when the results are added.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

from gpt2core.train import Log
from gpt2core.types import Evaluation, Sample
from steps.config import TrackingConfig

logger = logging.getLogger(__name__)
INIT_TIMEOUT = 20  # seconds; maximum delay of a run without a network


@contextmanager
def track(
    tracking: TrackingConfig, run_name: str, run_id: str, values: Mapping[str, Any], directory: Path
) -> Iterator[Log]:
    """Context manager: yields a training callback that logs to wandb.

    With "off" it does nothing, with "offline" it writes files below the directory. A resumed training run logs its
    whole history again (`gpt2core.train`). Online, wandb ignores steps that it already has. Offline, the files of the
    interrupted attempt are removed, because the new files contain every step.

    Args:
        run_id: id of the wandb run. A resumed training run continues the wandb run with the same id.
        values: the configuration that wandb shows.
    """
    if tracking.wandb == "offline":
        for attempt in directory.glob(f"wandb/offline-run-*-{run_id}"):
            rmtree(attempt, ignore_errors=True)
    with _run(tracking, run_name, run_id, directory, values) as run:
        failed = False

        def log(step: int, values: Mapping[str, float]) -> None:
            nonlocal failed
            if run is None or failed or step < run.step:
                return
            try:
                run.log(dict(values), step=step)
            except Exception as error:
                logger.warning("wandb failed, no further metrics of this run are tracked: %s", error)
                failed = True

        yield log


def track_results(
    tracking: TrackingConfig,
    run_name: str,
    run_id: str,
    samples: Sequence[Sample],
    evaluation: Evaluation,
    report: str,
    step: int,
    directory: Path,
) -> None:
    """Add the scores, a table of all answers and the report's URI to the wandb run of the training run.

    Args:
        report: path or URI of the report.
        step: the last training step.
    """
    with _run(tracking, run_name, run_id, directory) as run:
        if run is None:
            return
        try:
            import wandb

            columns: list[str | int] = ["instruction", "input", "output", "base", "tuned", "exact_match"]
            rows = [
                [s.instruction, s.input, s.output, s.base.text, s.tuned.text, s.tuned.scores.exact_match]
                for s in samples
            ]
            run.log({"samples": wandb.Table(columns=columns, data=rows)}, step=max(step + 1, run.step))
            scores = {"base": asdict(evaluation.base), "tuned": asdict(evaluation.tuned)}
            run.summary.update({"report": report, **scores})
        except Exception as error:
            logger.warning("wandb failed, the results are not tracked: %s", error)


@contextmanager
def _run(
    tracking: TrackingConfig, run_name: str, run_id: str, directory: Path, values: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Context manager: yields the wandb run with this id; None if wandb is off or did not start.

    The run ends as failed if the block raises an exception.
    """
    run = None if tracking.wandb == "off" else _start(tracking, run_name, run_id, directory, values)
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                logger.warning("wandb could not finish the run: %s", error)


def _start(
    tracking: TrackingConfig, run_name: str, run_id: str, directory: Path, values: Mapping[str, Any] | None
) -> Any:
    try:
        import wandb  # slow to import; only tracked runs need it

        directory.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            login_timeout=INIT_TIMEOUT,
            console="off",
            save_code=False,
            disable_git=True,
            silent=True,
        )
        wandb.setup(settings)  # before the login, which would otherwise ask for a key in a terminal and wait
        return wandb.init(
            project=tracking.project,
            name=run_name,
            group=run_name,
            id=run_id,
            resume="allow",
            config=None if values is None else dict(values),
            dir=str(directory),
            mode=tracking.wandb,  # type: ignore[arg-type]  # not "off"
            settings=settings,
        )
    except Exception as error:
        logger.warning("the run is not tracked, wandb did not start (%s): %s", tracking.wandb, error)
        return None
