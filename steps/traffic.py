"""The request log of the service, read back: completions and feedback."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gpt2core.types import LoggedCompletion, LoggedFeedback


@dataclass
class Traffic:
    """What a log and its rotated files hold, oldest line first."""

    completions: list[LoggedCompletion] = field(default_factory=list)
    feedback: list[tuple[str, LoggedFeedback]] = field(default_factory=list)  # with its place, like requests.jsonl:7
    problems: list[str] = field(default_factory=list)  # lines that are neither, with their places
    lost: int = 0  # lines that the service could not write


def read_traffic(log: str | Path) -> Traffic:
    """Read the log and the files that were rotated away, which are beside it as LOG.1 (the newest) and so on.

    A line that cannot be read, like the last one of a service that was killed, becomes a problem.

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
    return traffic


def _add(traffic: Traffic, place: str, line: bytes) -> None:
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if "rating" in value:
            traffic.feedback.append((place, LoggedFeedback.from_json(value)))
        else:
            traffic.completions.append(LoggedCompletion.from_json(value))
        traffic.lost += int(value.get("lost_before") or 0)
    except (ValueError, TypeError, RecursionError) as error:
        traffic.problems.append(f"{place}: {error}")


def summary(problems: list[str], shown: int = 10) -> str:
    """The first problems, one per line."""
    rest = len(problems) - shown
    return "\n".join([*problems[:shown], *([f"and {rest} more"] if rest > 0 else [])])


def ratings(traffic: Traffic) -> Counter[str]:
    """The number of completions by their newest rating."""
    newest = {feedback.request_id: feedback.rating for _, feedback in traffic.feedback}
    return Counter(newest.values())
