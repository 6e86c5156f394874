"""The two sides of a row, each in its own long-lived process, called alternately.

OpenMP keeps a worker pool for each thread that has computed anything. With more workers in a process than cores, every
worker sleeps between operations (decision 10): in a shared process the engine would slow down the peer.
"""

from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from time import perf_counter, sleep
from traceback import format_exc
from types import MappingProxyType, TracebackType
from typing import Any, Self

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.engine import Engine, Weights
from gpt2core.inference.request import Request
from gpt2core.model import best_device


class Side:
    """Proxy of `make(*arguments)` in another process; `side.method(...)` is called there."""

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
            raise RuntimeError(f"one side of the benchmark failed:\n{value}")
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
    except EOFError:  # the parent closed the pipe
        getattr(side, "close", lambda: None)()
    except Exception:
        pipe.send((False, format_exc()))


class Ours:
    """This project's engine, loaded as the service loads it."""

    def __init__(
        self, base: Path, weights: Weights = "auto", max_batch: int = 16, adapters: Sequence[Path] = ()
    ) -> None:
        """The adapters are loaded under the names "0", "1", …"""
        self.engine = Engine(load_pretrained(base, device=best_device(), mapped=True), max_batch, weights)
        for i, directory in enumerate(adapters):
            self.engine.load_adapter(str(i), directory)
        self.engine.start()

    def close(self) -> None:
        self.engine.close()

    def weights(self) -> str:
        return self.engine.weights

    def rate(
        self,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        n_adapters: int = 0,
        sampling: Mapping[str, Any] = MappingProxyType({}),
    ) -> float:
        """Throughput in new tokens/s of requests submitted at once, prompt processing included in the time.

        Requests use the first `n_adapters` adapters in turn; 0: none. `sampling`: fields of `GenerationConfig`.
        """
        config = GenerationConfig(n_new, **sampling)
        names = [str(i % n_adapters) if n_adapters else None for i in range(len(prompts))]
        start = perf_counter()
        requests = [self.engine.submit(p, config, adapter=a) for p, a in zip(prompts, names, strict=True)]
        n_tokens = sum(len(request.result()) for request in requests)
        return n_tokens / (perf_counter() - start)

    def decoding_rate(self, prompts: Sequence[Sequence[int]], n_new: int, n_adapters: int = 0) -> float:
        """Throughput in new tokens/s, measured from when the last request generates its first token."""
        config = GenerationConfig(max_new_tokens=n_new)
        names = [str(i % n_adapters) if n_adapters else None for i in range(len(prompts))]
        requests = [self.engine.submit(p, config, adapter=a) for p, a in zip(prompts, names, strict=True)]
        for request in requests:
            request.result()
        start = max(request.token_times[0] for request in requests)
        times = [t for request in requests for t in request.token_times if t > start]
        return len(times) / (max(times) - start)

    def invariance(self, prompts: Sequence[Sequence[int]], n_new: int, n_adapters: int) -> float:
        """Percentage of requests with bit-identical tokens and log probabilities alone and in a batch."""
        config = GenerationConfig(max_new_tokens=n_new)

        def submit(i: int) -> Request:
            return self.engine.submit(prompts[i], config, adapter=str(i % n_adapters), logprobs=0)

        def result(request: Request) -> list[tuple[int, float]]:
            return list(zip(request.result(), [one.logprob for one in request.logprobs], strict=True))

        together = [result(request) for request in [submit(i) for i in range(len(prompts))]]
        alone = [result(submit(i)) for i in range(len(prompts))]
        return 100 * sum(one == other for one, other in zip(alone, together, strict=True)) / len(prompts)

    def first_tokens(
        self, prompts: Sequence[Sequence[int]], n_new: int, interval: float = 0.0, n_adapters: int = 0
    ) -> list[float]:
        """Measure time to first token in ms. Requests arrive at random, on average `interval` seconds apart."""
        random, config = Random(0), GenerationConfig(max_new_tokens=n_new)
        requests = []
        for prompt in prompts:
            requests.append(self.engine.submit(prompt, config, adapter="0" if n_adapters else None))
            sleep(random.expovariate(1 / interval) if interval else 0.0)
        for request in requests:
            request.result()
        return [1e3 * (r.first_token_at - r.submitted_at) for r in requests if r.first_token_at is not None]

    def load(self, directory: Path, prompt: Sequence[int]) -> tuple[float, float]:
        """Measure the milliseconds until an adapter is loaded, and until it has generated its first token."""
        start = perf_counter()
        self.engine.load_adapter("new", directory)
        loaded = perf_counter()
        self.engine.submit(prompt, GenerationConfig(max_new_tokens=1), adapter="new").result()
        return 1e3 * (loaded - start), 1e3 * (perf_counter() - start)
