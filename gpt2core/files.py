"""Files: atomic writes, digests, and JSON whose errors name the file. Imports no torch."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHECKPOINT_FILES = (  # the files that the index names are added by `shard_files`
    *(WEIGHTS, INDEX, "model-*-of-*.safetensors"),
    *("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    "added_tokens.json",
)
STORE_FILE = "model.yaml"  # BentoML adds it to the files of a model in its store

PARQUET = b"PAR1"  # first bytes of a Parquet file
_CONTENTS = (  # first bytes of formats that occur in files whose name has another suffix
    (b"\x1f\x8b", "is compressed by gzip; decompress it"),
    (b"PK\x03\x04", "is a zip archive or a workbook; unpack it, or save its sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; decompress it"),
    (b"\xfd7zXZ\0", "is compressed by xz; decompress it"),
    (b"BZh", "is compressed by bzip2; decompress it"),
    (PARQUET, "is a Parquet file; rename it to .parquet"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the data; fetch it by git lfs pull"),
    (b"<!doctype html", "is a web page, not the data; download the file itself, which may need a login"),
    (b"<html", "is a web page, not the data; download the file itself, which may need a login"),
)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota reached, file size limit reached


def atomic_write(file: Path, content: bytes, mode: int | None = None) -> None:
    """Write the file completely or not at all: a crash leaves the previous content.

    Args:
        mode: permissions; None: those of the file that is replaced, or of a new file, by the umask.

    Raises:
        OSError: the message names the file. If the disk is full, it also has the file's size and the free space.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if mode is None and file.exists():
        mode = stat.S_IMODE(file.stat().st_mode)
    first_mode = 0o666 if mode is None else 0o600  # never readable by more users than at the end
    temporary = file.with_name(f".{file.name}.{token_hex(4)}")
    with (
        naming_file(file, len(content)),
        open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, first_mode)) as stream,
    ):
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            os.replace(temporary, file)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextmanager
def naming_file(file: Path, size: int | None = None) -> Iterator[None]:
    """Context manager that adds the path, `size` and the free space to disk-full errors.

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
        raise OSError(number, f"{reason} ({wanted}{free_bytes(file):,} bytes free)", str(file)) from None


def _cause(error: OSError) -> tuple[int | None, str | None]:
    """Return the number and the text of an OSError; for `shutil.Error`, those of the first error in its list."""
    if isinstance(error, shutil.Error) and (match := re.search(r"\[Errno (\d+)\] ([^:']+)", str(error))):
        return int(match[1]), match[2]
    return error.errno, error.strerror


def free_bytes(file: Path) -> int:
    """Return the free space of the disk on which `file` is, or would be."""
    return shutil.disk_usage(next(parent for parent in file.absolute().parents if parent.is_dir())).free


def write_files(directory: str | Path, files: Mapping[str, bytes]) -> Path:
    """Write the files (name -> content) of a model into the directory, each of them atomically; return the directory.

    Every user may read them, regardless of the umask: the service runs as another user.
    """
    for name, content in files.items():
        atomic_write(Path(directory) / name, content, mode=0o644)
    return Path(directory)


def file_sha256(file: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def directory_sha256(directory: str | Path, files: Iterable[str] | None = None) -> str:
    """Return the sha256 of a directory: the digest of the lines that sha256sum prints for its files.

    A line is "<sha256>  <relative path>". Lines are in the order of their paths.

    Args:
        files: relative paths of the files that the digest covers; None: all files.
    """
    names = list_files(directory) if files is None else sorted(files)
    lines = "".join(f"{file_sha256(Path(directory) / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def list_files(directory: str | Path, exclude: Collection[str] = ()) -> list[str]:
    """Return the sorted relative paths of all files below the directory, except `exclude`."""
    paths = (path.relative_to(directory).as_posix() for path in Path(directory).rglob("*") if path.is_file())
    return sorted(set(paths) - set(exclude))


def model_files(directory: str | Path) -> list[str]:
    """Return the sorted relative paths of a base's or an adapter's files, in BentoML's store or elsewhere."""
    return list_files(directory, exclude=[STORE_FILE])


