"""Formats of instruction records, and their conversion to this project's records.

| format | keys |
|---|---|
| Alpaca | instruction, output; optional: input, group, family |
| prompt and completion | prompt, completion; both may be lists of messages |
| OpenAI's chat | messages: a list of {"role", "content"}; "weight": 0 or "train": false: context, not to be learned |
| ShareGPT | conversations: a list of {"from", "value"}; an answer before the first question is skipped |

The turns may also be an object of lists of equal length, as older versions of datasets stored them.

A conversation becomes one record for each answer of the assistant. The record's instruction is the user's turn before
the answer, and its input the earlier turns (`gpt2core.prompt.format_turns`). System messages are dropped, as in the
service.

A value with keys of several formats is read as the first format in the table whose keys all exist and are not null.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from gpt2core.prompt import format_turns

TEXTS = ("instruction", "input", "output")
LABELS = ("group", "family")
REQUIRED = ("instruction", "output")
SHAREGPT = "conversations"
CHATS = ("messages", SHAREGPT)
PAIR = ("prompt", "completion")
COLUMNS = (*TEXTS, *LABELS, *PAIR, *CHATS)  # keys that `columns` can map
_FORMATS = {"instruction/output": REQUIRED, "prompt/completion": PAIR, **{key: (key,) for key in CHATS}}
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


def format_of(value: Any, columns: Mapping[str, str]) -> str:
    """Return the name of the record's format for messages; "" if the format is unknown."""
    return _format(_rename(value, _applying(value, columns))) if isinstance(value, dict) else ""


def ignored_keys(value: Any, columns: Mapping[str, str]) -> list[str]:
    """Return the keys of a value that no record uses. Keys of turns are written like "messages[].name"."""
    if not isinstance(value, dict):
        return []
    value = _rename(value, _applying(value, columns))
    name = _format(value)
    read = TEXTS if name == "instruction/output" else _FORMATS.get(name, ())
    unused = [key for key, inner in value.items() if key not in (*LABELS, *read) and inner not in _EMPTY]
    for key in (key for key in read if key in CHATS or isinstance(value.get(key), list)):
        with suppress(ValueError):  # not a list of turns: `to_records` raises this error
            unused += dict.fromkeys(f"{key}[].{each}" for turn in _messages(value, key) for each in _unused_keys(turn))
    return unused


def roles_of(value: Any, columns: Mapping[str, str]) -> list[str]:
    """Return the role of each turn of a conversation; [] for a value of another format."""
    if not isinstance(value, dict):
        return []
    value = _rename(value, _applying(value, columns))
    roles: list[str] = []
    for key in _FORMATS.get(_format(value), ()):
        if key in CHATS or isinstance(value.get(key), list):
            with suppress(ValueError):
                roles += map(_role, _messages(value, key))
    return roles


def is_turn(value: Any) -> bool:
    return isinstance(value, dict) and all(_key(value, keys) in value for keys in (_ROLE_KEYS, _CONTENT_KEYS))


