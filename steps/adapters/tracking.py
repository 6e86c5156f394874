"""Metrics of a run to wandb. Whatever goes wrong there is a warning, and training goes on."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from gpt2core.train import Log

logger = logging.getLogger(__name__)

Mode = Literal["off", "offline", "online"]
INIT_TIMEOUT = 20  # seconds that a missing network may cost a run


@contextmanager
def track(mode: Mode, project: str, run_name: str, config: Mapping[str, Any], directory: Path) -> Iterator[Log]:
    """A callback that logs to wandb: not at all ("off"), to files under the directory ("offline"), or "online"."""
    run = None if mode == "off" else _start(mode, project, run_name, dict(config), directory)

    def log(step: int, values: Mapping[str, float]) -> None:
        nonlocal run
        if run is None:
            return
        try:
            run.log(dict(values), step=step)
        except Exception as error:
            logger.warning("wandb takes no more metrics of this run: %s", error)
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
        import wandb  # here, since a run that is not tracked should not wait for it

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
