"""Tensors: reading safetensors files, copies to and from a device, checks of weights."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2core.files import check_exists, describe_file

WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # 8-bit types would need scales
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the names in configurations


def read_tensors(file: Path, device: str | torch.device = "cpu", mapped: bool = False) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        mapped: map the file into memory instead of reading it (only on a CPU). The tensors use only memory that the
            system can reclaim, must not be written, and change if the file changes.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    check_exists(file)
    name = _device_name(device)
    try:
        with safe_open(file, framework="pt", device=name) as tensors:
            read = ((key, tensors.get_tensor(key)) for key in tensors.keys())
            return {key: tensor if mapped else tensor.clone() for key, tensor in read}
    except SafetensorError as error:
        if description := describe_file(file):
            raise ValueError(f"{file} {description}") from None
        raise ValueError(f"{file} is damaged or truncated ({error}); download or save it again") from None


def _device_name(device: str | torch.device) -> str:
    """Return the device's name in the form that safetensors accepts: a CPU has no index."""
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known to torch ({error})") from None
    return "cpu" if known.type == "cpu" else str(known)


def as_ints(ids: Iterable[SupportsIndex]) -> list[int]:
    """Convert the ids in a sequence, an array or a tensor to a list.

    Raises:
        TypeError: an id is not an integer.
    """
    return [index(id) for id in ids]


def int_tensor(values: Sequence[int]) -> Tensor:
    """Return an int64 tensor (n). This is faster than `torch.tensor`: 0.1 ms instead of 0.6 ms for 7,000 values."""
    return torch.frombuffer(array("q", values), dtype=torch.long) if values else torch.empty(0, dtype=torch.long)


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Copy a CPU tensor to a device. The host does not wait for a copy to a GPU, which uses pinned memory."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_to_host_async(tensor: Tensor) -> Callable[[], list[Any]]:
    """Start an asynchronous copy of a tensor to the host; return a function that returns its values as a list.

    The function waits only for this copy, not for later work on the device.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    copy = tensor.to("cpu", non_blocking=True)  # in pinned memory
    event = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> list[Any]:
        event.synchronize()
        values: list[Any] = copy.tolist()
        return values

    return read


def check_weight(source: object, key: str, tensor: Tensor) -> None:
    """Reject a tensor that cannot be a weight: its type is not floating-point, or it has values that are not finite.

    Raises:
        ValueError: the message names the source (a file, or what is saved) and the tensor.
    """
    if tensor.dtype not in WEIGHT_TYPES:
        raise ValueError(
            f"{source}: tensor {key!r} has the type {tensor.dtype}; weights are floating-point numbers of 16 to 64 bits"
        )
    if not is_finite(tensor):
        raise ValueError(f"{source}: tensor {key!r} has NaN or infinite values; the training that made it diverged")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. One pass without a temporary tensor: minimum and maximum propagate NaN."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
