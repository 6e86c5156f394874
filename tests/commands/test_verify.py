"""`python run.py verify` and `sign` with a real run. Each case damages a copy, or restores what it damaged."""

import json
from pathlib import Path
from shutil import copytree

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from deploy import bento
from run import main

pytestmark = pytest.mark.timeout(900)


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Files of a private key, its public key, and another public key."""
    directory, private, other = tmp_path_factory.mktemp("keys"), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    contents = {
        "private": private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "public": private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "other": other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return {name: directory / name for name in contents}


@pytest.fixture
def signed(dev_run, tmp_path, keys):
    directory = copytree(dev_run.directory, tmp_path / "run")
    result = invoke("sign", directory, "--key", keys["private"])
    assert result.exit_code == 0, result.output
    return directory


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_is_verified_from_its_signature_to_the_records(signed, keys):
    result = invoke("verify", signed, "--key", keys["public"])
    assert result.exit_code == 0, result.output
    for checked in ("adapter: ", "base: ", "code and lineage of the Bento", "train records: sha256", "signature"):
        assert checked in result.output
    assert "not checked" not in result.output


@pytest.mark.parametrize("file", ["adapter/adapter.safetensors", "base/model.safetensors", "base/config.json"])
def test_a_flipped_bit_of_the_weights_is_found(signed, file):
    flip(signed / file)
    result = invoke("verify", signed)
    assert result.exit_code == 1
    assert "damaged or was changed" in result.output


def test_a_changed_lineage_or_another_key_fails_the_signature(signed, keys):
    assert "not signed with the key" in invoke("verify", signed, "--key", keys["other"]).output
    lineage = json.loads((signed / "lineage.json").read_text())
    (signed / "lineage.json").write_text(json.dumps(lineage | {"bento": "", "model_version": "gpt2-instruct/999"}))
    assert "the signature of another lineage" in invoke("verify", signed, "--key", keys["public"]).output


@pytest.mark.parametrize("file", ["src/bentos/service.py", "src/lineage.json", "src/gpt2core/model.py"])
def test_changed_code_or_lineage_of_a_bento_is_found(dev_run, file):
    tag = dev_run.lineage.bento
    path = bento.bentoml_home() / "bentos" / tag.replace(":", "/") / file
    before = path.read_text()
    try:
        path.write_text(before.replace("gpt2", "gpt3", 1))
        result = invoke("verify", tag)
    finally:
        path.write_text(before)
    assert result.exit_code == 1
    assert "was changed" in result.output
    assert invoke("verify", tag).exit_code == 0


def test_an_unknown_name_is_an_error_in_one_line(dev_run):
    result = invoke("verify", "gpt2-instruct:0000")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
