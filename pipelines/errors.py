"""Errors in a run configuration."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any


class ConfigError(Exception):
    """An invalid run configuration. The message has the file, the key and what to change."""


def check_names(
    names: Iterable[Any],
    known: Sequence[str],
    path: str,
    source: str,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise ConfigError with the nearest known name for the first name that is not known.

    Args:
        path: of the mapping whose keys the names are.
        source: where the configuration comes from.
        elsewhere: names that are known in another mapping -> their whole paths, to suggest.
    """
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), [*known, *elsewhere], n=1, cutoff=0.5)
            advice = f"did you mean {elsewhere.get(near[0], near[0])!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {f'{path}.{name}'.lstrip('.')!r}; {advice}")
