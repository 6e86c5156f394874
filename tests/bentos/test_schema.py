"""The service behaves as its OpenAPI document says: schemathesis with every check that it has."""

import os
import subprocess
import sys

import pytest


@pytest.mark.timeout(900)  # 1,300 requests, a minute on two idle cores
def test_the_service_conforms_to_its_schema(url, tmp_path):
    command = f"-m schemathesis.cli run {url}/docs.json --checks all --exclude-checks positive_data_acceptance"
    options = ["--max-examples", "10", "--seed", "1", "--request-timeout", "60", "--max-response-time", "60"]
    header = ["--header", "Authorization: Bearer admin"]
    done = subprocess.run(
        [sys.executable, *command.split(), *options, *header],
        cwd=tmp_path,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.bentos.schemathesis_hooks", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
