"""Building, looking up and exporting Bentos. Serving them is test_server.py's."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import yaml

from deploy import bento, source
from deploy.bento import BentoError
from tests.copies import copy_project
from tests.helpers import build_bento


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return build_bento(base_dir, adapter_dir)


def in_store(tag: str) -> Path:
    name, version = tag.split(":")
    return Path(os.environ["BENTOML_HOME"]) / "bentos" / name / version


def files_of(tag: str) -> set[str]:
    source = in_store(tag) / "src"
    return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}


PROXY_FILES = ("deploy/__init__.py", "deploy/containers/__init__.py", "deploy/containers/proxy.py")


def test_a_bento_holds_the_serving_code_and_its_lineage_and_nothing_else(tag):
    files = files_of(tag)
    assert {"bentos/service.py", "bentos/requirements.txt", "gpt2core/model.py", "lineage.json"} <= files
    others = {name for name in files if not name.startswith(("bentos/", "gpt2core/"))}
    assert others - {"bentofile.yaml"} == {"lineage.json", "README.md", *PROXY_FILES}
    assert (in_store(tag) / "README.md").read_text() == "# a model card\n"
    assert not [name for name in files if "demo" in name or "__pycache__" in name]


def test_other_files_of_the_checkout_do_not_reach_a_bento(tag, base_dir, adapter_dir, tmp_path, monkeypatch):
    checkout = copy_project(tmp_path / "checkout")
    for name in (".env", "key.pem", "local_settings.py", "service.py~", "page.html.orig", "middleware/id_rsa"):
        (checkout / "bentos" / name).write_text("a secret")
    (checkout / "gpt2core" / "inference" / "credentials.json").write_text("a secret")
    for module in (bento, source):
        monkeypatch.setattr(module, "ROOT", checkout)
    assert build_bento(base_dir, adapter_dir) == tag


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
    assert build_bento(base_dir, adapter_dir) == tag
    assert (in_store(tag) / "bento.yaml").stat().st_mtime_ns == before


def test_another_lineage_or_adapter_gives_another_bento(tag, base_dir, adapter_dir, tmp_path):
    other = build_bento(base_dir, adapter_dir, "run-18")
    changed = Path(copytree(adapter_dir, tmp_path / "adapter"))
    (changed / "notes.txt").write_text("changed")
    assert len({tag, other, build_bento(base_dir, changed)}) == 3


@pytest.mark.parametrize("changed", ["base", "adapter"])
def test_a_directory_that_differs_from_the_lineage_is_refused(base_dir, adapter_dir, tmp_path, changed):
    lineage = bento.lineage(build_bento(base_dir, adapter_dir))
    directories = {
        "base": Path(copytree(base_dir, tmp_path / "base")),
        "adapter": Path(copytree(adapter_dir, tmp_path / "adapter")),
    }
    [weights] = directories[changed].glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    recorded = {"base": lineage.base, "adapter": lineage.adapter}[changed].sha256
    with pytest.raises(BentoError, match=rf"{directories[changed]} .*sha256 \w{{64}} .*but {recorded}"):
        bento.build(directories["base"], directories["adapter"], lineage)


def test_files_of_a_base_that_are_not_read_may_differ(base_dir, adapter_dir, tmp_path):
    base = Path(copytree(base_dir, tmp_path / "base"))
    (base / "README.md").write_text("as in a repository of the hub")
    lineage = bento.lineage(build_bento(base_dir, adapter_dir))
    assert bento.exists(bento.build(base, adapter_dir, lineage))


def test_a_bento_exists_while_it_and_its_models_are_in_the_store(base_dir, adapter_dir):
    assert not bento.exists("gpt2-instruct:0000000000000000")
    tag = build_bento(base_dir, adapter_dir, "removed")
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


def test_a_damaged_bento_or_model_is_noticed_and_stored_again(tag, base_dir, adapter_dir):
    models = bento.models(tag).values()
    for file in (in_store(tag) / "src" / "gpt2core" / "model.py", *(path / bento_file(path) for path in models)):
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        assert bento.exists(tag)
        assert not bento.is_intact(tag)
        assert build_bento(base_dir, adapter_dir) == tag
        assert bento.is_intact(tag)


def bento_file(model: Path) -> str:
    [weights] = model.glob("*.safetensors")
    return weights.name


def test_an_adapter_is_described_by_its_digest_and_lora_configuration(adapter_dir):
    about = bento.describe_adapter(adapter_dir)
    assert len(about.sha256) == 64
    assert about.rank == 4
    assert about.targets == ["q", "v"]


def test_the_lineage_of_a_bento_names_the_bento(tag):
    assert bento.lineage(tag).bento == tag
    assert bento.lineage(tag).run.id == "run-17"
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


def test_the_output_of_bentoml_is_utf_8_in_every_locale(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    monkeypatch.setenv("PYTHONUTF8", "0")
    command = [sys.executable, "-c", "import sys; print(sys.stdout.encoding, sys.flags.utf8_mode)"]
    done = subprocess.run(command, env=bento.bentoml_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["utf-8", "1"]


def test_a_relative_bentoml_home_is_the_same_directory_for_child_processes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", "store")
    assert bento.bentoml_environment()["BENTOML_HOME"] == str(tmp_path / "store")


@pytest.mark.parametrize("name", ["BENTOML_CONFIG", "BENTOML_CONFIG_OPTIONS"])
def test_the_configuration_of_another_service_does_not_reach_child_processes(monkeypatch, name):
    monkeypatch.setenv(name, "other.yaml")
    assert name not in bento.bentoml_environment()


def test_a_full_disk_in_bentoml_names_the_store_and_the_free_bytes_in_short_lines(monkeypatch, tmp_path):
    code = "import sys; sys.exit('[Errno 28] No space left on device' + 'x' * 100_000)"
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    monkeypatch.setattr(bento, "bentoml_command", lambda verb: [sys.executable, "-c", code])
    with pytest.raises(BentoError, match=r"bentoml export failed; \S+ has [\d,]+ bytes free") as raised:
        bento.export("gpt2-instruct:1", tmp_path / "out.tar")
    assert str(bento.bentoml_home()) in str(raised.value)
    assert len(str(raised.value)) < 2000
