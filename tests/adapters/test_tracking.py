import logging
import os
import subprocess
import sys

import pytest
import wandb

from steps.adapters.tracking import track
from steps.config import TrackingConfig

OFFLINE = TrackingConfig("offline", "project")
IMPORT = "import pathlib\nfrom steps.adapters.tracking import track\nfrom steps.config import TrackingConfig\n"


def test_off_accepts_metrics_and_writes_nothing(tmp_path):
    with track(TrackingConfig(), "run", "id", {}, tmp_path / "wandb") as log:
        log(1, {"train/loss": 2.0})
    assert list(tmp_path.iterdir()) == []


def test_off_does_not_import_wandb():
    code = (
        "import sys\nwith track(TrackingConfig(), 'run', 'id', {}, pathlib.Path('.')) as log: log(1, {})\n"
        "sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", IMPORT + code]).returncode == 0


def run_offline(directory, step: int, run_id: str = "3d5a") -> None:
    arguments = f"TrackingConfig('offline'), 'run', {run_id!r}, {{'rank': 8}}, pathlib.Path({str(directory)!r})"
    code = f"with track({arguments}) as log:\n    log({step}, {{'train/loss': 2.0}})"
    done = subprocess.run([sys.executable, "-c", IMPORT + code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_offline_writes_a_run_regardless_of_the_environment(tmp_path):
    assert os.environ["WANDB_MODE"] == "disabled"
    run_offline(tmp_path, 5)
    [file] = tmp_path.rglob("*.wandb")  # complete only after the process has ended
    assert b"train/loss" in file.read_bytes()
    assert b"rank" in file.read_bytes()


def test_a_resumed_training_continues_the_run_with_its_id(tmp_path):
    run_offline(tmp_path, 5)
    run_offline(tmp_path, 10)
    assert {file.stem for file in tmp_path.rglob("*.wandb")} == {"run-3d5a"}


def test_a_missing_login_or_network_is_a_warning_and_training_continues(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("steps.adapters.tracking.INIT_TIMEOUT", 3)
    with caplog.at_level(logging.WARNING), track(TrackingConfig("online"), "run", "id", {}, tmp_path / "wandb") as log:
        log(1, {"train/loss": 2.0})
    assert "the run is not tracked" in caplog.text


def test_a_tracker_that_fails_during_the_run_is_one_warning(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING), track(OFFLINE, "run", "id", {}, tmp_path / "wandb") as log:
        monkeypatch.setattr(wandb.run, "log", lambda *_, **__: 1 / 0)
        log(1, {"train/loss": 2.0})
        log(2, {"train/loss": 2.0})
        wandb.finish()
    assert caplog.text.count("wandb failed") == 1


def test_an_error_of_training_is_raised_and_the_wandb_run_is_finished(tmp_path):
    with pytest.raises(FloatingPointError), track(OFFLINE, "run", "id", {}, tmp_path / "wandb"):
        raise FloatingPointError
    assert wandb.run is None


def test_the_environment_is_not_changed(tmp_path):
    before = dict(os.environ)
    with track(OFFLINE, "run", "id", {}, tmp_path / "wandb"):
        pass
    assert {name for name in os.environ.keys() ^ before.keys() if not name.startswith("WANDB_SERVICE")} == set()
