"""The last step of a sweep. It is not cached, since it writes files outside of the artifact store."""

from typing import Annotated

from zenml import step
from zenml.types import HTMLString

from gpt2core.trials import Trial
from steps.adapters.sweep_report import write_sweep
from steps.config import SweepConfig
from steps.outputs import shared_path


@step(enable_cache=False)
def compare_trials(
    trials: list[Trial], sweep: SweepConfig
) -> tuple[Annotated[HTMLString, "sweep_report"], Annotated[str, "table"], Annotated[str, "directory"]]:
    """Compare all trials, as a page and as a table; also written below outputs/experiments/."""
    directory = shared_path("experiments") / (sweep.name if sweep.scale == "small" else f"{sweep.name}-full")
    write_sweep(trials, sweep, directory)
    return (
        HTMLString((directory / "report.html").read_text(encoding="utf-8")),
        (directory / "table.md").read_text(encoding="utf-8"),
        str(directory),
    )
