"""The instruction records: generated, downloaded, or read from files; validated, and limited in length."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import urlsplit

from tiktoken import Encoding
from zenml import step
from zenml.steps import BaseStep

from gpt2core.checkpoint import CONFIG, read_config
from gpt2core.config import GPT2Config
from gpt2core.data import by_part, count_duplicates, count_leaks, count_repeated_questions, find_markers, limit_lengths
from gpt2core.demo.base import make_tokenizer
from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from gpt2core.files import directory_sha256, file_sha256
from gpt2core.record_files import PARTS
from gpt2core.records import FileRecord, Record, check_records, make_records, read_records, records_sha256
from gpt2core.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2core.types import BaseRef
from steps.adapters.download import fetch, without_secrets
from steps.adapters.hub import fetch_base, fetch_dataset
from steps.adapters.tables import data_files, is_table, read_rows, text_files
from steps.cache import code_of
from steps.config import BaseConfig, DataConfig
from steps.metadata import attach_metadata

logger = logging.getLogger(__name__)
PAST_PARTICIPLES = {"error": "refused", "drop": "dropped", "truncate": "truncated"}


@step(cache_policy=code_of(__name__))
def fetch_data(
    data: DataConfig, base: BaseConfig, seed: int, base_sha256: str = ""
) -> Annotated[list[Record], "records"]:
    """Read instruction records: bundled, from a URL with a known sha256, from a dataset of the hub, or from a file.

    Reports all problems of the records before pretraining. Later steps do not know the locations in the user's file.

    Args:
        base_sha256: see `BaseConfig.resolved`.
    """
    invalid: list[str] = []
    records, origin = read_source(data, seed, invalid.append)
    tokenizer, context_length = _tokenizer(base, base_sha256, data.n_facts, seed)
    try:
        kept, too_long = limit_lengths(records, tokenizer, context_length, data.too_long)
    except ValueError as error:
        locations = ", ".join(value for key, value in origin.items() if key.endswith("location"))
        raise ValueError(f"{locations}: {error}") from None
    markers = find_markers(records)
    parts = by_part(records)
    about = {
        "records": len(kept),
        "duplicates": sum(map(count_duplicates, parts)),
        "repeated_questions": sum(map(count_repeated_questions, parts)),
        "with_prompt_markers": len(markers),
        "too_long": len(too_long),
        "invalid": len(invalid),
        "in_train": count_leaks(records),
        "test_in_val": count_leaks(records, "val"),
        "sha256": records_sha256(kept),
    }
    _log_repetitions(about, len(records), has_parts=bool(parts.val or parts.test))
    if markers:
        what = f"contain a section header of the prompt or {END_OF_TEXT}, at which answers are cut"
        logger.warning("%d of %d records %s: %s", len(markers), len(records), what, _first(markers))
    if too_long:
        what = f"have more tokens than the context of {context_length} and were {PAST_PARTICIPLES[data.too_long]}"
        if data.too_long == "truncate" and len(kept) < len(records):
            what += f" ({len(records) - len(kept)} of the test part dropped)"
        locations = _first([record.location for record in too_long])
        logger.warning("%d of %d records %s: %s", len(too_long), len(records), what, locations)
    attach_metadata("records", {"source": data.source, **origin, **about})
    return kept


def _log_repetitions(about: Mapping[str, Any], n_records: int, has_parts: bool) -> None:
    if about["repeated_questions"]:
        logger.warning(
            "%d of %d records repeat an earlier instruction and input%s (%d of them also the output)%s",
            *(about["repeated_questions"], n_records, " of the same part" if has_parts else ""),
            *(about["duplicates"], "" if has_parts else "; a split keeps them together"),
        )
    if about["in_train"]:
        logger.warning(
            "%d records of the given validation and test parts repeat a question of the train part", about["in_train"]
        )
    if about["test_in_val"]:
        what = "records of the given test part repeat a question of the validation part"
        logger.warning("%d %s", about["test_in_val"], what)


def fetch_step(data: DataConfig) -> BaseStep:
    """Return `fetch_data` for this data. It is not cached for sources whose data may change under the same name.

    Later steps are cached by the records.
    """
    return fetch_data.with_options(enable_cache=False) if data.source in ("file", "hub") else fetch_data


def read_source(
    data: DataConfig, seed: int, on_invalid: Callable[[str], object] = lambda problem: None
) -> tuple[list[Record], dict[str, str]]:
    """Read the records. The second value is their origin: `location`, and for a file `file_sha256`.

    Args:
        on_invalid: called with location and error of each faulty record that is dropped (`data.invalid`).
    """
    if data.source == "bundled":
        return check_records(write_records(make_world(seed, data.n_facts), seed)), {"location": "bundled records"}
    if data.source == "url":
        with TemporaryDirectory() as directory:
            file = Path(directory) / PurePosixPath(urlsplit(data.url).path).name
            fetch(data.url, file, data.sha256, data.max_bytes)
            try:
                records = _read_file(file, data, on_invalid)
            except ValueError as error:  # the directory will not exist any more
                raise ValueError(str(error).replace(str(file), without_secrets(data.url))) from None
        return records, {"location": without_secrets(data.url), "file_sha256": data.sha256}
    if data.source == "hub":
        fetched = fetch_dataset(data.name, data.revision, data.path, data.max_bytes)
        location = f"{data.name}/{data.path}" if data.path else data.name
        if not Path(data.name).is_dir():
            location += f" at {data.revision}"
        return _read_file(fetched, data, on_invalid), {"location": location, "file_sha256": _sha256(fetched)}
    records = _read_file(Path(data.path), data, on_invalid)
    if data.val_path or data.test_path:
        _add_prefix(records, _prefix(Path(data.path)))
    origin = {"location": data.path, "file_sha256": _sha256(Path(data.path))}
    for part, path in (("val", data.val_path), ("test", data.test_path)):
        if path:
            part_records = _of_part(_read_file(Path(path), data, on_invalid), part, path)
            _add_prefix(part_records, _prefix(Path(path)))
            records = [record for record in records if record.get("part") != part] + part_records
            origin |= {f"{part}_location": path, f"{part}_file_sha256": _sha256(Path(path))}
    return records, origin


def _read_file(path: Path, data: DataConfig, on_invalid: Callable[[str], object]) -> list[Record]:
    callback = on_invalid if data.invalid == "drop" else None
    if files := text_files(path):
        records = list[Record]()
        for file, part in files:
            part_records = read_records(file, columns=data.columns, on_invalid=callback)
            part_records = _of_part(part_records, PARTS.get(part, ""), file)
            _add_prefix(part_records, f"{file.relative_to(data_files(path)[0]).as_posix()}, ")
            records += part_records
        return records
    if is_table(path):
        return make_records(read_rows(path, data.columns), str(path), columns=data.columns, on_invalid=callback)
    return read_records(path, columns=data.columns, on_invalid=callback)


def _add_prefix(records: Iterable[Record], prefix: str) -> None:
    """Put a prefix before the locations of records."""
    for record in records:
        if isinstance(record, FileRecord):
            record.location = f"{prefix}{record.location}"


def _prefix(path: Path) -> str:
    """Return what makes a location in the path complete. It begins with a file if the path has several."""
    return f"{path}, " if path.is_file() else f"{data_files(path)[0]}/"


def _of_part(records: list[Record], part: str, source: str | Path) -> list[Record]:
    """Assign the records to a part of the split; "": leave them as they are.

    If the file names parts itself, return only its records of this part.
    """
    if not part:
        return records
    part_records = [record for record in records if record.get("part", part) == part]
    if not part_records:
        others = ", ".join(sorted({record["part"] for record in records}))
        raise ValueError(f"{source} is configured as the {part} part, but has only {others} records")
    for record in part_records:
        record["part"] = part
    return part_records


def _sha256(path: Path) -> str:
    if path.is_dir():
        return directory_sha256(path)
    if is_table(path) and not path.is_file():  # a pattern
        directory, files = data_files(path)
        return directory_sha256(directory, [file.relative_to(directory).as_posix() for file in files])
    return file_sha256(path)


def _tokenizer(base: BaseConfig, sha256: str, n_facts: int | None, seed: int) -> tuple[Encoding, int]:
    """Return the base's tokenizer and its context length in tokens."""
    if base.source == "hub":
        directory = fetch_base(BaseRef(base.name, base.revision, sha256)).path
        return load_tokenizer(directory), read_config(directory / CONFIG).n_positions
    with TemporaryDirectory() as temporary:
        tokenizer = make_tokenizer(base.name, seed, n_facts, Path(temporary))
    return tokenizer, GPT2Config.preset(base.name).n_positions


def _first(locations: Sequence[str], shown: int = 5) -> str:
    return ", ".join(locations[:shown]) + (f" and {len(locations) - shown} more" if len(locations) > shown else "")
