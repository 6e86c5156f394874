"""The sides of a row, each in a process of its own that is kept alive and asked in turn.

OpenMP keeps workers for each thread that has computed anything, and with more of them in a process than cores they
sleep between operations (decision 10): the engine's would slow down the peer's steps. So neither shares its process.
"""

from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from time import perf_counter, sleep
from traceback import format_exc
from types import TracebackType
from typing import Any, Self

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.engine import Engine, Weights
from gpt2core.model import best_device


class Side:
    """`make(*arguments)` in another process; `side.method(...)` is called there."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()
        self._receive()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._pipe.send((method, arguments))
            return self._receive()

        return call

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def _receive(self) -> Any:
        done, value = self._pipe.recv()
        if not done:
            raise RuntimeError(f"a side of the benchmark failed:\n{value}")
        return value


def _work(pipe: Connection, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        side = make(*arguments)
        pipe.send((True, None))
        while True:
            method, arguments = pipe.recv()
            try:
                pipe.send((True, getattr(side, method)(*arguments)))
            except Exception:
                pipe.send((False, format_exc()))
    except EOFError:  # nobody will ask any more
        getattr(side, "close", lambda: None)()
    except Exception:
        pipe.send((False, format_exc()))


class Ours:
    """The engine, loaded as the service loads it."""

    def __init__(
        self, base: Path, weights: Weights = "auto", max_batch: int = 16, adapters: Sequence[Path] = ()
    ) -> None:
        """`adapters` are called "0", "1", …"""
        self.engine = Engine(load_pretrained(base, device=best_device()), max_batch, weights)
        for i, directory in enumerate(adapters):
            self.engine.load_adapter(str(i), directory)
        self.engine.start()

    def close(self) -> None:
        self.engine.close()

    def weights(self) -> str:
        return self.engine.weights

    def rate(self, prompts: Sequence[Sequence[int]], n_new: int, n_adapters: int = 0) -> float:
        """New tokens a second of requests that are asked at once, prompts included in the time.

        `n_adapters`: the first so many take turns; 0: none is used.
        """
        config = GenerationConfig(max_new_tokens=n_new)
        names = [str(i % n_adapters) if n_adapters else None for i in range(len(prompts))]
        start = perf_counter()
        asked = [self.engine.submit(p, config, adapter=a) for p, a in zip(prompts, names, strict=True)]
        n_tokens = sum(len(request.result()) for request in asked)
        return n_tokens / (perf_counter() - start)

    def decoding_rate(self, prompts: Sequence[Sequence[int]], n_new: int, n_adapters: int = 0) -> float:
        """The same, from when all prompts are read: of the tokens that come after the last reply's first."""
        config = GenerationConfig(max_new_tokens=n_new)
        names = [str(i % n_adapters) if n_adapters else None for i in range(len(prompts))]
        asked = [self.engine.submit(p, config, adapter=a) for p, a in zip(prompts, names, strict=True)]
        for request in asked:
            request.result()
        start = max(request.token_times[0] for request in asked)
        times = [t for request in asked for t in request.token_times if t > start]
        return len(times) / (max(times) - start)

    def first_tokens(
        self, prompts: Sequence[Sequence[int]], n_new: int, interval: float = 0.0, n_adapters: int = 0
    ) -> list[float]:
        """Milliseconds from asking to the first token; asked at random times, `interval` seconds apart on average."""
        random, config = Random(0), GenerationConfig(max_new_tokens=n_new)
        asked = []
        for prompt in prompts:
            asked.append(self.engine.submit(prompt, config, adapter="0" if n_adapters else None))
            sleep(random.expovariate(1 / interval) if interval else 0.0)
        for request in asked:
            request.result()
        return [1e3 * (r.first_token_at - r.submitted_at) for r in asked if r.first_token_at is not None]

    def load(self, directory: Path, prompt: Sequence[int]) -> tuple[float, float]:
        """Milliseconds until an adapter is loaded, and until it has answered a first token."""
        start = perf_counter()
        self.engine.load_adapter("new", directory)
        loaded = perf_counter()
        self.engine.submit(prompt, GenerationConfig(max_new_tokens=1), adapter="new").result()
        return 1e3 * (loaded - start), 1e3 * (perf_counter() - start)
