"""Cache keys that include this repository's code. ZenML's own key covers the step function only."""

from collections.abc import Callable, Iterable

from zenml.config import CachePolicy

from deploy.source import code_files


def code_of(
    step_module: str, *others: str, files: Iterable[str] = (), also: Callable[[], str] | None = None
) -> CachePolicy:
    """Return a cache policy whose key covers the source files of the modules and all their transitive imports from this
    repository, with their templates.

    Args:
        files: other files that the key covers, relative to the root. Git must not ignore them: ZenML uploads code
            without ignored files, and a key with a missing file is an error.
        also: a function whose result is part of the key too.
    """
    return CachePolicy(
        file_dependencies=sorted({*code_files(step_module, *others), *files}),
        cache_func=also,  # type: ignore[arg-type]  # ZenML converts it to a Source
    )
