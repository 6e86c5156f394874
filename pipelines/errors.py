"""Errors in a run configuration."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any


class ConfigError(Exception):
    """An invalid run configuration. The message names the file and the key, and says what to change."""


def check_names(
    names: Iterable[Any],
    known: Sequence[str],
    path: str,
    source: str,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise ConfigError for the first unknown name, with the nearest known name.

    Args:
        path: path of the mapping whose keys are checked.
        source: origin of the configuration.
        elsewhere: names of other mappings -> their whole paths, which are suggested too.
    """
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), [*known, *elsewhere], n=1, cutoff=0.5)
            advice = f"did you mean {elsewhere.get(near[0], near[0])!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {f'{path}.{name}'.lstrip('.')!r}; {advice}")
