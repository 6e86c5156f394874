"""Parquet files and directories of the datasets library, by pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2core.files import read_json
from gpt2core.records import PARTS, SUFFIXES, Row

SPLITS, STATE = "dataset_dict.json", "state.json"  # of a saved DatasetDict, and of a saved Dataset


def is_table(path: Path) -> bool:
    """Whether `read_rows` reads the path: a Parquet file, or any directory."""
    return path.is_dir() or (path.is_file() and path.suffix.lower() == ".parquet")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .parquet file, of a directory of them, or of a directory that `datasets` wrote by `save_to_disk`.

    A directory may have parts: those of a DatasetDict, or Parquet files named like test-00000-of-00001.parquet.

    Raises:
        ValueError: naming the file that is damaged or of another kind.
    """
    if path.is_file():
        yield from _rows(_read_parquet(path), "", path.name)
    elif (path / SPLITS).is_file():
        for name in read_json(path / SPLITS).get("splits") or ():
            yield from _rows(_read_dataset(path / str(name)), _part(path, str(name)), str(name))
    elif (path / STATE).is_file():
        yield from _rows(_read_dataset(path), "", path.name)
    else:
        files = sorted(path.rglob("*.parquet"))
        if not files:
            found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            raise ValueError(
                f"{path} is a directory without Parquet files or a dataset of the datasets library (found: {found})"
            )
        names = [file.stem.partition("-")[0] for file in files]
        for file, name in zip(files, names, strict=True):
            part = _part(path, name) if any(other.lower() in PARTS for other in names) else ""
            yield from _rows(_read_parquet(file), part, file.name)


def text_files(path: Path) -> list[tuple[Path, str]]:
    """The JSON and CSV files of a directory without tables, each with its part of the split ("": none).

    [] for a file, and for a directory that `read_rows` reads.

    Raises:
        ValueError: there are several files, and their names are not those of parts.
    """
    if not path.is_dir() or (path / SPLITS).is_file() or (path / STATE).is_file() or any(path.rglob("*.parquet")):
        return []
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("dataset_info")  # the hub's description
    ]
    parts = [file.stem.partition("-")[0].lower() for file in files]
    if all(part in PARTS for part in parts):
        return list(zip(files, parts, strict=True))
    if len(files) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in files[:5])
        raise ValueError(f"{path} has {len(files)} files of records ({names}); name one of them in data.path")
    return [(file, "") for file in files]


def _rows(table: pa.Table, part: str, source: str) -> Iterator[Row]:
    number = 0
    for batch in table.to_batches():
        for value in batch.to_pylist():
            number += 1
            yield Row(f"{source}, record {number}", value, part)


def _part(path: Path, name: str) -> str:
    if name.lower() not in PARTS:
        raise ValueError(f"{path} has a part {name!r}; the known ones are {', '.join(PARTS)}")
    return name.lower()


def _read_parquet(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a valid Parquet file: {_first_line(error)}") from None


def _read_dataset(directory: Path) -> pa.Table:
    state = read_json(directory / STATE)
    if state.get("_indices_data_files"):
        raise ValueError(f"{directory} has an indices mapping of an old version of datasets; save it with a newer one")
    files = [directory / str(entry["filename"]) for entry in state.get("_data_files") or ()]
    if not files:
        raise ValueError(f"{directory / STATE} names no data files")
    return pa.concat_tables([_read_arrow(file) for file in files])


def _read_arrow(file: Path) -> pa.Table:
    try:
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a valid Arrow stream: {_first_line(error)}") from None


def _first_line(error: Any) -> str:
    return str(error).partition("\n")[0]
