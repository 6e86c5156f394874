"""Reads wandb's offline file: records in the framing of LevelDB's log, each a protobuf message of wandb's."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # bytes; a chunk's header is checksum (4), length (2), type (1)
FIRST, LAST = (1, 2), (1, 4)  # types of chunks that begin or end a record: 1 does both


def read_records(file: Path) -> Iterator[Record]:
    """All complete records."""
    content, place, parts = file.read_bytes(), HEADER, b""  # the file begins with a header of the same size
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # padding
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        place += HEADER
        if kind in FIRST:
            parts = b""
        parts += content[place : place + length]
        place += length
        if kind in LAST:
            record = Record()
            record.ParseFromString(parts)
            yield record


def rows(file: Path) -> list[dict[str, Any]]:
    """The logged rows: `_step` and the values."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in read_records(file)
        if record.HasField("history")
    ]


def summary(file: Path) -> dict[str, Any]:
    """The last value of each key of the run's summary."""
    found: dict[str, Any] = {}
    for record in read_records(file):
        for item in record.summary.update:
            found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


def config(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in read_records(file):
        for item in (*record.run.config.update, *record.config.update):
            found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found
