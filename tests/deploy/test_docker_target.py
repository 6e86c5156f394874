"""The docker target on the container engine of this machine."""

import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import requests
from click.testing import CliRunner

from deploy.config import DeployConfig
from deploy.containers import lock, service
from deploy.containers.client import EngineError, write_file
from deploy.containers.lock import engine_lock
from deploy.containers.proxy_container import address_file
from deploy.containers.rollout import DockerTarget
from deploy.source import ROOT
from deploy.target import DeployError, DeployOutcome, Version
from deploy.verify import VerificationError
from gpt2core.types import NAME
from run import main
from tests.deploy.conftest import MAX_NEW_TOKENS, SESSION
from tests.helpers import free_port, make_lineage, make_sample, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TIMEOUT = 120  # seconds


@pytest.fixture
def config(engine):
    """A deployment on a free port; everything of it is removed after the test."""
    config = DeployConfig(target="docker", port=free_port())
    name = f"{NAME}-{config.port}"
    yield config
    for container in containers(engine, config):
        container.remove(force=True)
    for network in engine.networks.list(names=[name]):
        network.remove()
    for volume in engine.volumes.list(filters={"name": name}):
        volume.remove()


@pytest.fixture
def deploy(config, samples):
    """Deploy a Bento with the configuration, or with changes to it."""

    def deploy(tag: str, samples=samples, **changes: object) -> DeployOutcome:
        target = DockerTarget(replace(config, **changes))
        return target.deploy(make_lineage(bento=tag), samples, MAX_NEW_TOKENS)

    return deploy


def containers(engine, config: DeployConfig) -> list:
    return engine.containers.list(all=True, filters={"name": f"{NAME}-{config.port}"})


def states(engine, config: DeployConfig) -> Counter:
    return Counter(container.status for container in containers(engine, config))


def served(config: DeployConfig) -> str:
    return requests.get(f"http://127.0.0.1:{config.port}/metadata", timeout=TIMEOUT).json()["bento"]


@contextmanager
def load(config: DeployConfig):
    """Clients that send requests without a pause, half of them over kept connections; counts their responses.

    The block is left once every client got a response after it.
    """
    responses: Counter = Counter()
    served = [0] * 6
    ended = threading.Event()

    def client(number: int) -> None:
        session = requests.Session()
        while not ended.is_set():
            sender = session if number % 2 == 0 else requests
            try:
                body = {"instruction": "Hello.", "max_new_tokens": 20}
                response = sender.post(f"http://127.0.0.1:{config.port}/predict", json=body, timeout=TIMEOUT)
                responses[response.json().get("model", response.text)] += 1
            except (requests.RequestException, ValueError) as error:
                responses[repr(error)] += 1
            served[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(served))]
    for thread in threads:
        thread.start()
    try:
        yield responses
        before = list(served)
        # the first response may be to a request that was sent before
        wait_until(lambda: all(now > then + 1 for now, then in zip(served, before, strict=True)), TIMEOUT, "requests")
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_services_are_replaced_and_rolled_back_under_load_without_a_failed_request(
    engine, first, second, deploy, config
):
    target = DockerTarget(config)
    one = deploy(first.reference)
    assert (one.target, one.outcome, one.url) == ("docker", "deployed", f"http://127.0.0.1:{config.port}")
    assert (one.bento, one.image, one.image_id, one.previous) == (*[first.reference] * 2, first.digest, None)
    with load(config) as responses:
        two = deploy(second.reference)
        assert served(config) == second.reference
        assert (two.outcome, two.previous) == ("deployed", Version(first.reference, first.reference))
        again = deploy(second.reference)
        assert (again.outcome, again.container, again.previous) == ("unchanged", two.container, two.previous)
        back = target.rollback()
        assert (back.outcome, back.previous) == ("rolled_back", Version(second.reference, second.reference))
        assert served(config) == first.reference
    assert responses.keys() == {first.reference, second.reference}
    assert states(engine, config) == {"running": 2, "exited": 1}  # proxy and current service; the kept one
    assert target.rollback().image == second.reference


def test_only_the_last_service_is_kept(engine, first, second, deploy, config):
    deploy(first.reference)
    deploy(second.reference)
    third = deploy(second.reference, memory="3g")
    assert third.outcome == "deployed"
    assert third.previous == Version(first.reference, first.reference)  # not the service of the same image
    assert states(engine, config) == {"running": 2, "exited": 1}


def test_a_service_that_a_killed_run_did_not_verify_is_no_version_to_roll_back_to(
    engine, first, second, deploy, config
):
    deploy(first.reference)
    name = f"{NAME}-{config.port}"
    labels = {service.DEPLOYMENT_LABEL: name, service.BENTO_LABEL: second.reference}
    engine.containers.run(second.digest, name=f"{name}-candidate", labels=labels, network=name, detach=True)
    with pytest.raises(DeployError, match="no previous version"):
        DockerTarget(config).rollback()
    assert served(config) == first.reference
    assert states(engine, config) == {"running": 2}


