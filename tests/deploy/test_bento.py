"""Building, looking up and exporting Bentos. Serving them is test_server.py's."""

import json
import os
import tarfile
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import yaml

from deploy import bento
from deploy.bento import BentoError
from tests.helpers import make_lineage

LINEAGE = make_lineage()


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return bento.build(base_dir, adapter_dir, LINEAGE)


def in_store(tag: str) -> Path:
    name, version = tag.split(":")
    return Path(os.environ["BENTOML_HOME"]) / "bentos" / name / version


def files_of(tag: str) -> set[str]:
    source = in_store(tag) / "src"
    return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}


def test_a_bento_holds_the_serving_code_and_its_lineage_and_nothing_else(tag):
    files = files_of(tag)
    assert {"bentos/service.py", "bentos/requirements.txt", "gpt2core/model.py", "lineage.json"} <= files
    others = {name for name in files if not name.startswith(("bentos/", "gpt2core/"))}
    assert others - {"bentofile.yaml"} == {"lineage.json", *bento.PROXY_FILES}
    assert not [name for name in files if "demo" in name or "__pycache__" in name]


def test_a_bento_names_its_models_by_exact_tags(tag):
    [service] = yaml.safe_load((in_store(tag) / "bento.yaml").read_text())["services"]
    models = [model["tag"] for model in service["models"]]
    assert sorted(model.split(":")[0] for model in models) == ["gpt2-instruct-adapter", "gpt2-instruct-base"]
    assert all(len(model.split(":")[1]) == 16 for model in models)


def test_the_requirements_of_a_bento_pin_torch(tag):
    assert (in_store(tag) / "env" / "python" / "requirements.txt").read_text().count("torch==") == 1


def test_every_user_may_read_the_models(tag):
    for name in ("base", "adapter"):
        folder = Path(os.environ["BENTOML_HOME"]) / "models" / f"gpt2-instruct-{name}"
        assert all(path.stat().st_mode & 0o005 for path in folder.glob("*/"))


def test_equal_content_is_built_once(tag, base_dir, adapter_dir):
    before = (in_store(tag) / "bento.yaml").stat().st_mtime_ns
    assert bento.build(base_dir, adapter_dir, LINEAGE) == tag
    assert (in_store(tag) / "bento.yaml").stat().st_mtime_ns == before


def test_another_lineage_or_adapter_gives_another_bento(tag, base_dir, adapter_dir, tmp_path):
    other = bento.build(base_dir, adapter_dir, make_lineage("run-18"))
    changed = Path(copytree(adapter_dir, tmp_path / "adapter"))
    (changed / "notes.txt").write_text("changed")
    assert len({tag, other, bento.build(base_dir, changed, LINEAGE)}) == 3


def test_a_bento_exists_while_it_and_its_models_are_in_the_store(base_dir, adapter_dir):
    assert not bento.exists("gpt2-instruct:0000000000000000")
    tag = bento.build(base_dir, adapter_dir, make_lineage("removed"))
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


def test_an_adapter_is_described_by_its_digest_and_lora_configuration(adapter_dir):
    about = bento.describe_adapter(adapter_dir)
    assert len(about.sha256) == 64
    assert about.rank == 4
    assert about.targets == ["q", "v"]


def test_the_lineage_of_a_bento_names_the_bento(tag):
    assert bento.lineage(tag) == make_lineage(bento=tag)
    assert json.loads((in_store(tag) / "src" / "lineage.json").read_text()) == bento.lineage(tag).to_json()


def test_the_lineage_of_a_missing_bento_is_an_error():
    with pytest.raises(BentoError, match="gpt2-instruct:none is not in the store"):
        bento.lineage("gpt2-instruct:none")


def test_an_export_is_a_tar_archive_with_the_models(tag, tmp_path):
    file = tmp_path / "bento.tar"
    bento.export(tag, file)
    with tarfile.open(file) as archive:
        names = archive.getnames()
    assert [name for name in names if name.endswith("src/lineage.json")]
    assert [name for name in names if "gpt2-instruct-adapter" in name]


def test_an_export_of_a_missing_bento_is_an_error_with_the_log(tmp_path):
    with pytest.raises(BentoError, match=r"(?s)bentoml export failed.*gpt2-instruct:none"):
        bento.export("gpt2-instruct:none", tmp_path / "bento.tar")
