"""The list of configuration keys in docs/reference.md: `python -m tests.config_reference` writes it.

Types and defaults are those of the dataclasses; a key's meaning is the comment of its field.
"""

import ast
import inspect
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

FILE = Path(__file__).parent.parent / "docs" / "reference.md"
SECTION = re.compile(r"(?<=<!-- written by python -m tests\.config_reference -->\n).*?(?=\n## )", re.DOTALL)
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}


def section() -> str:
    """A table for each parameter of the pipelines."""
    from pipelines import finetune_pipeline, monitor_pipeline, pretrain_pipeline, sweep_pipeline

    kinds: dict[str, Any] = {}
    for module in (finetune_pipeline, pretrain_pipeline, sweep_pipeline, monitor_pipeline):
        kinds |= get_type_hints(getattr(module, module.__name__.rpartition(".")[2]).entrypoint)
    return "".join(
        f"\n**`{name}`** – {' '.join(inspect.getdoc(kind).split())}\n\n| key | type | default | meaning |\n"
        "|---|---|---|---|\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows(name, kind))
        for name, kind in kinds.items()
        if is_dataclass(kind)
    )


def rows(path: str, kind: Any) -> Iterator[tuple[str, str, str, str]]:
    from pipelines.config import DERIVED

    types, meanings = get_type_hints(kind), comments(kind)
    for field in fields(kind):
        key = f"{path}.{field.name}"
        if field.name == "pretrain":
            yield f"`{key}.*`", "", "", f"the keys of `{field.name}`"
        elif is_dataclass(types[field.name]):
            yield from rows(key, types[field.name])
        elif key not in DERIVED:
            default = field.default if field.default is not MISSING else field.default_factory()
            text = json.dumps(default) if default or not isinstance(default, str | dict | tuple) else "empty"
            yield (
                f"`{key}`",
                type_name(types[field.name]),
                f"`{text}`".replace("`empty`", "empty"),
                meanings[field.name],
            )


def type_name(kind: Any) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" if value else "empty" for value in arguments)
    if get_origin(kind) is UnionType:
        return " or ".join(map(type_name, arguments))
    if get_origin(kind) is tuple:
        return "list"
    return NAMES.get(kind, "mapping")


def comments(kind: type) -> dict[str, str]:
    """The comment of each field: behind it, or else in the line above it; empty if there is none."""
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = {token.start[0]: (token.string.lstrip("# "), token.line) for token in tokens if token.string[:1] == "#"}
    members = ast.parse(source).body[0].body
    return {node.target.id: comment(node, texts) for node in members if isinstance(node, ast.AnnAssign)}


def comment(node: ast.AnnAssign, texts: dict[int, tuple[str, str]]) -> str:
    behind, (above, line) = texts.get(node.end_lineno), texts.get(node.lineno - 1, ("", ""))
    return behind[0] if behind else above if line.lstrip().startswith("#") else ""


if __name__ == "__main__":
    FILE.write_text(SECTION.sub(lambda _: section(), FILE.read_text(encoding="utf-8")), encoding="utf-8")