def test_two_deployments_at_once_are_done_one_after_the_other(engine, first, second, deploy, config):
    deploy(first.reference)
    with load(config) as responses, ThreadPoolExecutor() as pool:
        others = [pool.submit(deploy, second.reference, memory=memory) for memory in ("2g", "3g")]
        assert [other.result().outcome for other in others] == ["deployed", "deployed"]
    assert responses.keys() == {first.reference, second.reference}
    assert states(engine, config) == {"running": 2, "exited": 1}
    assert DockerTarget(config).rollback().image == first.reference


def test_a_killed_process_does_not_hold_the_lock(engine, first, config, monkeypatch):
    name = f"{NAME}-{config.port}-lock"
    code = (
        "import sys, time, docker; from deploy.containers.lock import engine_lock; "
        "lock = engine_lock(docker.from_env(), *sys.argv[1:]); lock.__enter__(); print(flush=True); time.sleep(600)"
    )
    arguments = [sys.executable, "-c", code, name, first.digest]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with monkeypatch.context() as impatient:
            impatient.setattr(lock, "LOCK_TIMEOUT", 0)
            with pytest.raises(EngineError, match=f"another deployment holds the lock {name}"):
                engine_lock(engine, name, first.digest).__enter__()
        holder.kill()
    with engine_lock(engine, name, first.digest):
        pass
    engine.containers.create(first.digest, name=name)  # by a process that was killed before it started it
    monkeypatch.setattr(lock, "CREATED_TIMEOUT", 1)
    with engine_lock(engine, name, first.digest):
        pass
    assert containers(engine, config) == []


def test_a_deployment_on_another_host_is_refused(first, deploy, config):
    deploy(first.reference)
    message = rf"deploy.host is 127\.0\.0\.2, but port {config.port} is served on 127\.0\.0\.1"
    with pytest.raises(DeployError, match=message):
        deploy(first.reference, host="127.0.0.2")


def test_all_containers_are_hardened_and_published_on_the_configured_host_only(engine, first, deploy, config):
    deploy(first.reference)
    for container in containers(engine, config):
        host = container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["PidsLimit"] > 0
        assert host["Memory"] > 0
        assert not host["Privileged"]
        if host["LogConfig"]["Type"] == "json-file":  # Docker's default, without a limit
            assert host["LogConfig"]["Config"] == service.LOG_LIMIT
        bindings = [binding for ports in (host["PortBindings"] or {}).values() for binding in ports]
        assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}


def test_the_address_is_written_where_an_existing_proxy_reads_it(engine, first, config):
    name = f"{NAME}-{config.port}"
    proxy = engine.containers.create(first.reference, name=name, volumes={name: {"bind": "/earlier", "mode": "rw"}})
    assert address_file(proxy) == "/earlier/address"


def test_a_service_requires_the_token_of_the_environment_that_deployed_it(first, second, deploy, config, monkeypatch):
    deploy(first.reference)
    monkeypatch.setenv("GPT2_API_TOKEN", "s3cret-token")
    protected = deploy(first.reference)
    assert protected.outcome == "deployed"
    assert deploy(first.reference).outcome == "unchanged"
    assert requests.get(f"{protected.url}/metadata", timeout=TIMEOUT).status_code == 401
    token = {"Authorization": "Bearer s3cret-token"}
    assert requests.get(f"{protected.url}/metadata", headers=token, timeout=TIMEOUT).status_code == 200
    assert "s3cret-token" not in str(protected)
    monkeypatch.delenv("GPT2_API_TOKEN")
    for refused in (lambda: deploy(first.reference), lambda: deploy(second.reference), DockerTarget(config).preflight):
        with pytest.raises(
            DeployError, match=f"requires a token; set GPT2_API_TOKEN.*docker rm -f {protected.container}"
        ):
            refused()
    assert requests.get(f"{protected.url}/metadata", headers=token, timeout=TIMEOUT).status_code == 200


def test_a_rollback_changes_the_version_and_keeps_the_tokens_of_today(
    engine, first, second, deploy, config, monkeypatch
):
    deploy(first.reference)
    monkeypatch.setenv("GPT2_API_TOKEN", "new-token")
    url = deploy(second.reference).url
    assert DockerTarget(config).rollback().previous == Version(second.reference, second.reference)

    def status(token: str = "") -> int:
        return requests.get(f"{url}/metadata", headers={"X-Api-Key": token}, timeout=TIMEOUT).status_code

    assert (status(), status("new-token")) == (401, 200)
    assert states(engine, config) == {"running": 2, "exited": 1}
    monkeypatch.delenv("GPT2_API_TOKEN")
    with pytest.raises(DeployError, match="requires a token; set GPT2_API_TOKEN"):
        DockerTarget(config).rollback()
    monkeypatch.setenv("GPT2_API_TOKEN", "newest-token")
    assert DockerTarget(config).rollback().bento == second.reference
    assert [status(token) for token in ("", "new-token", "newest-token")] == [401, 401, 200]


