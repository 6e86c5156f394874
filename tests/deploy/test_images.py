"""The images, and deployments of them, on the container engine of this machine."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

import docker as sdk
import pytest
import requests
import yaml
from click.testing import CliRunner
from docker.errors import DockerException, ImageNotFound

from deploy import bento
from deploy.bento import BentoError
from deploy.config import DeployConfig
from deploy.containers import images as image
from deploy.containers import service as docker
from deploy.containers.images import EngineError
from deploy.containers.service import CONFINED, DeployError
from deploy.server import serve
from deploy.verify import request_answer
from run import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
MAX_NEW_TOKENS = 5
IMAGE_LIMIT = 1.2e9  # bytes
READY_LIMIT = 5  # seconds, on a machine that does nothing else


@pytest.fixture(scope="module")
def engine():
    try:
        client = sdk.from_env()
        client.ping()
    except DockerException as error:
        pytest.skip(f"no container engine answers: {error}")
    base = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
    try:
        client.images.get(base)
    except ImageNotFound:
        try:
            client.images.pull(base)
        except DockerException as error:
            pytest.skip(f"the base image {base} is not to be had ({error}); BASE_IMAGE names another")
    yield client
    client.close()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("outputs")
        patch.setenv("GPT2_INSTRUCT_OUTPUTS", str(folder))
        yield folder


def lineage(run: str) -> dict:
    return {
        "run": {"id": f"id of {run}", "name": run},
        "commit": {"sha": "1" * 40, "dirty": False},
        "adapter": {"sha256": "2" * 64},
        # no two test sessions on one engine share an image
        "session": SESSION,
    }


SESSION = token_hex(8)


@pytest.fixture(scope="module")
def make(engine, outputs, base_dir, adapter_dir):
    """Build a Bento and its image; all images are removed at the end."""
    made = []
    latest = {name: tagged(engine, f"{name}:latest") for name in (bento.NAME, f"{bento.NAME}-steps")}

    def make(run: str) -> image.Image:
        tag = bento.build(base_dir, adapter_dir, lineage(run))
        made.append(tag)
        return image.build_service(tag)

    yield make
    for tag in made:
        engine.images.remove(tag, force=True)
    for name, before in latest.items():
        if before is not None:
            before.tag(name, "latest")  # a developer's own
        elif tagged(engine, f"{name}:latest") is not None:
            engine.images.remove(f"{name}:latest")


def tagged(engine, reference: str):
    try:
        return engine.images.get(reference)
    except ImageNotFound:
        return None


@pytest.fixture(scope="module")
def first(make):
    return make("first")


@pytest.fixture(scope="module")
def second(make):
    return make("second")


@pytest.fixture(scope="module")
def samples(first):
    """What the model of all these services answers."""
    questions = [("Hello.", ""), ("Name the capital.", "France")]
    with serve(first.reference) as url:
        return [
            {"instruction": text, "input": input, "tuned": request_answer(url, text, input, MAX_NEW_TOKENS)}
            for text, input in questions
        ]


@contextmanager
def container(engine, reference: str, **options):
    """A confined container whose port answers on this machine; it, and its address."""
    port = options.get("environment", {}).get("PORT", "3000")
    values = {**CONFINED, "ports": {f"{port}/tcp": ("127.0.0.1",)}} | options
    started = engine.containers.run(reference, **values)
    try:
        started.reload()
        yield started, f"http://127.0.0.1:{started.ports[f'{port}/tcp'][0]['HostPort']}"
    finally:
        started.remove(force=True)


def wait_until_ready(url: str) -> None:
    wait_for(lambda: is_ready(url), 60)


def is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=2).ok
    except requests.RequestException:
        return False


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def inside(engine, reference: str, command: str) -> str:
    return engine.containers.run(reference, entrypoint=["sh", "-c", command], user="0", remove=True).decode()


def test_the_services_image_is_small_and_tells_what_it_was_made_from(engine, first):
    about = engine.images.get(first.reference)
    assert about.id == first.digest == engine.images.get(f"{bento.NAME}:latest").id
    assert about.attrs["Size"] < IMAGE_LIMIT
    labels = about.labels
    assert labels["org.opencontainers.image.revision"] == "1" * 40
    assert labels["org.opencontainers.image.version"] == first.reference.split(":")[1]
    assert labels["gpt2-instruct.run-id"] == "id of first"
    assert labels["gpt2-instruct.adapter-sha256"] == "2" * 64
    assert about.attrs["Config"]["User"] == "10001:10001"


def test_the_services_image_holds_what_its_requirements_say_and_nothing_to_build_with(engine, first):
    [listed] = json.loads(inside(engine, first.reference, f'python -c "{LIST}"')).values()
    wanted = (ROOT / "bentos" / "requirements.txt").read_text().splitlines()
    assert sorted(listed) == sorted(line.replace("_", "-").lower() for line in wanted if "==" in line)
    found = "ls -d /opt/venv/bin/pip* /root/.cache /tmp/* 2>/dev/null; which gcc cc c++ make ld; true"
    assert inside(engine, first.reference, found) == ""


LIST = (
    "import json, importlib.metadata as m; print(json.dumps({'listed': "
    "[(d.name + '==' + d.version.split('+')[0]).replace('_', '-').lower() for d in m.distributions()]}))"
)


def test_the_services_image_holds_nothing_of_this_machines_pip(engine, first):
    history = json.dumps(engine.api.history(first.reference)) + json.dumps(engine.images.get(first.reference).attrs)
    files = inside(engine, first.reference, "cat /etc/pip.conf /root/.config/pip/pip.conf 2>/dev/null; true")
    assert files == ""
    for value in (os.environ.get("PIP_FIND_LINKS"), os.environ.get("PIP_INDEX_URL")):
        assert value is None or value not in history


def test_an_sbom_lies_beside_the_image_and_names_each_package(first, outputs):
    sbom = json.loads(first.sbom.read_text())
    assert first.sbom.parent == outputs / "images"
    assert sbom["bomFormat"] == "CycloneDX"
    components = {part["name"].lower().replace("_", "-"): part["version"] for part in sbom["components"]}
    assert components["torch"].startswith("2.13.0")
    wanted = (ROOT / "bentos" / "requirements.txt").read_text().splitlines()
    assert {line.split("==")[0].lower().replace("_", "-") for line in wanted if "==" in line} <= components.keys()


@pytest.mark.parametrize("user", ["10001", "54321:54321", "0"])
def test_it_answers_on_a_read_only_root_without_capabilities_as_any_user(engine, first, samples, user):
    with container(engine, first.reference, user=user) as (_, url):
        wait_until_ready(url)
        row = samples[0]
        assert request_answer(url, row["instruction"], row["input"], MAX_NEW_TOKENS) == row["tuned"]
        assert requests.get(f"{url}/metadata", timeout=5).json()["bento"] == first.reference


def test_it_runs_under_what_k8s_gives_its_pod(engine, first, samples, tmp_path):
    deployment, config = (
        yaml.safe_load((ROOT / "k8s" / name).read_text()) for name in ("30-deployment.yaml", "20-configmap.yaml")
    )
    [told] = deployment["spec"]["template"]["spec"]["containers"]
    limits = told["resources"]["limits"]
    for name, content in config["data"].items():
        (tmp_path / name).write_text(content)
    tmp_path.chmod(0o755)
    [mount] = [mount["mountPath"] for mount in told["volumeMounts"] if mount.get("readOnly")]
    options = {
        "user": str(deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"]),
        "environment": {each["name"]: each.get("value", limits["cpu"]) for each in told["env"]},
        "volumes": {str(tmp_path): {"bind": mount, "mode": "ro"}},
        "mem_limit": limits["memory"].removesuffix("i").lower(),
        "nano_cpus": int(limits["cpu"]) * 10**9,
    }
    with container(engine, first.reference, **options) as (running, url):
        wait_until_ready(url)
        assert [request_answer(url, row["instruction"], row["input"], MAX_NEW_TOKENS) for row in samples] == [
            row["tuned"] for row in samples
        ]
        assert 'le="60.0"' in requests.get(f"{url}/metrics", timeout=10).text  # the configuration was read
        assert running.exec_run([told["lifecycle"]["preStop"]["exec"]["command"][0], "0"]).exit_code == 0


def test_it_is_soon_ready_obeys_port_turns_healthy_and_ends_at_once_with_0(engine, first):
    begun = time.monotonic()
    with container(engine, first.reference, environment={"PORT": "3456"}) as (started, url):
        wait_until_ready(url)
        took = time.monotonic() - begun
        assert took < READY_LIMIT * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1) * 2)
        wait_for(lambda: health(started) == "healthy", 40)
        started.stop(timeout=30)
        assert started.wait()["StatusCode"] == 0


def health(started) -> str:
    started.reload()
    return started.attrs["State"]["Health"]["Status"]


def test_a_worker_that_dies_ends_the_container(engine, first):
    with container(engine, first.reference) as (started, url):
        wait_until_ready(url)
        started.exec_run(["python", "-c", KILL_WORKER])
        assert started.wait(timeout=60)["StatusCode"] != 0


KILL_WORKER = (
    "import os, signal, pathlib\n"
    "for path in pathlib.Path('/proc').glob('[0-9]*'):\n"
    "    if path.name not in ('1', str(os.getpid())): os.kill(int(path.name), signal.SIGKILL)"
)


def test_an_image_that_cannot_be_built_is_one_error_that_names_the_base(engine, first, monkeypatch):
    monkeypatch.setenv("BASE_IMAGE", "registry.invalid/nothing:1")
    monkeypatch.delenv("BUILD_IMAGE", raising=False)
    with pytest.raises(EngineError, match=r"could not be built.*BASE_IMAGE=registry\.invalid/nothing:1"):
        image.build_service(first.reference)


def test_without_an_engine_it_says_where_it_looked(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(EngineError, match=r"no container engine answers at unix:///nowhere\.sock.*start Docker"):
        image.build_steps()


ROOMS = ("bentos", "gpt2core", "pipelines", "steps")


def test_the_steps_image_runs_the_pipelines_code_as_any_user_on_a_read_only_root(engine, make):
    built = image.build_steps()
    assert json.loads(built.sbom.read_text())["bomFormat"] == "CycloneDX"
    code = "import zenml, bentoml, evidently, steps.finetune, pipelines.finetune_pipeline; print('imported')"
    output = engine.containers.run(
        built.reference,
        ["python", "-c", code],
        user="54321",
        remove=True,
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        volumes={str(ROOT / room): {"bind": f"/app/{room}", "mode": "ro"} for room in ROOMS},
        environment={"ZENML_CUSTOM_SOURCE_ROOT": "/app"},  # it can't tell for `python -c`
    )
    assert "imported" in output.decode()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def site(engine):
    """Where this test deploys to; nothing of it stays."""
    config = DeployConfig(target="docker", port=free_port())
    name = f"{bento.NAME}-{config.port}"
    yield config
    for started in containers(engine, config):
        started.remove(force=True)
    for network in engine.networks.list(names=[name]):
        network.remove()
    for volume in engine.volumes.list(filters={"name": name}):
        volume.remove()


def containers(engine, config: DeployConfig) -> list:
    return engine.containers.list(all=True, filters={"name": f"{bento.NAME}-{config.port}"})


def states(engine, config: DeployConfig) -> Counter:
    return Counter(started.status for started in containers(engine, config))


def served(config: DeployConfig) -> str:
    return requests.get(f"http://127.0.0.1:{config.port}/metadata", timeout=10).json()["bento"]


@contextmanager
def load(config: DeployConfig):
    """Clients that ask without a pause, with kept connections and with new ones; the answers they get."""
    answers: Counter = Counter()
    ended = threading.Event()

    def client(kept: bool) -> None:
        session = requests.Session()
        while not ended.is_set():
            ask = session if kept else requests
            try:
                body = {"instruction": "Hello.", "max_new_tokens": 20}
                response = ask.post(f"http://127.0.0.1:{config.port}/predict", json=body, timeout=60)
                answers[response.json().get("model", response.text)] += 1
            except (requests.RequestException, ValueError) as error:
                answers[repr(error)] += 1

    threads = [threading.Thread(target=client, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        yield answers
        time.sleep(1)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_services_are_replaced_and_taken_back_under_load_without_a_failed_request(engine, first, second, samples, site):
    one = docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)
    assert one["outcome"] == "deployed"
    assert (one["image"], one["digest"], one["previous"]) == (first.reference, first.digest, "")
    with load(site) as answers:
        two = docker.deploy(second.reference, site, samples, MAX_NEW_TOKENS)
        assert served(site) == second.reference
        assert (two["outcome"], two["previous"]) == ("deployed", first.reference)
        again = docker.deploy(second.reference, site, samples, MAX_NEW_TOKENS)
        assert (again["outcome"], again["container"], again["previous"]) == (
            "unchanged",
            two["container"],
            first.reference,
        )
        back = docker.rollback(site)
        assert (back["outcome"], back["previous"]) == ("rolled_back", second.reference)
        assert served(site) == first.reference
    assert answers.keys() == {first.reference, second.reference}
    assert states(engine, site) == {"running": 2, "exited": 1}  # front, current; the one before
    assert docker.rollback(site)["image"] == second.reference


def test_only_the_last_service_is_kept_and_none_runs_with_rights(engine, first, second, samples, site):
    docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)
    docker.deploy(second.reference, site, samples, MAX_NEW_TOKENS)
    larger = DeployConfig(target="docker", port=site.port, memory="3g")
    third = docker.deploy(second.reference, larger, samples, MAX_NEW_TOKENS)
    assert (third["outcome"], third["previous"]) == ("deployed", first.reference)  # the same image is no step back
    assert states(engine, site) == {"running": 2, "exited": 1}
    elsewhere = DeployConfig(target="docker", port=site.port, host="127.0.0.2")
    with pytest.raises(
        DeployError, match=rf"deploy.host is 127\.0\.0\.2, but port {site.port} is served on 127\.0\.0\.1"
    ):
        docker.deploy(first.reference, elsewhere, samples, MAX_NEW_TOKENS)
    for started in containers(engine, site):
        host = started.attrs["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["Memory"] > 0
        assert not host["Privileged"]
        bindings = [binding for ports in (host["PortBindings"] or {}).values() for binding in ports]
        assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}


def test_a_service_asks_for_the_token_of_the_environment_it_was_deployed_in(engine, first, samples, site, monkeypatch):
    docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)
    monkeypatch.setenv("GPT2_API_TOKEN", "s3cret-token")
    guarded = docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)
    assert guarded["outcome"] == "deployed"
    assert docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)["outcome"] == "unchanged"
    assert requests.get(f"{guarded['url']}/metadata", timeout=10).status_code == 401
    token = {"Authorization": "Bearer s3cret-token"}
    assert requests.get(f"{guarded['url']}/metadata", headers=token, timeout=10).status_code == 200
    assert "s3cret-token" not in str(guarded)


def test_a_run_deploys_its_service_and_run_py_takes_it_back(
    engine, site, first, samples, tmp_path, monkeypatch, outputs
):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)
    invoke(
        *("finetune", "--config", str(ROOT / "configs" / "dev.yaml")),
        *("--set", "deploy.target=docker", "--set", f"deploy.port={site.port}"),
    )
    tag = (tmp_path / "latest" / "bento.txt").read_text().strip()
    try:
        assert served(site) == tag
        output = invoke("rollback")
        assert "outcome: rolled_back" in output
        assert f"image: {first.reference}" in output
        assert served(site) == first.reference
    finally:
        engine.images.remove(tag, force=True)


def test_the_image_command_prints_the_tag_last(first, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "bento.txt").write_text(f"{first.reference}\n")
    assert invoke("image", "service").splitlines()[-1] == first.reference


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def broken(engine, reference: str) -> str:
    """An image as of a Bento, which ends as soon as it starts."""
    tag = f"{bento.NAME}:broken-{SESSION}"
    started = engine.containers.create(reference, entrypoint=["sh", "-c", "echo no such weights >&2; exit 3"])
    started.commit(*tag.split(":"))
    started.remove()
    return tag


def test_what_fails_leaves_the_one_that_serves_and_nothing_else(engine, first, second, samples, site, monkeypatch):
    docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)
    wrong = [{**samples[0], "tuned": "something else"}]
    tag = broken(engine, first.reference)
    try:
        with load(site) as answers:
            with pytest.raises(BentoError, match="answered 'something else'"):
                docker.deploy(second.reference, site, wrong, MAX_NEW_TOKENS)
            with pytest.raises(DeployError, match=r"(?s)exit code 3.*no such weights"):
                docker.deploy(tag, site, samples, MAX_NEW_TOKENS)
            monkeypatch.setattr(docker, "START_TIMEOUT", 0.5)
            with pytest.raises(DeployError, match=r"not ready after 0\.5 seconds"):
                docker.deploy(second.reference, site, samples, MAX_NEW_TOKENS)
    finally:
        engine.images.remove(tag, force=True)
    assert answers.keys() == {first.reference}
    assert states(engine, site) == {"running": 2}
    with pytest.raises(DeployError, match="nothing was deployed on port"):
        docker.rollback(site)


def test_a_port_that_is_taken_is_an_error_that_names_it_and_leaves_nothing(engine, first, samples, site):
    taken = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(site.port), "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: is_listening(site.port), 20)
        with pytest.raises(DeployError, match=rf"port {site.port} of 127\.0\.0\.1 is taken"):
            docker.deploy(first.reference, site, samples, MAX_NEW_TOKENS)
    finally:
        taken.terminate()
        taken.wait()
    assert containers(engine, site) == []


def is_listening(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
