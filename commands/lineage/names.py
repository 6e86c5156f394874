"""Resolves a name, which may be abbreviated, to the full name."""

from collections.abc import Sequence
from difflib import get_close_matches

from commands.lineage.runs import TracedRun

MAX_SHOWN = 10  # candidates shown for an ambiguous name


class LineageError(ValueError):
    """A name that matches nothing, or several names."""


def resolve(name: str, runs: Sequence[TracedRun]) -> str:
    """Return the only known name that equals `name` or starts with it.

    Raises:
        LineageError: no name or several names match; the message lists candidates.
    """
    names = {known: kind for run in reversed(runs) for known, kind in run.names.items()}
    if name in names:
        return name
    matches = sorted(known for known in names if name and known.startswith(name))
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = "".join(f"\n  {known}  ({names[known]})" for known in matches[:MAX_SHOWN])
        more = f"\n  and {len(matches) - MAX_SHOWN} more" if len(matches) > MAX_SHOWN else ""
        raise LineageError(f"{name!r} matches {len(matches)} names; give more characters of one:{shown}{more}")
    if not names:
        raise LineageError("ZenML's store has no finetuning run yet; `make run` starts a run")
    near = get_close_matches(name, names, n=3) or list(runs[0].names)
    shown = "".join(f"\n  {known}  ({names[known]})" for known in near)
    raise LineageError(
        f"nothing matches {name!r}; give a run's name or id, a model version, a Bento's tag, or the start of the "
        f"sha256 of records or an adapter, for example:{shown}"
    )
