"""Files: atomic writes, digests, and JSON and safetensors whose errors name the file."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def atomic_write(file: Path, content: bytes) -> None:
    """Write the file completely or not at all: a crash leaves the previous content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)  # the temporary file's 0600 would lock out other users and containers
            os.replace(stream.name, file)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(stream.name)
            raise


def write_files(directory: str | Path, files: Mapping[str, bytes]) -> Path:
    """Write the files (name -> content) into the directory, each atomically; return the directory."""
    for name, content in files.items():
        atomic_write(Path(directory) / name, content)
    return Path(directory)


def file_sha256(file: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def directory_sha256(directory: str | Path, files: Iterable[str] | None = None) -> str:
    """sha256 of a directory: of the sorted lines "<sha256>  <relative path>" of its files, as sha256sum prints them."""
    directory = Path(directory)
    names = (
        sorted(files)
        if files is not None
        else sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    )
    lines = "".join(f"{file_sha256(directory / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    _check_exists(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} contains a JSON {type(value).__name__}, not an object")
    return value


def read_tensors(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    _check_exists(file)
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            # cloned: otherwise the tensors are the mapped file, change with it, and keep all of it in memory
            return {key: tensors.get_tensor(key).clone() for key in tensors.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); download or save it again") from None


def check_weight(source: object, key: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be a weight: not of a floating-point type, or with values that are not finite.

    Raises:
        ValueError: naming the source (a file, or what is saved) and the tensor.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"{source}: tensor {key!r} has the type {tensor.dtype}; weights are floating-point numbers")
    if not is_finite(tensor):
        raise ValueError(f"{source}: tensor {key!r} has NaN or infinite values; the training that made it diverged")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass without a temporary tensor, since minimum and maximum keep NaN."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; is {file.parent} the right directory?")
