"""What the served schema says, the service does: schemathesis asks it, with every check that it has."""

import os
import subprocess
import sys

from deploy import bento
from deploy.server import serve


def test_the_service_keeps_to_its_schema(base_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_ADMIN_TOKEN", "admin")
    monkeypatch.setenv("GPT2_ADAPTERS_DIR", str(tmp_path))
    lineage = {"run": {"id": "run-17", "name": "run-17"}, "base": {"sha256": "b" * 64}}
    with serve(bento.build(base_dir, adapter_dir, lineage)) as url:
        command = f"-m schemathesis.cli run {url}/docs.json --checks all --exclude-checks positive_data_acceptance"
        options = ["--max-examples", "60", "--seed", "1", "--request-timeout", "60"]
        header = ["--header", "Authorization: Bearer admin"]
        done = subprocess.run(
            [sys.executable, *command.split(), *options, *header],
            cwd=tmp_path,
            env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.bentos.schemathesis_hooks", "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
