"""The benchmarks at the smallest size: they run, and write what they should. No test asserts a time."""

import json
import logging
import sys
from subprocess import run

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, growth
from benchmarks.engines import CTranslate2, LlamaCpp, OpenVino, find_version, make_gguf
from benchmarks.measure import interleave, make_row
from benchmarks.peer import Trainer
from benchmarks.run import main, render_table
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.generate import generate

TINY = ["--model", "gpt2-nano", "--medium", "gpt2-nano", "--runs", "1", "--new-tokens", "4", "--train-steps", "1"]
TINY += ["--config", "configs/dev.yaml"]
pytestmark = pytest.mark.timeout(1800)  # a busy machine takes several times as long
KEYS = {"name", "ours", "peer", "ratio", "unit", "runs", "spread", "limit", "share_of_limit", "command"}


SLOW = [pytest.param(group, marks=pytest.mark.slow) for group in ("engines", "serve", "pipeline")]


@pytest.mark.parametrize("group", ["train", "decode", "adapters", "memory", *SLOW])
def test_a_group_writes_its_rows_and_the_page(group, tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--only", group, *TINY, "--out", str(tmp_path)]
    done = run(command, capture_output=True, text=True)  # a subprocess, because `serve` uses its own BentoML store
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "benchmarks" / "results" / "latest.json").read_text())
    assert result["rows"]
    assert result["machine"]["threads"] >= 1
    page = (tmp_path / "docs" / "performance.md").read_text()
    for row in result["rows"]:
        assert row.keys() >= KEYS
        assert row["ours"] > 0 or row["unit"] == "%"
        assert row["name"] in page
        assert row["name"] in done.stdout


def test_the_peer_trains_without_dropout_as_our_side_does(base_dir):
    trainer = Trainer(base_dir, torch.float32)
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("package", "start"),
    [
        ("llama-cpp-python", lambda base: LlamaCpp(make_gguf(base, "f32"), 3, 2)),
        ("ctranslate2", lambda base: CTranslate2(base, "float32", 2)),
        ("openvino-genai", lambda base: OpenVino(base, "f32", 1, 2)),
        ("openvino-genai", lambda base: OpenVino(base, "f32", 3, 2)),
    ],
)
def test_the_engines_of_others_generate_our_tokens(base_dir, package, start):
    if find_version(package) is None:  # importing OpenVINO here would send usage data
        pytest.skip(f"`make bench` installs {package}")
    model = load_pretrained(base_dir)
    ids = torch.randint(model.config.token_count, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[0][:3], ids[1][:5], ids[2]]  # CTranslate2 repeats the others if one has a single token
    engine = start(base_dir)
    assert engine.generate(prompts, 6) == generate(model, prompts, GenerationConfig(max_new_tokens=6))


