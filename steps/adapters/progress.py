"""Progress bars for long work, by tqdm: shown on a terminal only."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

from gpt2core.train import Log


@contextmanager
def training_progress(description: str, total_steps: int, log: Log | None = None) -> Iterator[Log]:
    """A training callback that moves a bar to each logged step, shows the losses, and calls `log`."""
    with tqdm(total=total_steps, desc=description, unit="step", disable=None) as bar:  # None: only on a terminal
        shown: dict[str, str] = {}

        def show(step: int, values: Mapping[str, float]) -> None:
            shown.update({name.replace("/", " "): f"{values[name]:.3f}" for name in values if name.endswith("/loss")})
            bar.set_postfix(shown, refresh=False)
            bar.update(step - bar.n)
            if log is not None:
                log(step, values)

        yield show


@contextmanager
def counting_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A callback that takes the number of items done so far."""
    with tqdm(total=total, desc=description, disable=None) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show
