"""Files: atomic writes, digests, and JSON whose errors name the file. Imports no torch."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHECKPOINT_FILES = (  # and those that the index names: `shard_files`
    *(WEIGHTS, INDEX, "model-*-of-*.safetensors"),
    *("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    "added_tokens.json",
)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota or limit of a file's size reached


def atomic_write(file: Path, content: bytes) -> None:
    """Write the file completely or not at all: a crash leaves the previous content.

    Raises:
        OSError: naming the file; if there is no space for it, also its size and the space that is left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming_file(file, len(content)),
        NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream,
    ):
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


@contextmanager
def naming_file(file: Path, size: int | None = None) -> Iterator[None]:
    """Add the path, `size` and the free space to disk-full errors, which lack them.

    Args:
        size: bytes to write; None: not known.
    """
    try:
        yield
    except OSError as error:
        number, reason = _cause(error)
        if number not in NO_SPACE:
            raise
        wanted = "" if size is None else f"{size:,} bytes to write, "
        raise OSError(number, f"{reason} ({wanted}{_free_bytes(file):,} bytes free)", str(file)) from None


def _cause(error: OSError) -> tuple[int | None, str | None]:
    """Number and text; of `copytree`'s error, which is a list of (source, target, text), those of its first file."""
    if isinstance(error, shutil.Error) and (found := re.search(r"\[Errno (\d+)\] ([^:']+)", str(error))):
        return int(found[1]), found[2]
    return error.errno, error.strerror


def _free_bytes(file: Path) -> int:
    return shutil.disk_usage(next(parent for parent in file.absolute().parents if parent.is_dir())).free


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
    """sha256 of a directory: of the lines "<sha256>  <relative path>" of its files, as sha256sum * prints them."""
    names = list_files(directory) if files is None else sorted(files)
    lines = "".join(f"{file_sha256(Path(directory) / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def list_files(directory: str | Path, exclude: Collection[str] = ()) -> list[str]:
    """The relative paths of all files below the directory, sorted, without the excluded ones."""
    paths = (path.relative_to(directory).as_posix() for path in Path(directory).rglob("*") if path.is_file())
    return sorted(set(paths) - set(exclude))


def checkpoint_files(directory: str | Path) -> list[str]:
    """The names of the files that define model and tokenizer in a base's directory; its sha256 covers these.

    Raises:
        ValueError: as `shard_files`.
    """
    found = {file.name for pattern in CHECKPOINT_FILES for file in Path(directory).glob(pattern)}
    return sorted(found | {name for name in shard_files(directory) if (Path(directory) / name).is_file()})


def shard_files(directory: str | Path) -> list[str]:
    """The names of the files that the index of a sharded checkpoint names, whether they exist or not; [] without one.

    Raises:
        ValueError: the index is damaged, or a name is not the plain name of a safetensors file: a downloaded checkpoint
            must not reach outside its directory.
    """
    index = Path(directory) / INDEX
    if (index.parent / WEIGHTS).is_file() or not index.is_file():  # an index beside the whole file is not used
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: 'weight_map' must map keys to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: shard {name!r} is not the plain name of a .safetensors file")
    return names


def verify_directory(directory: str | Path, sha256: str, files: Collection[str] | None = None) -> None:
    """Compare a directory with the digest under which it was stored.

    Args:
        sha256: of `directory_sha256`, or at least its first 16 digits.
        files: those that the digest covers; None: all.

    Raises:
        ValueError: naming the directory, its files and both digests.
    """
    names = list_files(directory) if files is None else sorted(files)
    found = directory_sha256(directory, names)
    if len(sha256) < 16 or not found.startswith(sha256):
        raise ValueError(
            f"{directory} is damaged or was changed: sha256 {found} of {', '.join(names) or 'no files'}, but {sha256} "
            "was recorded when it was stored"
        )


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file: indented, in ASCII."""
    return (json.dumps(value, indent=2) + "\n").encode()


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    check_exists(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def read_json(file: Path, max_bytes: int = 2**28) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        FileNotFoundError, ValueError: naming the file; also for a repeated key, which readers may read differently.
    """
    check_exists(file)
    if (size := file.stat().st_size) > max_bytes:  # before all of it is in memory
        raise ValueError(f"{file} has {size:,} bytes; it must have at most {max_bytes:,}")
    text = read_text(file)
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} contains a JSON {type(value).__name__}, not an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; json.loads would keep the last value of a repeated key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} is repeated")
    return value


def check_exists(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; is {file.parent} the right directory?")
