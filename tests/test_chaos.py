"""The short form of `make chaos`: one kill -9. The same run shows that no secret of its environment gets anywhere."""

import subprocess
import sys
from threading import Event, Thread

import psutil
import pytest
import requests

from gpt2core.files import directory_sha256
from tests.chaos import Store, kill
from tests.helpers import free_port, is_ready, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TOKEN = "canary-of-the-service"
SECRETS = {
    "WANDB_API_KEY": "ca4a47" + "0" * 34,  # wandb requires 40 hexadecimal digits
    "HF_TOKEN": "hf_canaryofthehub",
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-artifact-store",
    "GPT2_API_TOKEN": TOKEN,
    "GPT2_ADMIN_TOKEN": "canary-of-the-administrator",
    "GPT2_INSTRUCT_WEBHOOK": "http://127.0.0.1:9/canary-of-the-webhook",  # no server listens there: the run logs that
}


@pytest.fixture(scope="module")
def arguments():
    """The arguments of every process of this machine, sampled while the tests run."""
    seen, stop = set(), Event()

    def sample():
        while not stop.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                seen.add(" ".join(process.info["cmdline"] or ()))

    thread = Thread(target=sample)
    thread.start()
    yield seen
    stop.set()
    thread.join()


@pytest.fixture(scope="module")
def killed(arguments, dev_run, tmp_path_factory):
    """A store with a run that was killed while it pretrained, and run again; whether something was lost."""
    store = Store(tmp_path_factory.mktemp("killed"), ("--set", "tracking.wandb=offline"), **SECRETS)
    return store, kill(store, 30, directory_sha256(dev_run.directory / "adapter"))


def test_a_killed_run_ends_in_the_same_adapter_when_it_is_run_again(killed):
    _, lost = killed
    assert not lost


def test_no_secret_is_in_a_file_a_response_or_the_arguments_of_a_process(killed, arguments, tmp_path):
    store, _ = killed
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(tmp_path / "key")], check=True)
    key = (tmp_path / "key").read_text().splitlines()[1]
    status, message = store.run("run.py", "sign", str(store.outputs / "latest"), "--key", str(tmp_path / "key"))
    assert status == 0, message
    tag, port = (store.outputs / "latest" / "bento.txt").read_text().strip(), free_port()
    url, header = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {TOKEN}"}
    server = store.start("-m", "bentoml", "serve", tag, "--port", str(port))
    try:
        wait_until(lambda: is_ready(url), 120, "the service")
        assert requests.post(f"{url}/predict", json={"instruction": "Hello?"}, timeout=60).status_code == 401
        paths = ("/metadata", "/metrics", "/docs.json", "/v1/models")
        responses = [requests.get(url + path, headers=header, timeout=60) for path in paths]
        body = {"instruction": "Hello?", "max_new_tokens": 2}
        responses.append(requests.post(f"{url}/predict", json=body, headers=header, timeout=60))
    finally:
        server.terminate()
        output = server.communicate(timeout=60)[0]
    assert {response.status_code for response in responses} == {200}

    texts = {response.url: response.text for response in responses} | {"log of the service": output}
    texts |= {"arguments of processes": "\n".join(arguments)}
    assert sys.executable in texts["arguments of processes"]
    files = {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()}
    assert [path for path in files if path.suffix == ".wandb"], "the run was not tracked"
    contents = files | {name: text.encode() for name, text in texts.items()}
    for name, secret in {**SECRETS, "signing key": key}.items():
        secret = secret.removeprefix("http://127.0.0.1:9/")
        assert [place for place, content in contents.items() if secret.encode() in content] == [], name