def to_records(value: Any, required: Sequence[str], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Convert a value of any format to records, whose texts are not checked yet. Only conversations give several.

    Args:
        columns: this project's key -> its name in the value. Ignored for a value that has none of these names.

    Raises:
        ValueError: the value has no known format, or an error of its format; the message describes it.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{type_name(value)}, not an object: {shorten(value)}")
    columns = _applying(value, columns)
    for key, column in columns.items():
        if column not in value and (key in required or key not in (*TEXTS, *LABELS)):
            raise ValueError(f"no {column!r}, which data.columns gives as {key!r}, in {shorten(value)}")
    value = _rename(value, columns)
    kind = _format(value)
    for key, inner in value.items():
        if not kind and isinstance(inner, list) and inner and is_turn(inner[0]):
            raise ValueError(f"{key!r} is a conversation; to read it, set data.columns to {{messages: {key}}}")
        if not kind and isinstance(inner, list) and inner and format_of(inner[0], columns):
            raise ValueError(f"the records are in its list {key!r}; write this list alone to a file")
    if all(_is_column(value.get(key)) for key in REQUIRED):
        raise ValueError(
            "'instruction' and 'output' are columns; write one record per row, in pandas by "
            "to_json(file, orient='records', lines=True)"
        )
    if kind in CHATS:
        return _conversation(value, kind, required)
    if kind == "prompt/completion":
        if "completion" not in value and "output" in required:
            raise ValueError(f"no 'completion' in {shorten(value)}")
        if isinstance(value["prompt"], list):
            prompt, completion = value["prompt"], value.get("completion") or []
            context = [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
            if not isinstance(completion, list):
                raise ValueError(f"'prompt' is a list of turns, but 'completion' is {shorten(completion)}")
            return _conversation({**value, "prompt": [*context, *completion]}, "prompt", required)
        renamed = {key: value[key] for key in LABELS if key in value} | {"instruction": value["prompt"]}
        return [renamed | ({"output": value["completion"]} if "completion" in value else {})]
    return [value]


def _is_column(value: Any) -> bool:
    """Return whether a value is a column of a table in JSON: a list, or in pandas' form an object with row numbers."""
    return isinstance(value, list) or (isinstance(value, dict) and bool(value) and all(map(str.isdigit, value)))


def _applying(value: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, str]:
    return columns if any(name in value for name in columns.values()) else {}


def _rename(value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Rename mapped columns to this project's keys. An unmapped column with the name of a mapped key is dropped."""
    named = {column: key for key, column in columns.items()}
    return {named.get(key, key): inner for key, inner in value.items() if key not in columns or key in named}


def _format(value: Mapping[str, Any]) -> str:
    complete = (name for name, keys in _FORMATS.items() if all(value.get(key) is not None for key in keys))
    begun = (name for name, keys in _FORMATS.items() if keys[0] in value)
    return next(complete, next(begun, ""))


def _conversation(value: Mapping[str, Any], key: str, required: Sequence[str]) -> list[dict[str, Any]]:
    messages = _messages(value, key)
    turns = [turn for i, message in enumerate(messages) if (turn := _turn(message, f"{key}[{i}]"))[0] != "system"]
    if key == SHAREGPT and turns and turns[0][0] == "assistant":  # FastChat and axolotl skip it too
        turns = turns[1:]
    texts = [(role, text) for role, text, _ in turns]
    labels = {name: value[name] for name in LABELS if name in value}
    records = []
    for i, (role, text, is_learned) in enumerate(turns):
        if role == "assistant":
            if i == 0 or turns[i - 1][0] != "user":
                before = "no turn" if i == 0 else "another assistant turn"
                raise ValueError(f"{key!r}: an assistant turn comes after {before}, not after the user's")
            if is_learned:
                records.append({"instruction": turns[i - 1][1], "input": format_turns(texts[: i - 1]), "output": text})
    if "output" not in required and turns and turns[-1][0] == "user":  # a question
        return [labels | {"instruction": turns[-1][1], "input": format_turns(texts[:-1]), "output": ""}]
    if not records:
        raise ValueError(f"{key!r} has no answer of the assistant to learn: {shorten(messages)}")
    return [labels | record for record in records]


def _messages(value: Mapping[str, Any], key: str) -> list[Any]:
    messages = value.get(key)
    if key in CHATS and isinstance(messages, str):  # a cell of a CSV file
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            hint = "a list that pandas wrote to CSV is not; write JSON lines instead"
            raise ValueError(f"{key!r} is text that is not JSON: {error} ({hint})") from None
    if isinstance(messages, dict) and all(isinstance(each, list) for each in messages.values()):
        with suppress(ValueError):  # lists of different lengths
            messages = [dict(zip(messages, turn, strict=True)) for turn in zip(*messages.values(), strict=True)]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} is {shorten(messages)}; it must be a list of turns")
    return messages


def _role(message: Any) -> str:
    """Return the role of a message, user, assistant or system; "" if it has another role or none."""
    role = message.get(_key(message, _ROLE_KEYS)) if isinstance(message, dict) else None
    return _ROLES.get(role.lower(), "") if isinstance(role, str) else ""


def _key(message: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first of the keys that the message has; the first of all keys if it has none."""
    return next((key for key in keys if key in message), keys[0])


def _unused_keys(message: Any) -> list[str]:
    if not isinstance(message, dict):
        return []
    used = (_key(message, _ROLE_KEYS), _key(message, _CONTENT_KEYS))
    # Questions are never learned, so a question's flag is used only if it says "not learned".
    flags = [flag for flag in _FLAGS if _role(message) == "assistant" or not message.get(flag)]
    return [key for key, inner in message.items() if key not in (*used, *flags) and inner not in _EMPTY]


def _turn(message: Any, location: str) -> tuple[str, str, bool]:
    """Return the role (user, assistant or system), the text, and whether an assistant's text is to be learned."""
    if not isinstance(message, dict):
        raise ValueError(f"{location} is {shorten(message)}; it must be an object with 'role' and 'content'")
    role, content = _role(message), message.get(_key(message, _CONTENT_KEYS))
    if not role:
        given = shorten(message.get(_key(message, _ROLE_KEYS)))
        raise ValueError(f"{location}: the role is {given}; it must be one of {', '.join(_ROLES)}")
    if isinstance(content, list):  # OpenAI's content parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    calls = next((key for key in ("tool_calls", "function_call") if message.get(key)), "")
    if calls and not content:
        raise ValueError(f"{location}: the assistant calls a tool ({calls!r}), which records cannot contain")
    if not isinstance(content, str):
        raise ValueError(f"{location}: the content is {shorten(content)}; it must be text")
    if role != "system" and not content.strip():
        raise ValueError(f"{location}: the content is empty")
    for flag in _FLAGS:
        if message.get(flag) not in (None, 0, 1):
            raise ValueError(f"{location}: {flag!r} is {shorten(message[flag])}; it must be 0 or 1, false or true")
    return role, content, all(message.get(flag) != 0 for flag in _FLAGS)


_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_FLAGS = ("weight", "train")  # flags of OpenAI and axolotl; 0 or false: the answer is not learned
_EMPTY: tuple[Any, ...] = (None, "", [], {})


def type_name(value: Any) -> str:
    """Return the type of a JSON value with its article, for messages."""
    name = type(value).__name__
    return f"an {name}" if name == "int" else f"a {name}"


def shorten(value: Any) -> str:
    """Return the value as ASCII JSON of at most 120 characters, for messages."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."
