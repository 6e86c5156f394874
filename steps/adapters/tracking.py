"""Experiment tracking by wandb. A failure of wandb is logged as a warning and training continues."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2core.train import Log
from steps.config import TrackingConfig

logger = logging.getLogger(__name__)
INIT_TIMEOUT = 20  # seconds; a missing network delays a run by at most this


@contextmanager
def track(
    tracking: TrackingConfig, run_name: str, run_id: str, values: Mapping[str, Any], directory: Path
) -> Iterator[Log]:
    """A training callback that logs to wandb: "off" does nothing, "offline" writes files below the directory.

    Args:
        run_id: of the wandb run; a resumed training continues the run with its id.
        values: the configuration that wandb shows.
    """
    run = None if tracking.wandb == "off" else _start(tracking, run_name, run_id, dict(values), directory)

    def log(step: int, values: Mapping[str, float]) -> None:
        nonlocal run
        if run is None:
            return
        try:
            run.log(dict(values), step=step)
        except Exception as error:
            logger.warning("wandb failed, no further metrics of this run are tracked: %s", error)
            run = None

    exit_code = 1
    try:
        yield log
        exit_code = 0
    finally:
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                logger.warning("wandb could not finish the run: %s", error)


def _start(tracking: TrackingConfig, run_name: str, run_id: str, values: dict[str, Any], directory: Path) -> Any:
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
        return wandb.init(
            project=tracking.project,
            name=run_name,
            id=run_id,
            resume="allow",
            config=values,
            dir=str(directory),
            mode=tracking.wandb,  # type: ignore[arg-type]  # not "off"
            settings=settings,
        )
    except Exception as error:
        logger.warning("the run is not tracked, wandb did not start (%s): %s", tracking.wandb, error)
        return None