def test_a_replaced_proxy_and_a_damaged_address_keep_the_version_to_roll_back_to(engine, first, second, deploy, config):
    deploy(first.reference)
    deploy(second.reference)
    one = Version(first.reference, first.reference)
    name = f"{NAME}-{config.port}"
    engine.containers.get(name).remove(force=True)
    assert deploy(second.reference).previous == one
    write_file(engine.containers.get(name), address_file(engine.containers.get(name)), b"")  # power loss
    engine.containers.get(name).restart()
    assert deploy(second.reference).previous == one
    write_file(engine.containers.get(name), address_file(engine.containers.get(name)), b"http://gpt2")
    engine.containers.get(name).pause()
    back = DockerTarget(config).rollback()
    assert (back.bento, back.previous) == (first.reference, Version(second.reference, second.reference))
    assert served(config) == first.reference
    assert states(engine, config) == {"running": 2, "exited": 1}


def test_a_service_writes_the_request_log_and_reads_adapters_of_this_machine(
    engine, first, deploy, monkeypatch, tmp_path, adapter_dir
):
    monkeypatch.setenv("GPT2_REQUEST_LOG", str(tmp_path / "log" / "requests.jsonl"))
    monkeypatch.setenv("GPT2_ADAPTERS_DIR", str(adapter_dir.parent))
    monkeypatch.setenv("GPT2_ADMIN_TOKEN", "admin")
    deployed = deploy(first.reference)
    url = deployed.url
    body, headers = {"lora_name": "x", "lora_path": adapter_dir.name}, {"Authorization": "Bearer admin"}
    assert requests.post(f"{url}/v1/load_lora_adapter", json=body, headers=headers, timeout=TIMEOUT).ok
    answer = requests.post(f"{url}/predict", json={"instruction": "Hello.", "adapter": "x"}, timeout=TIMEOUT)
    log = tmp_path / "log" / "requests.jsonl"
    wait_until(lambda: log.is_file() and answer.headers["X-Request-Id"] in log.read_text(), TIMEOUT, "a line")
    assert deploy(first.reference).outcome == "unchanged"
    mounts = engine.containers.get(deployed.container).attrs["Mounts"]
    writable = {(mount["Source"], mount["Destination"]) for mount in mounts if mount["RW"]}
    assert writable == {(str(log.parent), "/requests")}
    monkeypatch.setenv("GPT2_REQUEST_LOG", str(tmp_path / "other" / "requests.jsonl"))
    assert deploy(first.reference).outcome == "deployed"


def test_a_run_deploys_its_service_and_the_rollback_command_restores_the_one_before(
    engine, first, deploy, config, tmp_path, monkeypatch
):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    deploy(first.reference)
    invoke(
        *("finetune", "--config", str(ROOT / "configs" / "dev.yaml")),
        *("--set", "deploy.target=docker", "--set", f"deploy.port={config.port}"),
    )
    tag = (tmp_path / "latest" / "bento.txt").read_text().strip()
    try:
        assert served(config) == tag
        output = invoke("rollback")
        assert "outcome: rolled_back" in output
        assert f"image: {first.reference}" in output
        assert served(config) == first.reference
    finally:
        engine.images.remove(tag, force=True)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def broken(engine, first):
    """An image like a Bento's that ends as soon as it starts."""
    tag = f"{NAME}:broken-{SESSION}"
    container = engine.containers.create(first.reference, entrypoint=["sh", "-c", "echo no such weights >&2; exit 3"])
    container.commit(*tag.split(":"))
    container.remove()
    yield tag
    engine.images.remove(tag, force=True)


def test_a_failed_deployment_leaves_the_current_service_and_nothing_else(
    engine, first, second, broken, samples, deploy, config, monkeypatch
):
    deploy(first.reference)
    with load(config) as responses:
        with pytest.raises(VerificationError, match="expected 'something else'"):
            deploy(second.reference, [make_sample(samples[0].instruction, samples[0].input, tuned="something else")])
        with pytest.raises(DeployError, match=r"(?s)exit code 3.*no such weights"):
            deploy(broken)
        with pytest.raises(DeployError, match="the Bento gpt2-instruct:none is not in the store"):
            deploy("gpt2-instruct:none")
        with monkeypatch.context() as impatient:
            impatient.setattr(service, "START_TIMEOUT", 0)
            with pytest.raises(DeployError, match="not ready after 0 seconds"):
                deploy(second.reference)
    assert responses.keys() == {first.reference}
    assert states(engine, config) == {"running": 2}
    with pytest.raises(DeployError, match="no previous version"):
        DockerTarget(config).rollback()


def test_a_port_in_use_is_named_in_the_error_and_nothing_is_left(engine, first, deploy, config):
    message = rf"port {config.port} of 127\.0\.0\.1 is in use"
    with socket.create_server(("127.0.0.1", config.port)), pytest.raises(DeployError, match=message):
        deploy(first.reference)
    assert containers(engine, config) == []
    assert engine.networks.list(names=[f"{NAME}-{config.port}"]) == []
    assert engine.volumes.list(filters={"name": f"{NAME}-{config.port}"}) == []


def test_without_an_engine_the_target_says_so(config, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(DeployError, match=r"no container engine responds at unix:///nowhere\.sock"):
        DockerTarget(config).rollback()
