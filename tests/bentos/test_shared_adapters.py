"""Two services with one adapter directory: both serve exactly the adapters of its manifest."""

import asyncio
import json
import shutil
from contextlib import ExitStack

import pytest
import requests

from bentos.shared_adapters import MANIFEST, Follower, publish
from gpt2core.files import directory_sha256
from tests.bentos.client import admin, error_of, predict, served
from tests.helpers import wait_until


def digests(url: str) -> dict[str, str]:
    """Digests by name of the adapters that were loaded in addition to the run's own."""
    models = requests.get(f"{url}/v1/models", timeout=10).json()["data"]
    return {model["id"]: model["sha256"] for model in models if model["id"] not in ("gpt2-instruct", "base")}


@pytest.mark.slow
def test_replicas_load_replace_and_unload_the_adapters_of_the_manifest(bento_tag, adapter_dir, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(adapter_dir, tmp_path / name)
    (tmp_path / "two" / "README.md").write_text("another digest")
    one, two = (directory_sha256(tmp_path / name) for name in ("one", "two"))
    publish(tmp_path, {"formal": "one"})
    settings = {"GPT2_ADMIN_TOKEN": "admin", "GPT2_ADAPTERS_DIR": tmp_path, "GPT2_FOLLOW_ADAPTERS": "true"}
    with ExitStack() as stack:
        urls = [stack.enter_context(served(bento_tag, **settings))]
        assert digests(urls[0]) == {"formal": one}  # from the first ready moment on

        def wait_for(expected: dict[str, str]) -> None:
            wait_until(lambda: all(digests(url) == expected for url in urls), 60, f"serving {expected}")

        publish(tmp_path, {"formal": "two", "brief": "one"}, ("brief", 1.0))
        wait_for({"formal": two, "brief": one})
        urls.append(stack.enter_context(served(bento_tag, **settings)))  # a late replica
        assert digests(urls[1]) == {"formal": two, "brief": one}
        assert {predict(url, instruction="Hello.").json()["adapter"]["name"] for url in urls} == {"brief"}
        assert error_of(admin(urls[0], "load", lora_name="x", lora_path="one"))["code"] == "forbidden"

        (tmp_path / "one" / "README.md").write_text("not what the manifest says")
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        manifest["adapters"]["other"] = manifest["adapters"]["brief"]
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        text = "gpt2_adapters_in_sync 0.0"
        wait_until(lambda: all(text in requests.get(f"{url}/metrics", timeout=10).text for url in urls), 60, text)
        wait_for({"formal": two, "brief": one})  # still
        assert all(requests.get(f"{url}/readyz", timeout=10).ok for url in urls)

        publish(tmp_path, {"formal": "two"})
        wait_for({"formal": two})
        assert {predict(url, instruction="Hello.").json()["adapter"]["name"] for url in urls} == {"gpt2-instruct"}


def test_a_replica_is_ready_once_it_has_applied_a_manifest(tmp_path, adapter_dir):
    shutil.copytree(adapter_dir, tmp_path / "one")
    applied, refusals = [], [ValueError("damaged")]

    async def apply(manifest):
        if refusals:
            raise refusals.pop()
        applied.append(set(manifest.adapters))

    async def polls():
        follower = Follower(str(tmp_path), apply)
        states = []
        await follower.poll()
        states.append((follower.ready, MANIFEST in follower.error))  # there is none yet
        (tmp_path / MANIFEST).write_text('{"adapters": {')
        await follower.poll()
        states.append((follower.ready, "Invalid JSON" in follower.error))  # half written
        publish(tmp_path, {"formal": "one"})
        await follower.poll()
        states.append((follower.ready, follower.error))
        for _ in range(2):
            await follower.poll()
            states.append((follower.ready, follower.error))
        return states

    assert asyncio.run(polls()) == [(False, True), (False, True), (False, "damaged"), (True, ""), (True, "")]
    assert applied == [{"formal"}]


def test_a_manifest_has_the_digest_that_replicas_compute_for_a_copy_from_bentomls_store(tmp_path, adapter_dir):
    shutil.copytree(adapter_dir, tmp_path / "one")
    (tmp_path / "one" / "model.yaml").write_text("name: gpt2-instruct-adapter")
    assert publish(tmp_path, {"formal": "one"}).adapters["formal"].sha256 == directory_sha256(adapter_dir)


@pytest.mark.parametrize(
    ("adapters", "canary", "message"),
    [
        ({"formal": "nothing"}, None, "is not a directory with an adapter"),
        ({"base": "one"}, None, "the name base is reserved"),
        ({"a/b": "one"}, None, "should match pattern"),
        ({"formal": "one"}, ("other", 1.0), "the canary other is not one of the adapters"),
        ({"formal": "one"}, ("formal", 2.0), "canary.share: Input should be less than or equal to 1"),
    ],
)
def test_a_manifest_that_replicas_would_refuse_is_not_written(tmp_path, adapter_dir, adapters, canary, message):
    shutil.copytree(adapter_dir, tmp_path / "one")
    with pytest.raises(ValueError, match=message) as error:
        publish(tmp_path, adapters, canary)
    assert "\n" not in str(error.value)
    assert not (tmp_path / MANIFEST).exists()
