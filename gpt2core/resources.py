"""CPU, GPU and memory utilization during training, measured without synchronizing with the GPU."""

import os
import platform
import resource
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Self

import torch

SAMPLE_EVERY = 0.2  # seconds
_STATM = Path("/proc/self/statm")


class ResourceMeter:
    """Measures this process, and its GPU if it has one, between two calls of `read`. Use it as a context manager.

    A thread samples memory and GPU utilization between reads. A sample takes microseconds on a CPU, and up to a
    millisecond with a GPU, whose driver is queried.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="resource-meter", daemon=True)
        self._peaks: dict[str, float] = {}
        self._shares: list[float] = []  # of time that the GPU was busy
        self._wall, self._cpu = perf_counter(), process_time()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def read(self) -> dict[str, float]:
        """The values since the previous call.

        system/cpu_utilization: share in [0, 1] of all CPUs that this process used.
        system/memory_mib: its largest resident memory, in MiB.
        system/gpu_utilization, system/gpu_memory_mib: mean share of time that a kernel ran on the GPU, and the largest
            memory that torch had allocated there; absent without a GPU, and the first one without its driver's library.
        """
        self._sample_memory()
        wall, cpu = perf_counter(), process_time()
        share = (cpu - self._cpu) / max(wall - self._wall, 1e-9) / (os.cpu_count() or 1)
        self._wall, self._cpu = wall, cpu
        with self._lock:
            values = {"system/cpu_utilization": min(share, 1.0), **self._peaks}
            if self._shares:
                values["system/gpu_utilization"] = sum(self._shares) / len(self._shares)
            self._peaks, self._shares = {}, []
        return values

    def _sample_until_stopped(self) -> None:
        has_driver = self._gpu is not None
        while not self._stop.wait(SAMPLE_EVERY):
            self._sample_memory()
            if has_driver:
                try:
                    busy = torch.cuda.utilization(self._gpu) / 100
                except Exception:  # no pynvml, or an error of its own class
                    has_driver = False
                    continue
                with self._lock:
                    self._shares.append(busy)

    def _sample_memory(self) -> None:
        found = {"system/memory_mib": resident_bytes() / 2**20}
        if self._gpu is not None:
            found["system/gpu_memory_mib"] = torch.cuda.memory_allocated(self._gpu) / 2**20
        with self._lock:
            self._peaks = {name: max(value, self._peaks.get(name, 0.0)) for name, value in found.items()}


def resident_bytes() -> int:
    """Memory of this process that is not swapped out; its peak so far where the system has no /proc."""
    if _STATM.is_file():
        return int(_STATM.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mean_utilization(history: Sequence[Mapping[str, float]]) -> float | None:
    """Mean over the entries: of the GPU where they have it, else of all CPUs."""
    values = _values(history, "system/gpu_utilization", "system/cpu_utilization")
    return sum(values) / len(values) if values else None


def peak_memory_mib(history: Sequence[Mapping[str, float]]) -> float | None:
    """Of the GPU where the entries have it, else of the process."""
    return max(_values(history, "system/gpu_memory_mib", "system/memory_mib"), default=None)


def _values(history: Sequence[Mapping[str, float]], *keys: str) -> list[float]:
    """The values of the first key that an entry has."""
    found = ([entry[key] for entry in history if key in entry] for key in keys)
    return next((values for values in found if values), [])


def machine() -> str:
    """The model of the GPU or CPU, and the number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"
