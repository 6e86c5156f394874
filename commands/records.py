"""Converts users' corrections in the service's request log to instruction records for the next run."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from gpt2core.data import Record, question, read_records, to_jsonl
from gpt2core.files import atomic_write
from gpt2core.prompt import split_prompt
from gpt2core.types import LoggedFeedback
from steps.traffic import Traffic, completion_of, read_traffic


@dataclass(frozen=True)
class Collected:
    """The result of `collect`."""

    records: int  # number of records in the file
    changed: int  # number of new or changed records
    problems: list[str]  # descriptions of unusable lines, each with its location in the log


def collect(log: str | Path, out: Path) -> Collected:
    """Write the corrections in the log as records to a .jsonl file, which `data.source=file` reads.

    The newest correction of a question (instruction and input) counts. Existing records in the file are kept, with the
    output of the newest correction. Unusable lines are reported and skipped.

    Raises:
        FileNotFoundError, ValueError: there is no such log, no correction in it can be used and `out` does not exist,
            or `out` is not usable.
    """
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"--out is {out}; it must end in .jsonl")
    traffic = read_traffic(log)
    corrections, problems = _corrections(traffic)
    if not corrections and not out.exists():  # without new corrections, an existing file is still usable
        reason = f"; {problems[0]}" if problems else ""
        raise ValueError(f"{log} has {len(traffic.feedback)} ratings, but no usable correction{reason}")
    records, changed = read_records(out) if out.exists() else [], 0
    by_question: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_question[question(record)].append(record)
    for (instruction, input), output in corrections.items():
        known = by_question[instruction, input]
        if not known:
            known.append({"instruction": instruction, "input": input, "output": ""})
            records += known
        changed += sum(record["output"] != output for record in known)
        for record in known:
            record["output"] = output
    atomic_write(out.resolve(), to_jsonl(records))  # if `out` is a link, replaces its target
    return Collected(len(records), changed, problems)


def _corrections(traffic: Traffic) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return the newest correction of each question, and descriptions of unusable lines."""
    prompts: dict[str, set[str | None]] = defaultdict(set)
    for completion in traffic.completions:
        prompts[completion.request_id].add(completion.prompt)
    corrections: dict[tuple[str, str], str] = {}
    problems = list(traffic.problems)
    for location, feedback in traffic.feedback:
        if feedback.correction is None:
            continue
        try:
            key = _question(feedback, prompts)
        except ValueError as error:
            problems.append(f"{location}: {error}")
            continue
        corrections[key] = feedback.correction.strip()
    return corrections, problems


def _question(feedback: LoggedFeedback, prompts: dict[str, set[str | None]]) -> tuple[str, str]:
    """Return instruction and input of the completion that the feedback is about.

    Raises:
        ValueError: the log does not contain them.
    """
    given, name = feedback.request_id, completion_of(feedback, prompts)
    if name is None:
        raise ValueError(f"no completion in the log has the request id {given!r}")
    if len(prompts[name]) > 1:
        raise ValueError(f"{given!r} is the request id of several prompts")
    [prompt] = prompts[name]
    if prompt is None:
        raise ValueError(f"the log has no prompt of {given!r}; GPT2_REQUEST_LOG_TEXT=keep keeps them")
    parts = split_prompt(prompt)
    if parts is None or not parts[0].strip():
        raise ValueError(f"the prompt of {given!r} is not that of an instruction")
    return parts
