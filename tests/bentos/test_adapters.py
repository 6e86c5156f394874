"""Loading and unloading adapters over HTTP."""

import pytest
import requests

from gpt2core.checkpoint import directory_sha256
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


@pytest.mark.parametrize("name", ["base", "gpt2-instruct"])
def test_the_runs_own_models_are_not_unloaded(url, name):
    assert admin(url, "unload", lora_name=name).status_code == 400


def test_loading_requires_the_admin_token(url):
    assert admin(url, "load", token="other", lora_name="a", lora_path="good").status_code == 401
    assert requests.post(f"{url}/v1/load_lora_adapter", json={}, timeout=10).status_code == 401
