"""Runs of the pipeline at dev size, started as `run.py finetune` does. The fixtures are in conftest.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse

from gpt2core.types import Lineage
from run import main

DEV = "configs/dev.yaml"
MAX_NEW_TOKENS, N_FACTS = 12, 120  # of dev.yaml


@dataclass(frozen=True)
class Run:
    """A finished run: ZenML's record, the directory of its results, and what the command printed."""

    record: PipelineRunResponse
    directory: Path
    output: str

    def read(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    @property
    def lineage(self) -> Lineage:
        return Lineage.from_json(self.read("lineage.json"))

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "samples.jsonl").read_text().splitlines()]

    @property
    def cached(self) -> set[str]:
        return {name for name, step in self.record.steps.items() if step.status == ExecutionStatus.CACHED}


def invoke(outputs: Path, *values: str, config: str = DEV) -> Result:
    """`run.py finetune` with `--set` for each value; results go to `outputs`."""
    arguments = ["finetune", "--config", config, *(part for value in values for part in ("--set", value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_INSTRUCT_OUTPUTS", str(outputs))
        return CliRunner().invoke(main, arguments, catch_exceptions=False)


def finetune(outputs: Path, *values: str) -> Run:
    """The same, for a run that must succeed."""
    result = invoke(outputs, *values)
    assert result.exit_code == 0, result.output
    return Run(newest_run(), (outputs / "latest").resolve(), result.output)


def newest_run() -> PipelineRunResponse:
    return Client().list_pipeline_runs(sort_by="desc:created", size=1).items[0]
