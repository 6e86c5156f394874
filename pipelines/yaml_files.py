"""Strict YAML: booleans and decimal integers of YAML 1.2, no dates, no key twice in a mapping, limited aliases."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

_INT, _DECIMAL = "tag:yaml.org,2002:int", re.compile("[-+]?(?:0|[1-9][0-9]*)$")
MAX_NODES = 100_000  # values, with every alias expanded; the configs of this project have about a hundred


def load_yaml(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        ValueError: the text is not valid YAML, a mapping has a key twice (both with line and column), it is nested too
            deeply, or it has too many values when its aliases are expanded.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases expand to more than {MAX_NODES} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace(' in "<unicode string>",', " in")) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values of a node, its own included. An alias counts like a copy."""
    if id(node) not in counted:
        counted[id(node)] = MAX_NODES + 1  # while it is counted, so that a recursive alias exceeds the limit
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [each for child in children for each in (child if isinstance(child, tuple) else (child,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in inner)
    return counted[id(node)]


class _Loader(yaml.SafeLoader):
    """`on`, `off`, `yes` and `no` stay text, as in YAML 1.2: `wandb: off` is a value of that setting.

    So do dates, and what YAML 1.1 reads as another number than it looks like: `epochs: 010` (8) and `1:30` (90).
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, _DECIMAL if tag == _INT else pattern)
            for tag, pattern in resolvers
            if (tag != "tag:yaml.org,2002:bool" or first in "tTfF") and tag != "tag:yaml.org,2002:timestamp"
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}  # key -> line
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str):
                if key in seen:
                    problem = f"the key {key!r} is repeated; it is also in line {seen[key]}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:binary", yaml.SafeLoader.construct_undefined)  # type: ignore[type-var]  # no setting is of bytes
