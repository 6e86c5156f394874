"""The path label of HTTP metrics: the route's template, so that the number of time series is bounded."""

import re
from collections.abc import Callable, Collection

from starlette.routing import compile_path

UNKNOWN = "/unknown"


def path_label(templates: Collection[str]) -> Callable[[str], str]:
    """Return a function that maps a request's path to its template (like /v1/models/{model}), or to `UNKNOWN`."""
    exact = {template for template in templates if "{" not in template}
    patterns: list[tuple[re.Pattern[str], str]] = [
        (compile_path(template)[0], template) for template in templates if template not in exact
    ]

    def label(path: str) -> str:
        if path in exact:
            return path
        return next((template for pattern, template in patterns if pattern.match(path)), UNKNOWN)

    return label
