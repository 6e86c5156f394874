"""Parquet files and directories of the datasets library, by pyarrow."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2core.files import describe_file, read_json
from gpt2core.record_files import NO_COLUMNS, PARTS, SUFFIXES, Row
from gpt2core.record_formats import COLUMNS

logger = logging.getLogger(__name__)
PARQUET = ".parquet"
_WILDCARD = re.compile(r"[*?[]")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")  # a file's name in a dataset of the hub; group 1: the name of its split
SPLITS, STATE = "dataset_dict.json", "state.json"  # files of a saved DatasetDict and of a saved Dataset


def is_table(path: Path) -> bool:
    """Whether `read_rows` reads the path: a Parquet file, any directory, or a pattern of files."""
    return path.is_dir() or _is_pattern(path) or (path.is_file() and _is_parquet(path))


def data_files(path: Path) -> tuple[Path, list[Path]]:
    """Return the directory of a pattern like data/*_sft-*.parquet, and the files in it that match, sorted.

    Hidden files and files whose name begins with _ do not match. For a directory, return it and all such files in it.
    """
    fixed = path if path.is_dir() else Path(*takewhile(lambda part: not _WILDCARD.search(part), path.parts))
    files = fixed.rglob("*") if fixed == path else fixed.glob(path.relative_to(fixed).as_posix())
    names = (file.relative_to(fixed) for file in files if not file.is_dir())
    return fixed, sorted(fixed / name for name in names if not any(part.startswith((".", "_")) for part in name.parts))


def _is_pattern(path: Path) -> bool:
    return bool(_WILDCARD.search(str(path))) and not path.exists()


def read_rows(path: Path, columns: Mapping[str, str] = NO_COLUMNS) -> Iterator[Row]:
    """Yield the rows of a .parquet file, a directory of such files, or a directory of `save_to_disk` (datasets).

    A directory may have parts of the split: of a DatasetDict, or in the names of Parquet files (see `text_files`).

    Args:
        columns: key of a record -> its column in the files.

    Raises:
        ValueError: a file is damaged or of another kind, or a used column has a value that Python cannot represent. (In
            other columns, True replaces such a value.)
    """
    used = {*COLUMNS, *columns.values()}
    if path.is_file():
        yield from _rows(_read_parquet(path), "", path, "", used)
    elif (path / SPLITS).is_file():
        for name in read_json(path / SPLITS).get("splits") or ():
            if str(name).lower() not in PARTS:
                raise ValueError(
                    f"{path} has a part {name!r}; the known ones are {', '.join(PARTS)}. Name the directory of one "
                    f"part in data.path, like {path / str(name)}, and of others in data.val_path and data.test_path"
                )
            yield from _rows(_read_dataset(path / str(name)), str(name).lower(), path / str(name), str(name), used)
    elif (path / STATE).is_file():
        yield from _rows(_read_dataset(path), "", path, "", used)
    else:
        files = [(file, part) for file, part in _files(path) if _is_parquet(file)]
        if not files:
            if _is_pattern(path):
                raise ValueError(f"no files of records match {path}")
            found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            raise ValueError(
                f"{path} is a directory without Parquet files or a dataset of the datasets library (found: {found})"
            )
        _log_parts(path, files)
        directory, _ = data_files(path)
        for file, part in files:
            yield from _rows(_read_parquet(file), part, file, file.relative_to(directory).as_posix(), used)


def text_files(path: Path) -> list[tuple[Path, str]]:
    """Return the JSON and CSV files of a directory, each with its part of the split ("": no part).

    The part is a word in the file's name, or else in the name of the nearest directory below `path` that has such a
    word, as in the datasets library: test-00000-of-00001.csv, my_test.csv, test/0.csv. Hidden files and files whose
    name begins with _ are ignored. `path` may also be a pattern (see `data_files`); if no file that matches names a
    part, all files are one set of records. Returns [] for a file, and for a directory that `read_rows` reads.

    Raises:
        ValueError: there are several files, and not all of them name a part, or they are not one dataset.
    """
    if not (path.is_dir() or _is_pattern(path)) or (path / SPLITS).is_file() or (path / STATE).is_file():
        return []
    files = _files(path)
    if any(_is_parquet(file) for file, _ in files):
        return []
    named = [file for file, part in files if part]
    if len(files) > 1 and len(named) < len(files) and (named or path.is_dir()):
        names = ", ".join(file.relative_to(data_files(path)[0]).as_posix() for file, _ in files[:5])
        pattern = f", or all as one set by a pattern like {path / f'*{files[0][0].suffix}'}" if not named else ""
        raise ValueError(
            f"{path} has {len(files)} files of records ({names}); name one of them in data.path, others in "
            f"data.val_path and data.test_path{pattern}"
        )
    _log_parts(path, files)
    return files


def _files(path: Path) -> list[tuple[Path, str]]:
    """Return the Parquet, JSON and CSV files of a directory, each with its part, as `text_files` defines it."""
    directory, files = data_files(path)
    names = [
        file.relative_to(directory)
        for file in files
        if file.suffix.lower() in (PARQUET, *SUFFIXES)
        and not file.name.startswith("dataset_info")  # metadata of the hub
    ]
    parts = {name: _part(directory, name) for name in names}
    if any(parts.values()):
        if any(map(_is_parquet, names)):  # other files that name no part are metadata, not records
            parts = {name: part for name, part in parts.items() if part or _is_parquet(name)}
        _refuse_several_datasets(path, parts)
        _refuse_several_splits(path, parts)
    return [(directory / name, part) for name, part in parts.items()]


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == PARQUET


def _refuse_several_datasets(path: Path, parts: Mapping[Path, str]) -> None:
    """Reject test.csv together with test.parquet, several configurations of a Hub dataset, and tables without a part.

    Args:
        parts: name of each file -> its part.
    """
    folders = {tuple(folder for folder in name.parts[:-1] if not _words(folder)) for name in parts}
    stems = {name.with_suffix("") for name in parts}
    if len(folders) > 1 or len(stems) < len(parts) or len(set(map(_is_parquet, parts))) > 1:
        shown = ", ".join(name.as_posix() for name in [*parts][:5])
        raise ValueError(
            f"{path} has files of records in several directories or formats ({shown}); name one of them in data.path"
        )
    for name, part in parts.items():
        if _is_parquet(name) and not part:
            raise ValueError(f"{path}: {name.as_posix()} names no part of the split ({', '.join(PARTS)})")


def _refuse_several_splits(path: Path, parts: Mapping[Path, str]) -> None:
    """Reject train_sft-00000-of-00001 together with train_gen-00000-of-00001, two splits in the datasets library."""
    splits: dict[str, set[str]] = defaultdict(set)
    for name, part in parts.items():
        if part and (shard := _SHARD.fullmatch(name.stem)) and _words(shard[1]):
            splits[PARTS[part]].add(shard[1])
    for part, names in splits.items():
        if len(names) > 1:
            split = re.sub(rf"^({'|'.join(PARTS)})(?=[-._])", "*", min(names))  # *_gen also selects test_gen
            first = next(iter(parts))
            example = first.with_name(f"{split}-*{first.suffix}").as_posix()
            raise ValueError(
                f"{path} has several splits for the part {part}: {', '.join(sorted(names))}; "
                f"select files by a pattern in data.path, like {example}"
            )


def _log_parts(path: Path, files: Sequence[tuple[Path, str]]) -> None:
    for part in sorted({PARTS[part] for _, part in files if part}):
        names = [file.name for file, word in files if word and PARTS[word] == part]
        logger.info("%s: %d files of the part %s: %s", path, len(names), part, ", ".join(names[:5]))


def _part(path: Path, name: Path) -> str:
    """Return the part in the name of the file or of its nearest directory; "" if there is none."""
    for text in (name.stem, *reversed(name.parts[:-1])):
        words = _words(text)
        if len({PARTS[word] for word in words}) > 1:
            raise ValueError(f"{path / name} names more than one part of the split: {' and '.join(words)}")
        if words:
            return words[0]
    return ""


def _words(name: str) -> list[str]:
    """Return the words of a name that are names of parts."""
    return [word for word in re.split(r"[-._ 0-9]+", name.lower()) if word in PARTS]


def _rows(table: pa.Table, part: str, source: Path, name: str, used: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a table. Their location begins with `name`; "": there is only one table."""
    prefix = f"{name}, " if name else ""
    class_names = _class_names(table.schema)
    number = 0
    for batch in table.to_batches():
        names = batch.schema.names
        values = {name: _values(column, name, source, used) for name, column in zip(names, batch.columns, strict=True)}
        for name, labels in class_names.items():
            known = dict(enumerate(labels)) | {-1: None}  # -1: no label
            values[name] = [known.get(value, value) for value in values[name]]
        for i in range(batch.num_rows):
            number += 1
            yield Row(f"{prefix}record {number}", {name: column[i] for name, column in values.items()}, part)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes of each column that is a ClassLabel of the datasets library."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if name in schema.names and isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError):  # no metadata of this library
        return {}


def _values(column: pa.Array, name: str, source: Path, used: Collection[str]) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, ArithmeticError, LookupError) as error:  # not UTF-8; a year above 9999; an unknown time zone
        if name in used:
            raise ValueError(
                f"{source}: the column {name!r}, of type {column.type}, has a value that cannot be read ({error}); "
                "write it as UTF-8 text"
            ) from None
        values = [is_valid or None for is_valid in column.is_valid().to_pylist()]
    return values


def _read_parquet(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        if description := describe_file(file):
            raise ValueError(f"{file} {description}") from None
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
