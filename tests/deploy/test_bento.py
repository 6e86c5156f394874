"""Building, serving and asking Bentos. What they answer is tests/test_service.py's."""

import json
import os
import subprocess
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import requests
import yaml

from deploy import bento
from deploy.bento import BentoError

LINEAGE = {"run": {"id": "7", "name": "run-7"}}


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return bento.build(base_dir, adapter_dir, LINEAGE)


@pytest.fixture(scope="module")
def metrics_of_another(tag):
    """What a server that runs already has in the store."""
    file = Path(os.environ["BENTOML_HOME"]) / "prometheus_multiproc_dir" / "counter_1.db"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"running")
    return file


@pytest.fixture(scope="module")
def url(tag, metrics_of_another):
    with bento.serve(tag) as url:
        yield url


def in_store(tag: str) -> Path:
    name, version = tag.split(":")
    return Path(os.environ["BENTOML_HOME"]) / "bentos" / name / version


def files_of(tag: str) -> set[str]:
    source = in_store(tag) / "src"
    return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}


def test_a_bento_holds_the_serving_code_its_requirements_and_its_lineage_and_no_more(tag):
    rooms = {name.split("/")[0] for name in files_of(tag)}
    assert {"bentos/service.py", "bentos/requirements.txt", "gpt2core/model.py", "lineage.json"} <= files_of(tag)
    assert rooms <= {"bentos", "gpt2core", "lineage.json", "bentofile.yaml"}
    assert not [name for name in files_of(tag) if "demo" in name or "__pycache__" in name]


def test_it_names_its_models_by_exact_tags_that_their_content_gives(tag):
    [service] = yaml.safe_load((in_store(tag) / "bento.yaml").read_text())["services"]
    models = [model["tag"] for model in service["models"]]
    assert sorted(model.split(":")[0] for model in models) == ["gpt2-instruct-adapter", "gpt2-instruct-base"]
    assert all(len(model.split(":")[1]) == 16 for model in models)


def test_its_requirements_are_the_ones_tested(tag):
    assert (in_store(tag) / "env" / "python" / "requirements.txt").read_text().count("torch==") == 1


def test_another_user_may_read_its_models(tag):
    for name in ("base", "adapter"):
        folder = Path(os.environ["BENTOML_HOME"]) / "models" / f"gpt2-instruct-{name}"
        assert all(path.stat().st_mode & 0o005 for path in folder.glob("*/"))


def test_the_same_content_is_the_same_bento_and_is_not_built_again(tag, base_dir, adapter_dir):
    before = (in_store(tag) / "bento.yaml").stat().st_mtime_ns
    assert bento.build(base_dir, adapter_dir, LINEAGE) == tag
    assert (in_store(tag) / "bento.yaml").stat().st_mtime_ns == before


def test_another_lineage_or_adapter_is_another_bento(tag, base_dir, adapter_dir, tmp_path):
    other = bento.build(base_dir, adapter_dir, {"run": {"id": "8"}})
    changed = Path(copytree(adapter_dir, tmp_path / "adapter"))
    (changed / "notes.txt").write_text("changed")
    assert len({tag, other, bento.build(base_dir, changed, LINEAGE)}) == 3


def test_a_bento_exists_until_it_or_one_of_its_models_is_gone(base_dir, adapter_dir):
    assert not bento.exists("gpt2-instruct:0000000000000000")
    tag = bento.build(base_dir, adapter_dir, {"run": {"id": "gone"}})
    assert bento.exists(tag)
    models = Path(os.environ["BENTOML_HOME"]) / "models" / "gpt2-instruct-adapter"
    hidden = models.with_name("hidden")
    models.rename(hidden)
    try:
        assert not bento.exists(tag)
    finally:
        hidden.rename(models)
    rmtree(in_store(tag))
    assert not bento.exists(tag)


def test_an_adapter_is_described_by_its_digest_and_its_lora_config(adapter_dir):
    about = bento.describe_adapter(adapter_dir)
    assert len(about["sha256"]) == 64
    assert about["rank"] == 4
    assert about["targets"] == ["q", "v"]


def test_smoke_returns_the_answers_that_were_expected(tag, url):
    answer = bento.ask(url, "Hello.", "", 5)
    assert bento.smoke(tag, [{"instruction": "Hello.", "input": "", "tuned": answer}], 5) == [answer]


def test_smoke_refuses_an_answer_that_is_not_the_models_and_leaves_no_process(tag):
    row = {"instruction": "Hello.", "input": "", "tuned": "something else"}
    before = servers()
    with pytest.raises(BentoError, match=r"(?s)to 'Hello\.'.*answered 'something else'"):
        bento.smoke(tag, [row], 5)
    assert servers() == before


def servers() -> list[str]:
    """The command lines of the servers that run."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "bentoml" in line]


def test_an_error_of_the_service_is_passed_on(url):
    with pytest.raises(BentoError, match=r"400.*max_new_tokens"):
        bento.ask(url, "Hello.", "", 10_000)


def test_a_server_leaves_the_metrics_of_another_alone(url, metrics_of_another):
    assert metrics_of_another.read_bytes() == b"running"


def test_a_server_that_cannot_start_is_an_error_with_its_log(base_dir, adapter_dir):
    tag = bento.build(base_dir, adapter_dir, {"run": {"id": "broken"}})
    (in_store(tag) / "src" / "lineage.json").write_text("{")
    with pytest.raises(BentoError, match=r"(?s)exit code.*JSONDecodeError"), bento.serve(tag):
        pass


def test_the_served_code_is_the_bentos_own(tag, base_dir, adapter_dir):
    other = bento.build(base_dir, adapter_dir, {"run": {"id": "own code"}})
    file = in_store(other) / "src" / "bentos" / "metadata.py"
    file.chmod(0o644)
    theirs = file.read_text().replace(
        "return JSONResponse(served(request).lineage.to_json())", 'return JSONResponse({"own": True})'
    )
    file.write_text(theirs)
    with bento.serve(other) as url:
        assert requests.get(f"{url}/metadata", timeout=10).json() == {"own": True}


def test_a_bento_that_is_not_there_is_an_error():
    with pytest.raises(BentoError, match="gpt2-instruct:none"), bento.serve("gpt2-instruct:none"):
        pass


def test_lineage_in_the_bento_names_the_bento(tag):
    assert json.loads((in_store(tag) / "src" / "lineage.json").read_text()) == LINEAGE | {"bento": tag}


@pytest.mark.parametrize(("agreement", "holds"), [(1.0, False), (0.5, True), (0.75, False)])
def test_a_check_may_let_some_answers_differ(agreement, holds):
    expected = [{"instruction": text, "input": "", "tuned": text} for text in "abcd"]

    def ask(instruction: str, input: str) -> str:
        return instruction if instruction in "ab" else "other"

    if holds:
        assert bento.check("tag", ask, expected, agreement) == ["a", "b", "other", "other"]
    else:
        with pytest.raises(BentoError, match=r"'other' to 'c'.*\(2 of 4 answers differ\)"):
            bento.check("tag", ask, expected, agreement)