def checkpoint_files(directory: str | Path) -> list[str]:
    """Return the names of the files that define model and tokenizer in a base's directory. Its sha256 covers them.

    Raises:
        ValueError: as `shard_files`.
    """
    names = {file.name for pattern in CHECKPOINT_FILES for file in Path(directory).glob(pattern)}
    return sorted(names | {name for name in shard_files(directory) if (Path(directory) / name).is_file()})


def shard_files(directory: str | Path) -> list[str]:
    """Return the file names in the index of a sharded checkpoint, whether the files exist or not; [] without an index.

    Raises:
        ValueError: the index is damaged, or a name is not the plain name of a safetensors file. A downloaded checkpoint
            must not refer to files outside its directory.
    """
    index = Path(directory) / INDEX
    if (index.parent / WEIGHTS).is_file() or not index.is_file():  # an unsharded file takes precedence over an index
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
        sha256: the result of `directory_sha256`, or at least its first 16 digits.
        files: the files that the digest covers; None: all files.

    Raises:
        ValueError: the digests differ; the message has the directory, its files and both digests.
    """
    names = list_files(directory) if files is None else sorted(files)
    digest = directory_sha256(directory, names)
    if len(sha256) < 16 or not digest.startswith(sha256):
        raise ValueError(
            f"{directory} is damaged or was changed: sha256 {digest} of {', '.join(names) or 'no files'}, but {sha256} "
            "was recorded when it was stored"
        )


def json_bytes(value: Any) -> bytes:
    """Return the content of a JSON file: indented, in ASCII."""
    return (json.dumps(value, indent=2) + "\n").encode()


def describe_content(beginning: bytes) -> str:
    """Return what a file that begins with these bytes is, and the way out; "" unless its name says something else."""
    words = beginning.lstrip(b" \t\r\n\xef\xbb\xbf")[:20].lower()
    return next((text for mark, text in _CONTENTS if beginning.startswith(mark) or words.startswith(mark)), "")


def describe_file(file: Path) -> str:
    """Return `describe_content` of a file; "" for a Parquet file that has its suffix."""
    with open(file, "rb") as stream:
        beginning = stream.read(100)
    is_named = file.suffix.lower() == ".parquet" and beginning.startswith(PARQUET)
    return "" if is_named else describe_content(beginning)


def read_text(file: Path) -> str:
    """Read a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not UTF-8; the message names it.
    """
    check_exists(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def read_json(file: Path, max_bytes: int = 2**28) -> dict[str, Any]:
    """Read a file that contains a JSON object.

    Raises:
        FileNotFoundError, ValueError: the file is missing, too large or not valid; the message names it. A repeated
            key is not valid either, since JSON readers treat it differently.
    """
    check_exists(file)
    if (size := file.stat().st_size) > max_bytes:  # before the whole file is in memory
        raise ValueError(f"{file} has {size:,} bytes; it must have at most {max_bytes:,}")
    if description := describe_file(file):
        raise ValueError(f"{file} {description}")
    text = read_text(file)
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} contains a JSON {type(value).__name__}, not an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object; reject a repeated key, for which json.loads would keep the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} is repeated")
    return value


def check_exists(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {directory_hint(file.parent)}")


def directory_hint(directory: Path, *names: str, otherwise: str = "") -> str:
    """Return the way out for a directory without a file of these names: the subdirectory with one, or `otherwise`.

    Searches two levels, so it finds a checkpoint in a trainer's output directory and a snapshot in the hub's cache.
    """
    for name in names:
        below = [file for pattern in (f"*/{name}", f"*/*/{name}") for file in directory.glob(pattern) if file.is_file()]
        if below:
            newest = max(below, key=lambda file: file.stat().st_mtime)
            return f"{newest.parent} has one: use that directory"
    return otherwise or f"is {directory} the right directory?"
