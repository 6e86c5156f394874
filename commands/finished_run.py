"""Opens the model of a finished run in outputs/, with the run's adapter or another one."""

from dataclasses import dataclass
from pathlib import Path

from gpt2core.adapter_files import load_adapter
from gpt2core.checkpoint import load_pretrained
from gpt2core.files import directory_sha256
from gpt2core.lora import merge_lora
from gpt2core.model import GPT2, best_device
from gpt2core.types import BaseRef, Lineage
from steps.adapters.base import REFERENCE, open_base, read_base
from steps.outputs import outputs_dir


@dataclass(frozen=True)
class FinishedRun:
    """The directories of a run's model; the base is on this machine."""

    base_dir: Path
    base: BaseRef
    adapter: Path
    directory: Path  # the run's directory in outputs/

    def load(self, merge: bool, accept_other_base: bool = False) -> GPT2:
        """Load the base with the adapter. `merge`: merge the adapter into the base's weights.

        Raises:
            FileNotFoundError, ValueError: see `load_pretrained` and `load_adapter`.
        """
        model = load_pretrained(self.base_dir, device=best_device())
        load_adapter(model, self.adapter, self.base.sha256, accept_other_base)
        return merge_lora(model) if merge else model


def open_run(name: str, adapter: str | None = None) -> FinishedRun:
    """Find the directories of a run's model. Downloads the base if it comes from the hub.

    Args:
        name: a directory of outputs/: a run's name, latest, staging or production.
        adapter: a directory with an adapter (this project's or PEFT's) to use instead of the run's.

    Raises:
        FileNotFoundError: there is no such run or adapter.
        HubError: the base comes from the hub and cannot be downloaded.
        ValueError: the base or the run's adapter differs from its recorded sha256.
    """
    directory = outputs_dir() / name
    if not (directory / "adapter").is_dir():
        raise FileNotFoundError(f"{directory} is not the directory of a finished run; `make run` starts a run")
    if adapter is not None and not Path(adapter).is_dir():
        raise FileNotFoundError(f"--adapter {adapter} is not a directory")
    reference = directory if (directory / REFERENCE).is_file() else directory / "base"
    adapter_dir = directory / "adapter" if adapter is None else Path(adapter)
    if adapter is None:
        _check_recorded(adapter_dir, directory / "lineage.json")
    return FinishedRun(open_base(reference), read_base(reference), adapter_dir, directory)


def _check_recorded(adapter: Path, lineage: Path) -> None:
    """Raise ValueError if the adapter differs from the run's lineage, for example by a changed alpha."""
    recorded = Lineage.from_json_file(lineage).adapter.sha256
    if (now := directory_sha256(adapter)) != recorded:
        raise ValueError(
            f"{adapter} has sha256 {now}, but the run's {lineage.name} records {recorded}: it changed after the run; "
            "run the pipeline again, or pass its directory to --adapter to use it anyway"
        )
