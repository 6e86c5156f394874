"""`python run.py verify` and `sign`. Each case damages a copy, or restores what it damaged."""

import json
import re
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import yaml
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from deploy import bento
from deploy.kubernetes.render import PREFIX, annotations
from run import main
from tests.deploy.kube_api import TOKEN
from tests.helpers import build_bento, flip_bit

pytestmark = pytest.mark.timeout(900)


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Files of a private key, its public key, and another public key."""
    directory = tmp_path_factory.mktemp("keys")
    private, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    contents = {
        "private": private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "public": private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "other": other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return {name: directory / name for name in contents}


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return build_bento(base_dir, adapter_dir, run="run-verify")


@pytest.fixture
def signed(tag, base_dir, adapter_dir, tmp_path, keys):
    """A directory like one of outputs/, with a Bento in the store, but without a run in ZenML's."""
    directory, lineage = tmp_path / "run", bento.lineage(tag)
    copytree(base_dir, directory / "base")
    copytree(adapter_dir, directory / "adapter")
    (directory / "lineage.json").write_text(json.dumps(lineage.to_json()))
    split = {part: {"sha256": digest, "records": 1} for part, digest in lineage.data.items()}
    (directory / "split.json").write_text(json.dumps(split))
    result = invoke("sign", directory, "--key", keys["private"])
    assert result.exit_code == 0, result.output
    return directory


def test_a_run_is_verified_back_to_the_records(dev_run):
    result = invoke("verify", dev_run.directory)
    assert result.exit_code == 0, result.output
    for checked in ("adapter: ", "base: ", "code and lineage of the Bento", "train records: sha256"):
        assert checked in result.output
    assert "not checked" not in result.output


def test_what_cannot_be_checked_is_said(signed, keys):
    result = invoke("verify", signed, "--key", keys["public"])
    assert result.exit_code == 0, result.output
    assert "signature of the lineage: valid" in result.output
    assert "not checked: the records of run run-verify" in result.output


@pytest.mark.parametrize("file", ["adapter/adapter.safetensors", "base/model.safetensors", "base/config.json"])
def test_a_flipped_bit_of_the_weights_is_found(signed, file):
    flip_bit(signed / file)
    result = invoke("verify", signed)
    assert result.exit_code == 1
    assert "damaged or was changed" in result.output


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("{}")], ids=["missing", "empty"])
@pytest.mark.parametrize("name", ["split.json", "lineage.json", "base.json"])
def test_a_damaged_file_of_a_run_is_an_error_of_one_line(signed, tag, name, damage):
    rmtree(signed / "base")
    (signed / "base.json").write_text(json.dumps(bento.lineage(tag).base.to_json()))
    damage(signed / name)
    result = invoke("verify", signed)
    assert result.exit_code == 1
    assert re.fullmatch(rf"Error: .*{name}.*\n", result.output)


def test_a_changed_lineage_or_another_key_fails_the_signature(signed, keys):
    assert "not signed with the key" in invoke("verify", signed, "--key", keys["other"]).output
    lineage = json.loads((signed / "lineage.json").read_text())
    (signed / "lineage.json").write_text(json.dumps(lineage | {"bento": "", "model_version": "gpt2-instruct/999"}))
    assert "signs another lineage" in invoke("verify", signed, "--key", keys["public"]).output


