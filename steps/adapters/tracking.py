"""Experiment tracking by wandb. A failure of wandb is logged as a warning and training continues."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from gpt2core.train import Log

logger = logging.getLogger(__name__)

Mode = Literal["off", "offline", "online"]
INIT_TIMEOUT = 20  # seconds; a missing network delays a run by at most this


@contextmanager
def track(mode: Mode, project: str, run_name: str, config: Mapping[str, Any], directory: Path) -> Iterator[Log]:
    """A training callback that logs to wandb: "off" does nothing, "offline" writes files below the directory."""
    run = None if mode == "off" else _start(mode, project, run_name, dict(config), directory)

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


def _start(
    mode: Literal["offline", "online"], project: str, run_name: str, config: dict[str, Any], directory: Path
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
        return wandb.init(
            project=project, name=run_name, config=config, dir=str(directory), mode=mode, settings=settings
        )
    except Exception as error:
        logger.warning("the run is not tracked, wandb did not start (%s): %s", mode, error)
        return None
