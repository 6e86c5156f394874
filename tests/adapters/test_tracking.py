import logging
import os
import signal
import subprocess
import sys

import pytest
import wandb

from gpt2core.metrics import Scores
from gpt2core.types import Evaluation, TrainSummary
from steps.adapters.tracking import track, track_results
from steps.config import TrackingConfig
from tests.helpers import make_sample
from tests.wandb_file import config, read_records, rows, summary

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


TRAIN = """
import os, signal
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.train import finetune

examples = [Example([1, 2, 3, 4 + i], 2) for i in range(4)]
model = add_lora(load_pretrained({base!r}), LoraConfig(rank=1), seed=0)
config = TrainConfig(epochs=6, batch_size=2, log_every_steps=1, checkpoint_every_epochs=2)  # 12 steps
with track(TrackingConfig("offline"), "run", "3d5a", {{"lora": {{"rank": 8}}}}, pathlib.Path({directory!r})) as log:
    def log_until(step, values):
        log(step, values)
        if step == {kill_at} and "val/loss" in values:
            os.kill(os.getpid(), signal.SIGKILL)
    finetune(model, examples, examples[:1], config, log_until, {checkpoints!r})
"""


def train_offline(base_dir, directory, kill_at: int):
    """A tracked training in a process of its own, killed after the validation of step `kill_at`."""
    places = {"base": str(base_dir), "directory": str(directory), "checkpoints": str(directory / "checkpoints")}
    code = IMPORT + TRAIN.format(kill_at=kill_at, **places)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_offline_files_have_every_step_once_after_a_kill(base_dir, tmp_path):
    assert os.environ["WANDB_MODE"] == "disabled"  # the configuration decides, not the environment
    assert train_offline(base_dir, tmp_path, kill_at=10).returncode == -signal.SIGKILL
    done = train_offline(base_dir, tmp_path, kill_at=0)
    assert (done.returncode, done.stderr) == (0, "")
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.stem == "run-3d5a"
    logged = rows(file)
    assert [row["_step"] for row in logged] == list(range(1, 13))
    assert [row["_step"] for row in logged if "val/loss" in row] == [2, 4, 6, 8, 10, 12]
    assert all({"train/loss", "system/cpu_utilization", "system/memory_mib"} <= row.keys() for row in logged)
    assert config(file)["lora"] == {"rank": 8}
    kinds = {record.WhichOneof("record_type") for record in read_records(file)}
    assert {"stats", "exit"} <= kinds  # system statistics; finished


def test_results_are_added_to_the_run_of_the_training(tmp_path):
    scores = Scores(0.5, 0.5, 0.5, 2.0, 1.0)
    sample = make_sample("Say 1.", output="1", base="base's", tuned="1")
    evaluation = Evaluation(scores, scores, {}, TrainSummary(1.0, 1.0, 9.0, 9.0))
    place = ("run", "3d5a", [sample], evaluation, "store/report.html", 12, tmp_path)
    track_results(TrackingConfig(), *place)
    assert list(tmp_path.iterdir()) == []
    track_results(OFFLINE, *place)
    wandb.teardown()  # the file is complete when wandb's service has ended
    [file] = tmp_path.glob("wandb/offline-run-*/run-3d5a.wandb")
    found = summary(file)
    assert found["report"] == "store/report.html"
    assert found["tuned"]["exact_match"] == 0.5
    [row] = rows(file)
    assert row["_step"] == 13
    table = (file.parent / "files" / row["samples/path"]).read_text()
    assert "Say 1." in table


def test_a_missing_login_or_network_is_a_warning_and_training_continues(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("steps.adapters.tracking.INIT_TIMEOUT", 3)
    with caplog.at_level(logging.WARNING), track(TrackingConfig("online"), "run", "id", {}, tmp_path / "wandb") as log:
        log(1, {"train/loss": 2.0})
    assert "the run is not tracked" in caplog.text


def test_in_a_terminal_a_missing_login_is_a_warning_and_not_a_question(tmp_path):
    code = (
        "with track(TrackingConfig('online'), 'run', 'id', {}, pathlib.Path('wandb')) as log: log(1, {})\n"
        "print('trained')"
    )
    terminal, own = os.openpty()
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environ |= {"HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    try:
        done = subprocess.run(
            [sys.executable, "-c", IMPORT + code],
            stdin=own,
            stdout=own,
            stderr=own,
            cwd=tmp_path,
            env=environ,
            timeout=120,
        )
        assert done.returncode == 0
        assert b"trained" in os.read(terminal, 65536)
    finally:
        os.close(own)
        os.close(terminal)


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
