"""The example runs offline on a small random base, and what it exports can be read back."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import load_adapter, load_pretrained

EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_and_export.py"


@pytest.fixture(scope="module")
def output(base_dir, tmp_path_factory) -> tuple[Path, str]:
    """The folder that the example exported to, and what it printed."""
    out = tmp_path_factory.mktemp("exported")
    command = [sys.executable, str(EXAMPLE), str(base_dir), str(out)]
    environment = {"PYTHONPATH": str(EXAMPLE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_example_trains(output):
    first, last = map(float, re.findall(r"(\d+\.\d+) in the (?:first|last)", output[1]))
    assert last < first


def test_its_exports_are_read_by_this_project_transformers_and_peft(output, base_dir):
    load_adapter(load_pretrained(base_dir), output[0] / "adapter")
    GPT2LMHeadModel.from_pretrained(output[0] / "merged")
    PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base_dir), output[0] / "peft")
