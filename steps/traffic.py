"""Reads the service's request log: completions and feedback."""

import json
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2core.types import LoggedCompletion, LoggedFeedback, LoggedShadow

OPENAI_IDS = ("chatcmpl-", "cmpl-")  # prefixes of the request id in the responses of OpenAI's routes
MAX_NUMBER = 2**53  # integers up to this one are exact in float64


@dataclass
class Traffic:
    """The content of a log and its rotated files, oldest first."""

    completions: list[LoggedCompletion] = field(default_factory=list)
    feedback: list[tuple[str, LoggedFeedback]] = field(
        default_factory=list
    )  # location, like requests.jsonl:7; feedback
    problems: list[str] = field(default_factory=list)  # unreadable lines, with their locations
    lost: int = 0  # lines that the service could not write


def read_traffic(log: str | Path) -> Traffic:
    """Read the log and its rotated files LOG.1 (the newest), LOG.2 and so on.

    A line that cannot be read, like the last line of a killed service, is added to `problems`.

    Raises:
        FileNotFoundError: there is no such log.
    """
    log = Path(log)
    if not log.is_file():
        raise FileNotFoundError(f"there is no request log {log}; GPT2_REQUEST_LOG makes the service write one")
    rotated = [file for file in log.parent.iterdir() if re.fullmatch(re.escape(log.name) + r"\.\d+", file.name)]
    traffic = Traffic()
    for file in [*sorted(rotated, key=lambda file: -int(file.suffix[1:])), log]:
        with file.open("rb") as stream:  # lines end at \n only; text may contain other line separators
            for number, line in enumerate(stream, 1):
                _add(traffic, f"{file}:{number}", line)
    # sort by time: the file may be the concatenated logs of several replicas
    traffic.completions.sort(key=lambda completion: completion.time)
    traffic.feedback.sort(key=lambda placed: placed[1].time)
    return traffic


def _add(traffic: Traffic, location: str, line: bytes) -> None:
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        _check_values(value)
        lost = int(value.get("lost_before") or 0)
        if "rating" in value:
            traffic.feedback.append((location, LoggedFeedback.from_json(value)))
        elif "shadow" in value:
            LoggedShadow.from_json(value)  # validates only: no client saw this answer, so it is not traffic
        else:
            traffic.completions.append(LoggedCompletion.from_json(value))
        traffic.lost += lost
    except (ValueError, TypeError, RecursionError) as error:
        traffic.problems.append(f"{location}: {error}")


def _check_values(line: Mapping[str, Any]) -> None:
    """Raise ValueError for a number or a text that reports and records cannot contain, such as 1e999 and "\\ud800"."""
    for key, value in line.items():
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # `not`: NaN too
            raise ValueError(f"{key!r} is not a number of at most {MAX_NUMBER:,}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{key!r} is not Unicode text: it has a lone surrogate")


def completion_of(feedback: LoggedFeedback, known: Container[str]) -> str | None:
    """Return the id of the request that the feedback names, by its id or by the `id` of an OpenAI response."""
    given = feedback.request_id
    names = (given, *(given.removeprefix(start) for start in OPENAI_IDS if given.startswith(start)))
    return next((name for name in names if name in known), None)


def ratings_of(traffic: Traffic, completions: Sequence[LoggedCompletion]) -> Counter[str]:
    """Count the ratings of these completions' requests. Of several ratings of a request, the newest counts."""
    known = {completion.request_id for completion in completions}
    newest = {completion_of(feedback, known): feedback.rating for _, feedback in traffic.feedback}
    return Counter(rating for request_id, rating in newest.items() if request_id is not None)


def summary(problems: Sequence[str], shown: int = 10) -> str:
    """Return the first problems, one per line."""
    rest = len(problems) - shown
    return "\n".join([*problems[:shown], *([f"and {rest} more"] if rest > 0 else [])])
