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

SAMPLE_EVERY = 0.2  # seconds between samples
_STATM = Path("/proc/self/statm")


class ResourceMeter:
    """Measures this process, and its GPU if it has one, between two calls of `read`. Use it as a context manager.

    A thread samples memory and GPU utilization. A sample takes microseconds without a GPU. With a GPU it takes up to a
    millisecond, since the driver is queried.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="resource-meter", daemon=True)
        self._peaks: dict[str, float] = {}
        self._shares: list[float] = []  # GPU utilization of each sample, from 0 to 1
        self._wall, self._cpu = perf_counter(), process_time()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def read(self) -> dict[str, float]:
        """Return the values measured since the previous call.

        system/cpu_utilization: share in [0, 1] of the time of all CPUs that this process used.
        system/memory_mib: largest resident memory of this process, in MiB.
        system/gpu_utilization: mean share of the time during which a kernel ran on the GPU. Missing without a GPU, or
            without pynvml.
        system/gpu_memory_mib: largest memory that torch had allocated on the GPU, in MiB. Missing without a GPU.
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
                except Exception:  # pynvml is missing, or raises an error of its own class
                    has_driver = False
                    continue
                with self._lock:
                    self._shares.append(busy)

    def _sample_memory(self) -> None:
        values = {"system/memory_mib": resident_bytes() / 2**20}
        if self._gpu is not None:
            values["system/gpu_memory_mib"] = torch.cuda.memory_allocated(self._gpu) / 2**20
        with self._lock:
            self._peaks = {name: max(value, self._peaks.get(name, 0.0)) for name, value in values.items()}


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; on a system without /proc, its peak so far."""
    if _STATM.is_file():
        return int(_STATM.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mean_utilization(history: Sequence[Mapping[str, float]]) -> float | None:
    """Return the mean GPU utilization of the entries; if no entry has it, the mean CPU utilization."""
    values = _values(history, "system/gpu_utilization", "system/cpu_utilization")
    return sum(values) / len(values) if values else None


def peak_memory_mib(history: Sequence[Mapping[str, float]]) -> float | None:
    """Return the peak GPU memory of the entries in MiB; if no entry has it, the peak memory of the process."""
    return max(_values(history, "system/gpu_memory_mib", "system/memory_mib"), default=None)


def _values(history: Sequence[Mapping[str, float]], *keys: str) -> list[float]:
    """Return all values of the first key that occurs in the entries."""
    found = ([entry[key] for entry in history if key in entry] for key in keys)
    return next((values for values in found if values), [])


def machine() -> str:
    """Return the model of the GPU; without a GPU, the model of the CPU and the number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"