def test_a_bento_is_verified_with_the_signature_of_a_cached_rerun(signed, tag, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    (tmp_path / "latest").symlink_to("run")  # the rerun; the Bento is of run-verify
    (signed / "bento.txt").write_text(tag + "\n")
    result = invoke("verify", tag, "--key", keys["public"])
    assert result.exit_code == 0, result.output
    assert "signature of the lineage: valid" in result.output
    assert "is not signed with the key" in invoke("verify", tag, "--key", keys["other"]).output


def test_a_bento_without_a_signature_names_the_directory_to_sign(signed, tag, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    (signed / "bento.txt").write_text(tag + "\n")
    (signed / "lineage.sig.json").unlink()
    result = invoke("verify", tag, "--key", keys["public"])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert f"`python run.py sign {signed} --key KEY` signs it" in result.output


@pytest.mark.parametrize(
    "added", ['"approved_by": "x"', '"adapter": {"sha256": "forged"}', '"run": {"x": 1}', '"model_version": "gpt2/9"']
)
def test_a_value_that_the_signature_does_not_cover_is_found(signed, tag, keys, added):
    for name, file in (
        (signed, signed / "lineage.json"),
        (tag, bento.bentoml_home() / "bentos" / tag.replace(":", "/") / "src" / "lineage.json"),
    ):
        before = file.read_text()
        try:
            file.write_text(before.replace("{", f"{{{added},", 1))
            result = invoke("verify", name, "--key", keys["public"])
        finally:
            file.write_text(before)
        assert (result.exit_code, result.output.count("\n")) == (1, 1)
        assert "lineage.json" in result.output
        assert re.search("approved_by is not as this version|the key '.*' is repeated", result.output)


def test_a_nested_value_that_the_signature_does_not_cover_is_found(signed, keys):
    lineage = json.loads((signed / "lineage.json").read_text())
    lineage["run"]["approved_by"] = "x"
    (signed / "lineage.json").write_text(json.dumps(lineage))
    assert "run.approved_by is not as" in invoke("verify", signed, "--key", keys["public"]).output


@pytest.mark.parametrize("file", ["src/bentos/service.py", "src/lineage.json", "src/gpt2core/model.py"])
def test_changed_code_or_lineage_of_a_bento_is_found(tag, file):
    path = bento.bentoml_home() / "bentos" / tag.replace(":", "/") / file
    before = path.read_text()
    try:
        path.write_text(before.replace("gpt2", "gpt3"))
        result = invoke("verify", tag)
    finally:
        path.write_text(before)
    assert result.exit_code == 1
    assert "was changed" in result.output
    assert invoke("verify", tag).exit_code == 0


@pytest.fixture
def pod(tag, cluster, monkeypatch):
    """Give the test double of the cluster a pod with these annotations; returns its name."""
    monkeypatch.setenv("KUBECONFIG", cluster.values[1].rpartition("=")[2])
    cluster.api.namespaces.setdefault("gpt2-instruct", {})

    def add(changed):
        stated = annotations(bento.lineage(tag)) | {PREFIX + name: value for name, value in changed.items()}
        metadata = {"name": "served-1", "namespace": "gpt2-instruct", "annotations": stated}
        body = yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": metadata}).encode()
        status, _ = cluster.api.handle(
            "PATCH",
            "/api/v1/namespaces/gpt2-instruct/pods/served-1?fieldManager=test&force=true",
            {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/apply-patch+yaml"},
            body,
        )
        assert status in (200, 201)
        return "served-1"

    yield add
    cluster.api.objects.pop(("pods", "served-1"), None)


def test_a_pod_is_verified_with_the_bento_of_its_annotations(pod, tag):
    result = invoke("verify", pod({}))
    assert result.exit_code == 0, result.output
    for checked in (
        f"code and lineage of the Bento: {tag}",
        "base of the Bento: ",
        f"annotation {PREFIX}base-sha256: ",
    ):
        assert checked in result.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base-sha256": "f" * 64}, "annotation .*base-sha256: .* was changed"),
        ({"bento": "gpt2-instruct:0000000000000000"}, "the Bento gpt2-instruct:0000000000000000 is not in the store"),
        ({"bento": ""}, "pod served-1 has no annotation .*bento"),
    ],
)
def test_a_pod_that_states_something_else_is_an_error_in_one_line(pod, changed, message):
    result = invoke("verify", pod(changed))
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert re.search(message, result.output)


def test_a_pod_that_does_not_exist_is_an_error_in_one_line(pod):
    result = invoke("verify", "served-2")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "or a pod in the namespace gpt2-instruct" in result.output


def test_an_unknown_name_is_an_error_in_one_line():
    result = invoke("verify", "gpt2-instruct:0000")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
