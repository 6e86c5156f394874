"""`python run.py ask` with a run in outputs/."""

import json
import subprocess
import sys
from shutil import copytree

import pytest
from click.testing import CliRunner

from deploy.bento import describe_adapter
from gpt2core.checkpoint import export_peft, load_adapter, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.evaluate import answer_text
from gpt2core.files import checkpoint_files, directory_sha256
from gpt2core.generate import generate
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import BaseRef
from run import main
from steps.adapters.base import write_base
from tests.copies import ROOT
from tests.helpers import make_lineage


@pytest.fixture(autouse=True)
def outputs(tmp_path, base_dir, adapter_dir, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    base = copytree(base_dir, tmp_path / "latest" / "base")
    write_base(base, BaseRef("gpt2-nano", "", directory_sha256(base, checkpoint_files(base))), {})
    copytree(adapter_dir, tmp_path / "latest" / "adapter")
    lineage = make_lineage(adapter=describe_adapter(adapter_dir))
    (tmp_path / "latest" / "lineage.json").write_text(json.dumps(lineage.to_json()))
    return tmp_path


def run(*words: str):
    return CliRunner().invoke(main, ["ask", *words])


def expected(base_dir, adapter_dir, question: dict[str, str], **sampling) -> str:
    """The answer with an adapter that is not merged."""
    tokenizer = load_tokenizer(base_dir)
    config = GenerationConfig(eos_id=tokenizer.eot_token, **sampling)
    prompt = tokenizer.encode_ordinary(format_prompt(question["instruction"], question.get("input", "")))
    [reply] = generate(load_adapter(load_pretrained(base_dir), adapter_dir), [prompt], config)
    return answer_text(reply, tokenizer)


SAMPLING = {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 3, "max_new_tokens": 9}


@pytest.mark.parametrize("sampling", [{}, SAMPLING])
def test_an_instruction_gets_the_answer_of_the_tuned_model(base_dir, adapter_dir, sampling):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    done = run("Name a river.", "--input", "Europe", *options)
    wanted = expected(base_dir, adapter_dir, {"instruction": "Name a river.", "input": "Europe"}, **sampling)
    assert done.exit_code == 0, done.output
    assert done.stdout == wanted + "\n"
    assert wanted


def test_a_file_is_answered_line_by_line_in_order(base_dir, adapter_dir, tmp_path):
    questions = [{"instruction": f"Say {i}, ‘é’.", **({"input": "twice"} if i % 2 else {})} for i in range(70)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    done = run("--file", str(file), "--max-new-tokens", "4")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{name: text for name, text in line.items() if name != "answer"} for line in lines] == questions
    for i in (0, 1, 69):
        assert lines[i]["answer"] == expected(base_dir, adapter_dir, questions[i], max_new_tokens=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "pass either INSTRUCTION or --file"),
        (["Hello", "--file", "x"], "pass either INSTRUCTION or --file"),
        (["--file", "x", "--input", "y"], "--input goes with INSTRUCTION"),
        ([" "], "'instruction' is empty"),
        (["word " * 200], "n_positions is 128"),
        (["Hello", "--run", "elsewhere"], "is not the directory of a finished run"),
        (["Hello", "--temperature", "-1"], "temperature is -1.0"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_an_error_is_one_line_with_the_cause(words, message):
    done = run(*words)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("{}", "has no 'run'")])
def test_a_damaged_lineage_is_named(outputs, content, message):
    (outputs / "latest" / "lineage.json").write_text(content)
    done = run("Name a river.")
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: {outputs}/latest/lineage.json is")
    assert message in done.output


def test_a_reader_that_ends_early_is_no_error():
    command = [sys.executable, "run.py", "ask", "Name a river."]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_another_adapter_answers_and_one_of_another_base_must_be_accepted(base_dir, adapter_dir, tmp_path, outputs):
    other = tmp_path / "peft"
    export_peft(load_adapter(load_pretrained(base_dir), adapter_dir), other)
    done = run("Name a river.", "--adapter", str(other))
    assert done.stdout == expected(base_dir, adapter_dir, {"instruction": "Name a river."}) + "\n"
    file = copytree(adapter_dir, tmp_path / "foreign") / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": {"name": "gpt2", "sha256": "f" * 64}}))
    refused = run("Name a river.", "--adapter", str(file.parent))
    assert refused.exit_code == 1
    assert "f" * 64 in refused.output
    assert run("Name a river.", "--adapter", str(file.parent), "--accept-other-base").stdout == done.stdout


def test_a_question_that_is_too_long_is_reported_before_the_first_answer(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"instruction": "short"}\n' * 40 + json.dumps({"instruction": "long " * 200}) + "\n")
    done = run("--file", str(file))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "record 41 (line 41): prompt has" in done.stderr


def test_a_damaged_reference_to_the_base_is_named(outputs):
    file = outputs / "latest" / "base" / "base.json"
    file.write_text("{")
    done = run("Name a river.")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{file} is not valid JSON" in done.stderr


def test_an_adapter_that_changed_after_the_run_is_refused(outputs):
    file = outputs / "latest" / "adapter" / "adapter.json"
    content = json.loads(file.read_text())
    content["lora"]["alpha"] *= 2
    file.write_text(json.dumps(content))
    done = run("Name a river.")
    assert done.exit_code == 1
    assert "it changed after the run" in done.output
    assert run("Name a river.", "--adapter", str(file.parent)).exit_code == 0
