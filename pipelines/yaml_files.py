"""Reading YAML strictly: YAML 1.2's booleans, and no key twice in one mapping."""

from collections.abc import Hashable
from typing import Any

import yaml


def load_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: the text is not valid YAML, or a mapping has a key twice; with line and column.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


class _Loader(yaml.SafeLoader):
    """`on`, `off`, `yes` and `no` stay text, as in YAML 1.2: `wandb: off` is a value of that setting."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str):
                if key in seen:
                    problem = f"the key {key!r} is repeated"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)
