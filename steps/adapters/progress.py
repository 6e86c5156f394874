"""Progress of long computations: a tqdm bar on a terminal, otherwise a log line every few seconds."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

from gpt2core.train import Log

logger = logging.getLogger(__name__)
SECONDS = 5  # seconds between two log lines


@contextmanager
def training_progress(description: str, total_steps: int, log: Log | None = None) -> Iterator[Log]:
    """Context manager: yields a training callback that shows each logged step with the losses, and calls `log`."""
    losses: dict[str, str] = {}
    with _progress(description, total_steps, "step") as show:

        def show_and_log(step: int, values: Mapping[str, float]) -> None:
            losses.update({name.replace("/", " "): f"{values[name]:.3f}" for name in values if name.endswith("/loss")})
            show(step, losses)
            if log is not None:
                log(step, values)

        yield show_and_log


@contextmanager
def counting_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Context manager: yields a callback that takes the number of items done so far."""
    with _progress(description, total, "it") as show:
        yield lambda done: show(done, {})


@contextmanager
def _progress(description: str, total: int, unit: str) -> Iterator[Callable[[int, Mapping[str, str]], None]]:
    terminal = sys.stderr.isatty()
    with tqdm(total=total, desc=description, unit=unit, disable=not terminal) as bar:
        shown = time.monotonic()

        def show(done: int, values: Mapping[str, str]) -> None:
            nonlocal shown
            if terminal:
                bar.set_postfix(values, refresh=False)
                bar.update(done - bar.n)
            elif time.monotonic() - shown >= SECONDS:
                shown = time.monotonic()
                details = "".join(f", {name} {value}" for name, value in values.items())
                logger.info("%s: %d of %d%s", description, done, total, details)

        yield show
