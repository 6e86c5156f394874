"""The service's settings. Nothing else in this package reads the environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gpt2core.config import Weights

LogText = Literal["hash", "keep", "drop"]
MultiTurn = Literal["last", "history", "refuse"]


@dataclass(frozen=True)
class Settings:
    """Field `name` is read from the variable GPT2_NAME. If that is empty or missing, the default is used."""

    api_token: tuple[str, ...] = ()  # every route except health and metrics requires one of them; (): no token needed
    admin_token: tuple[str, ...] = ()  # the routes of bentos/admin.py require one of them; (): these are disabled
    cors_origins: tuple[str, ...] = ()  # origins whose pages may call the service from a browser; ("*",): all
    adapters_dir: str = ""  # directory below which adapters may be loaded; "": no adapters can be loaded
    follow_adapters: bool = False  # serve the adapters of adapters.json in `adapters_dir`, and apply its changes
    weights: Weights = "auto"
    request_log: str = ""  # file for one JSON line per completion; "": no log
    request_log_text: LogText = "hash"  # prompts and completions are logged as sha256 (hash), as text (keep), or not
    multi_turn: MultiTurn = "last"  # earlier turns are ignored (last), used as input (history), or an error (refuse)
    accept_other_base: bool = False  # load adapters that name another base too, with a warning
    tracing: bool = False  # BentoML's OpenTelemetry spans; set by OTEL_SDK_DISABLED=false, not by a GPT2_ variable

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """
        Raises:
            ValueError: a variable has a value that is not allowed, requires another variable that is missing, or is
                misspelled: a misspelled GPT2_API_TOKEN would leave the service open.
        """
        known = [f"GPT2_{name.upper()}" for name in get_type_hints(cls) if name != "tracing"]
        for name in environment:
            meant = get_close_matches(name, known, 1, 0.8) if name.startswith("GPT2_") and name not in known else []
            if meant and not name.startswith("GPT2_INSTRUCT_"):
                raise ValueError(f"{name} is not a setting; did you mean {meant[0]}?")
        given: dict[str, Any] = {}
        for name, annotation in get_type_hints(cls).items():
            if name != "tracing" and (value := environment.get(f"GPT2_{name.upper()}")):
                if get_origin(annotation) is Literal:
                    check_choice(name, value, get_args(annotation))
                if annotation is bool:
                    check_choice(name, value, ("true", "false"))
                    given[name] = value == "true"
                elif get_origin(annotation) is tuple:
                    given[name] = _items(name, value)
                else:
                    given[name] = value
        for origin in given.get("cors_origins", ()):
            if not re.fullmatch(r"\*|https?://[^/?#@*]+", origin):
                raise ValueError(
                    f"GPT2_CORS_ORIGINS contains {origin!r}; an origin is scheme, host and port: https://app.example"
                )
        if given.get("follow_adapters") and not given.get("adapters_dir"):
            raise ValueError(
                "GPT2_FOLLOW_ADAPTERS is true; it needs GPT2_ADAPTERS_DIR, the directory with adapters.json"
            )
        return cls(**given, tracing=environment.get("OTEL_SDK_DISABLED", "").lower() == "false")


def _items(name: str, value: str) -> tuple[str, ...]:
    """Split at commas and strip whitespace: a token from a file often ends with a line break.

    Raises:
        ValueError: an item is blank, which could switch authentication off; or a header cannot contain it.
    """
    items = tuple(item.strip() for item in value.split(","))
    if not all(item and item.isprintable() for item in items):
        raise ValueError(f"GPT2_{name.upper()} has a blank item, or line breaks; separate several items by commas")
    return items


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: the value of a setting is not one of the choices.
    """
    if value not in choices:
        raise ValueError(f"GPT2_{name.upper()} is {value!r}; it must be one of {', '.join(choices)}")