@pytest.mark.slow
def test_growth_writes_its_curves_page_and_plot(tmp_path):
    options = ["--model", "gpt2-nano", "--sizes", "gpt2-nano", "--most", "4", "--out", str(tmp_path)]
    done = CliRunner().invoke(growth.main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    curves = json.loads((tmp_path / "benchmarks" / "results" / "growth.json").read_text())["curves"]
    assert len({curve["x"] for curve in curves}) == 6
    assert all(rate > 0 for curve in curves for _, rate in curve["points"])
    page = (tmp_path / "docs" / "growth.md").read_text()
    assert all(curve["name"] in page for curve in curves)
    assert (tmp_path / "docs" / "growth.svg").read_text().lstrip().startswith("<?xml")


def test_an_interrupted_growth_run_keeps_its_finished_curves(tmp_path, monkeypatch):
    def measure(*arguments):
        yield growth._curve("finetuning", "batch", [(1, 1234.0), (2, 1500.0)])
        raise KeyboardInterrupt

    monkeypatch.setattr(growth, "measure", measure)
    done = CliRunner().invoke(growth.main, ["--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "batch 1: 1,234 tokens/s" in done.stdout
    (curve,) = json.loads((tmp_path / "benchmarks" / "results" / "growth.json").read_text())["curves"]
    assert curve["points"] == [[1, 1234.0], [2, 1500.0]]
    assert "| 2 | 1,500 |" in (tmp_path / "docs" / "growth.md").read_text()


@pytest.mark.slow
def test_a_dry_run_of_gpu_check_passes_every_stage_and_writes_its_figures(tmp_path):
    out = tmp_path / "gpu.json"
    done = run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    result = json.loads(out.read_text())
    assert [stage["stage"] for stage in result["stages"]] == list(gpu.STAGES)
    assert result.keys() >= {"date", "command", "device", "versions"}
    for stage in result["stages"]:
        assert stage["status"] == "ok"
        assert stage["figures"]
    assert result["stages"][0]["figures"]["passed"] >= 30
    figures = {stage["stage"]: stage["figures"] for stage in result["stages"]}
    assert figures["profile"]["training"]["top"]
    assert figures["launches"]["gpt2-nano.compiled.kernels"] > 0


def test_launches_are_timed_before_the_first_profile(tmp_path, monkeypatch):
    stage, calls = gpu.Stage("cpu", tmp_path, tmp_path / "figures.json"), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "_record_times", lambda stage, name, step: calls.append(name) or 1.0)
    monkeypatch.setattr(
        gpu, "_profile", lambda *_: calls.append("profile") or {"seconds": 1.0, "busy_share": 1.0, "calls": 1}
    )
    gpu.launches(stage)
    assert calls == ["gpt2-nano.eager", "gpt2-nano.compiled", "profile", "profile"]
    assert not stage.failed


def test_a_stage_that_exceeds_its_limit_is_ended_and_keeps_its_figures(tmp_path):
    (tmp_path / "training.json").write_text('{"seconds": 1.0}')
    entry = gpu._run_stage("training", "cpu", tmp_path, limit=0.1)
    assert entry["status"] == "timeout"
    assert entry["figures"] == {"seconds": 1.0}


def test_a_failed_measurement_fails_its_stage_after_the_others_and_a_lack_of_memory_does_not(tmp_path):
    def work(n):
        if n > 32:
            raise MemoryError("not enough memory")
        return "done"

    stage = gpu.Stage("cpu", tmp_path, tmp_path / "figures.json")
    with stage.attempt("a"):
        work(64)
    assert not stage.failed
    with stage.attempt("b"):
        raise ValueError("two\nlines")
    with stage.attempt("c"):
        stage.record(c=gpu._largest(128, work))
    assert stage.failed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == {"a.error": "not enough memory", "b.error": "two lines", "c": [32, "done"]}


def test_a_warning_such_as_a_failed_capture_is_a_figure_of_its_stage(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "gpt2core.x")  # the tests of ZenML raise the level of all loggers
    logger, stage = logging.getLogger("gpt2core.x"), gpu.Stage("cpu", tmp_path, tmp_path / "figures.json")
    handler = gpu.RecordWarnings(stage)
    logger.addHandler(handler)
    try:
        logger.warning("no graph: %s", "why")
        logger.info("not recorded")
    finally:
        logger.removeHandler(handler)
    assert json.loads((tmp_path / "figures.json").read_text()) == {"warnings": ["gpt2core.x: no graph: why"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_check_without_a_gpu_exits_with_2_and_a_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    assert exit_.value.code == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_an_unknown_group_is_rejected_with_the_known_ones():
    done = CliRunner().invoke(main, ["--only", "trian"])
    assert done.exit_code == 2
    assert "trian" in done.output
    assert "decode" in done.output


def test_sides_run_alternately_and_the_warm_up_is_not_counted():
    seen = []

    def side(name):
        return lambda run: seen.append((name, run)) or float(run)

    values = interleave({"a": side("a"), "b": side("b")}, 2)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert values == {"a": [1.0, 2.0], "b": [1.0, 2.0]}


def test_the_ratio_is_how_many_times_better_our_side_is():
    assert make_row("speed", "tokens/s", [1.0, 4.0, 8.0], [2.0], "").ratio == 2
    assert make_row("memory", "MiB", [4.0], [2.0], "", less_is_better=True).ratio == 0.5
    assert make_row("alone", "ms", [4.0], None, "").ratio is None


def test_the_table_shows_a_dash_for_a_missing_value():
    row = make_row("alone", "ms", [4.0], None, "").as_json()
    assert "| alone | 4    | –    | –     | ms" in render_table([row])
