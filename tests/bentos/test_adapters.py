"""Loading and unloading adapters over HTTP."""

import hashlib
import json
import shutil

import pytest
import requests
from safetensors import safe_open
from safetensors.torch import save_file

from gpt2core.files import directory_sha256
from tests.bentos.client import admin, answer_of, error_of, predict


def test_an_adapter_is_loaded_used_and_unloaded_while_the_service_runs(url, adapters, tuned, tokenizer):
    loaded = admin(url, "load", lora_name="mine", lora_path="good")
    assert loaded.json() == {"name": "mine", "sha256": directory_sha256(adapters / "good")}
    response = predict(url, instruction="Say hello.", adapter="mine").json()
    assert response["answer"] == answer_of(tuned, tokenizer, "Say hello.")
    assert response["adapter"]["name"] == "mine"
    assert admin(url, "unload", lora_name="mine").status_code == 200
    assert predict(url, instruction="Say hello.", adapter="mine").status_code == 404
    assert admin(url, "unload", lora_name="mine").status_code == 404


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("a", "../outside", 404),
        ("a", "link", 404),
        ("a", "/etc", 404),
        ("a", ".", 404),
        ("a", "nothing", 404),
        ("a", "x\0y", 404),
        ("a", "x" * 5000, 404),
        ("a", "broken", 400),
        ("a/b", "good", 400),
        ("", "good", 400),
        ("base", "good", 400),
        ("gpt2-instruct", "good", 400),
    ],
)
def test_only_adapters_below_the_directory_and_free_names_are_loaded(url, name, path, status):
    response = admin(url, "load", lora_name=name, lora_path=path)
    assert response.status_code == status
    assert error_of(response)["param"] in ("lora_name", "lora_path")


def test_the_fields_of_vllms_clients_are_accepted(url, adapters):
    assert admin(url, "load", lora_name="v", lora_path="good", load_inplace=False, base_model_name="gpt2").ok
    assert admin(url, "unload", lora_name="v", lora_int_id=None).ok


def test_files_may_be_links_to_files_below_the_directory_alone(url, adapters):
    """Kubernetes and the cache of Hugging Face make such links."""
    for name, target in (("linked", adapters / "good"), ("escaping", adapters.parent / "outside")):
        (adapters / name).mkdir()
        for file in target.iterdir():
            (adapters / name / file.name).symlink_to(file)
    assert admin(url, "load", lora_name="linked", lora_path="linked").status_code == 200
    assert admin(url, "unload", lora_name="linked").status_code == 200
    response = admin(url, "load", lora_name="escaping", lora_path="escaping")
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_adapter"
    assert "is a link to a file outside of GPT2_ADAPTERS_DIR" in error_of(response)["message"]


@pytest.mark.parametrize("name", ["adapter.json", "adapter_config.json"])
def test_a_huge_configuration_is_refused_and_not_read(url, adapters, name):
    directory = adapters / f"huge-{name}"
    directory.mkdir()
    with (directory / name).open("wb") as stream:
        stream.truncate(1_000_001)  # sparse
    response = admin(url, "load", lora_name="huge", lora_path=directory.name)
    assert response.status_code == 400
    assert f"{name} has 1,000,001 bytes; it must have at most 1,000,000" in error_of(response)["message"]


def test_an_adapter_of_another_base_is_refused_with_both_digests(url, adapters):
    shutil.copytree(adapters / "good", adapters / "foreign", dirs_exist_ok=True)
    file = adapters / "foreign" / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": {"name": "gpt2", "sha256": "f" * 64}}))
    response = admin(url, "load", lora_name="foreign", lora_path="foreign")
    assert response.status_code == 400
    message = error_of(response)["message"]
    assert "f" * 64 in message
    assert requests.get(f"{url}/metadata", timeout=10).json()["base"]["sha256"] in message


@pytest.mark.parametrize("name", ["base", "gpt2-instruct"])
def test_the_runs_own_models_are_not_unloaded(url, name):
    assert admin(url, "unload", lora_name=name).status_code == 400


def test_loading_requires_the_admin_token(url):
    assert admin(url, "load", token="other", lora_name="a", lora_path="good").status_code == 401
    for end in ("", "%0a"):  # the router takes a path with a line break at its end for the one without
        assert requests.post(f"{url}/v1/load_lora_adapter{end}", json={}, timeout=10).status_code == 401


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_weights_that_are_not_finite_is_refused_and_changes_nothing(url, adapters, value):
    before = predict(url, instruction="Say hello.").json()
    shutil.copytree(adapters / "good", adapters / "diverged", dirs_exist_ok=True)
    file = adapters / "diverged" / "adapter.safetensors"
    with safe_open(file, framework="pt") as stored:
        metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}
    next(tensor for name, tensor in tensors.items() if name.endswith("lora_B"))[0, 0] = value
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    save_file(tensors, file, metadata)
    description = adapters / "diverged" / "adapter.json"
    description.write_text(description.read_text().replace(digest, hashlib.sha256(file.read_bytes()).hexdigest()))
    response = admin(url, "load", lora_name="diverged", lora_path="diverged")
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_adapter"
    assert "finite" in error_of(response)["message"]
    assert "diverged" not in [model["id"] for model in requests.get(f"{url}/v1/models", timeout=10).json()["data"]]
    assert predict(url, instruction="Say hello.").json() == before
