"""Interleaved runs, the machine's limits, and the figures of a row."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from gpt2core.linear import linear

FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Row:
    """One measured comparison. `ours` and `peer` are medians; `peer` and `limit` may be None."""

    name: str
    unit: str
    ours: float
    peer: float | None
    runs: int
    spread: float  # spread of our values: (largest - smallest) / median
    command: str
    limit: float | None = None  # limit of the machine, or a target, in the row's unit
    less_is_better: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Return the factor by which our side is better. Takes into account whether less or more is better."""
        if not self.peer or not self.ours:
            return None
        return self.peer / self.ours if self.less_is_better else self.ours / self.peer

    def as_json(self) -> dict[str, Any]:
        share = None if self.limit is None else self.ours / self.limit
        return asdict(self) | {"ratio": self.ratio, "share_of_limit": share}


def interleave(sides: Mapping[str, Callable[[int], float]], runs: int) -> dict[str, list[float]]:
    """Run the sides alternately (A B A B); return their results. Run 0 is a warm-up. Sides get the run number."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, side in sides.items():
            value = side(run)
            if run:
                values[name].append(value)
    return values


def make_row(
    name: str,
    unit: str,
    ours: list[float],
    peer: list[float] | None,
    command: str,
    limit: float | None = None,
    less_is_better: bool = False,
    note: str = "",
) -> Row:
    middle = median(ours)
    spread = (max(ours) - min(ours)) / abs(middle) if middle else 0.0
    peers = None if peer is None else median(peer)
    return Row(name, unit, middle, peers, len(ours), spread, command, limit, less_is_better, note)


def request_count(n: int) -> str:
    return f"{n} request{'s' if n > 1 else ''}"


def best_seconds(work: Callable[[], object], times: int = 5) -> float:
    work()
    seconds = []
    for _ in range(times):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds)


def read_bandwidth(n_bytes: int = 2**30) -> float:
    """Measure the memory read bandwidth of this machine in bytes/s, with torch's threads."""
    values = torch.ones(n_bytes // 4)
    return n_bytes / best_seconds(values.sum)


@torch.inference_mode()
def matmul_rate(dtype: torch.dtype, n: int = 1024) -> float:
    """Measure the FLOP/s of a square matrix product with the fastest available kernel."""
    a = torch.randn(n, n).to(dtype)
    return 2 * n**3 / best_seconds(lambda: linear(a, a))


def machine() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    about = {key.strip(): value.strip() for key, _, value in lines}
    flags = about.get("flags", "").split()
    return {
        "processor": about.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


@contextmanager
def watch_machine(about: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Context manager: record the load before the block, and the share of cores that other processes use during it.

    The yielded function records the share until now.
    """
    about["load_before"] = round(os.getloadavg()[0], 2)
    busy, own, start = _busy_seconds(), _own_seconds(), perf_counter()

    def record_share() -> None:
        cores = (os.cpu_count() or 1) * (perf_counter() - start)
        after = _busy_seconds()
        if busy is None or after is None:
            about["others_cpu_share"] = None
        else:
            about["others_cpu_share"] = round(max(0.0, (after - busy - (_own_seconds() - own)) / cores), 3)

    yield record_share
    record_share()


def _busy_seconds() -> float | None:
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    user, nice, system = map(int, file.read_text(encoding="utf-8").split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
