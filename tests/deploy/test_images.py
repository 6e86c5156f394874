"""The images of service and steps, built and run by the container engine of this machine."""

import gzip
import json
import os
import tarfile
import tempfile
from contextlib import contextmanager

import pytest
import requests
import yaml
from click.testing import CliRunner

from deploy import bento
from deploy.containers.client import EngineError
from deploy.containers.images import build_service, build_steps
from deploy.containers.service import HARDENING
from deploy.source import ROOT
from deploy.verify import request_answer
from run import main
from tests.deploy.conftest import CANARY, MAX_NEW_TOKENS
from tests.helpers import is_ready, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first build installs every package
IMAGE_LIMIT = 1.2e9  # bytes
TIMEOUT = 120  # seconds; a service is ready after 5 on an idle machine


@contextmanager
def container(engine, reference: str, **options):
    """Run a hardened container whose port is published on this machine; gives it and its URL."""
    port = options.get("environment", {}).get("PORT", "3000")
    values = {**HARDENING, "detach": True, "ports": {f"{port}/tcp": ("127.0.0.1",)}} | options
    started = engine.containers.run(reference, **values)
    try:
        started.reload()
        yield started, f"http://127.0.0.1:{started.ports[f'{port}/tcp'][0]['HostPort']}"
    finally:
        started.remove(force=True)


def wait_until_ready(url: str) -> None:
    wait_until(lambda: is_ready(url), TIMEOUT, f"readiness of {url}")


def inside(engine, reference: str, command: str) -> str:
    return engine.containers.run(reference, entrypoint=["sh", "-c", command], user="0", remove=True).decode()


def test_the_service_image_is_small_and_its_labels_name_its_sources(engine, first):
    about = engine.images.get(first.reference)
    assert about.id == first.digest
    assert about.attrs["Size"] < IMAGE_LIMIT
    labels = about.labels
    lineage = bento.lineage(first.reference)
    assert labels["org.opencontainers.image.revision"] == lineage.commit.sha
    assert labels["org.opencontainers.image.version"] == first.reference.split(":")[1]
    assert labels["gpt2-instruct.run-id"] == lineage.run.id
    assert labels["gpt2-instruct.adapter-sha256"] == lineage.adapter.sha256
    assert about.attrs["Config"]["User"] == "10001:10001"


def test_the_service_image_holds_exactly_its_requirements_and_no_build_tools(engine, first):
    [listed] = json.loads(inside(engine, first.reference, f'python -c "{LIST}"')).values()
    required = (ROOT / "bentos" / "requirements.txt").read_text().splitlines()
    assert sorted(listed) == sorted(line.replace("_", "-").lower() for line in required if "==" in line)
    found = "ls -d /opt/venv/bin/pip* /root/.cache /tmp/* 2>/dev/null; which gcc cc c++ make ld; true"
    assert inside(engine, first.reference, found) == ""


LIST = (
    "import json, importlib.metadata as m; print(json.dumps({'listed': "
    "[(d.name + '==' + d.version.split('+')[0]).replace('_', '-').lower() for d in m.distributions()]}))"
)


def test_the_service_image_holds_nothing_of_the_building_machines_pip(engine, first):
    history = json.dumps(engine.api.history(first.reference)) + json.dumps(engine.images.get(first.reference).attrs)
    files = inside(engine, first.reference, "cat /etc/pip.conf /root/.config/pip/pip.conf 2>/dev/null; true")
    assert files == ""
    for value in (os.environ.get("PIP_FIND_LINKS"), os.environ.get("PIP_INDEX_URL")):
        assert value is None or value not in history


def test_the_sbom_names_each_package(first):
    sbom = json.loads(first.sbom)
    assert sbom["bomFormat"] == "CycloneDX"
    components = {part["name"].lower().replace("_", "-"): part["version"] for part in sbom["components"]}
    assert components["torch"].startswith("2.13.0")
    required = (ROOT / "bentos" / "requirements.txt").read_text().splitlines()
    assert {line.split("==")[0].lower().replace("_", "-") for line in required if "==" in line} <= components.keys()


@pytest.mark.parametrize("user", ["10001", "54321:54321", "0"])
def test_the_service_answers_on_a_read_only_root_without_capabilities_as_any_user(engine, first, samples, user):
    with container(engine, first.reference, user=user) as (_, url):
        wait_until_ready(url)
        assert request_answer(url, samples[0].instruction, samples[0].input, MAX_NEW_TOKENS) == samples[0].tuned.text
        assert requests.get(f"{url}/metadata", timeout=5).json()["bento"] == first.reference


def test_the_service_runs_with_the_limits_and_configuration_of_its_pod(engine, first, samples, tmp_path):
    deployment, config = (
        yaml.safe_load((ROOT / "k8s" / name).read_text()) for name in ("30-deployment.yaml", "20-configmap.yaml")
    )
    [spec] = deployment["spec"]["template"]["spec"]["containers"]
    limits = spec["resources"]["limits"]
    for name, content in config["data"].items():
        (tmp_path / name).write_text(content)
    tmp_path.chmod(0o755)
    [mount] = [mount["mountPath"] for mount in spec["volumeMounts"] if mount.get("readOnly")]
    options = {
        "user": str(deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"]),
        "environment": {each["name"]: each.get("value", limits["cpu"]) for each in spec["env"]},
        "volumes": {str(tmp_path): {"bind": mount, "mode": "ro"}},
        "mem_limit": limits["memory"].removesuffix("i").lower(),
        "nano_cpus": int(limits["cpu"]) * 10**9,
    }
    with container(engine, first.reference, **options) as (running, url):
        wait_until_ready(url)
        for sample in samples:
            assert request_answer(url, sample.instruction, sample.input, MAX_NEW_TOKENS) == sample.tuned.text
        assert 'le="60.0"' in requests.get(f"{url}/metrics", timeout=10).text  # the configuration was read
        assert running.exec_run([spec["lifecycle"]["preStop"]["exec"]["command"][0], "0"]).exit_code == 0


def test_the_service_listens_on_port_of_ipv6_and_ipv4_becomes_healthy_and_ends_with_0(engine, first):
    with container(engine, first.reference, environment={"PORT": "3456"}) as (started, url):
        wait_until_ready(url)  # by IPv4
        assert f":{3456:04X} " in started.exec_run(["cat", "/proc/net/tcp6"]).output.decode()
        wait_until(lambda: health(started) == "healthy", TIMEOUT, "a passed health check")
        started.stop(timeout=TIMEOUT)
        assert started.wait()["StatusCode"] == 0


@pytest.mark.parametrize(("given", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "3"}, 3)])
def test_the_number_of_threads_is_the_cpu_quota_unless_it_is_set(engine, first, given, threads):
    with container(engine, first.reference, nano_cpus=500_000_000, environment=given) as (started, _):
        expected = f"\0OMP_NUM_THREADS={threads}\0".encode()
        environment = ["sh", "-c", "cat /proc/1/environ"]
        wait_until(lambda: expected in b"\0" + started.exec_run(environment).output, TIMEOUT, "the environment")


def health(started) -> str:
    started.reload()
    return started.attrs["State"]["Health"]["Status"]


def test_a_killed_worker_ends_the_container(engine, first):
    with container(engine, first.reference) as (started, url):
        wait_until_ready(url)
        started.exec_run(["python", "-c", KILL_WORKER])
        assert started.wait(timeout=TIMEOUT)["StatusCode"] != 0


KILL_WORKER = (
    "import os, signal, pathlib\n"
    "for path in pathlib.Path('/proc').glob('[0-9]*'):\n"
    "    if path.name not in ('1', str(os.getpid())): os.kill(int(path.name), signal.SIGKILL)"
)


def test_a_failed_build_is_one_error_that_names_the_base_image(engine, first, monkeypatch):
    monkeypatch.setenv("BASE_IMAGE", "registry.invalid/nothing:1")
    monkeypatch.delenv("BUILD_IMAGE", raising=False)
    with pytest.raises(EngineError, match=r"could not be built.*BASE_IMAGE=registry\.invalid/nothing:1"):
        build_service(first.reference)


PACKAGES = ("bentos", "deploy", "gpt2core", "pipelines", "stacks", "steps")


@pytest.fixture(scope="module")
def steps(make_image, with_secrets):  # make_image restores the tag `latest`
    with with_secrets():
        return build_steps()


@pytest.mark.parametrize("image", ["first", "steps"])
def test_no_secret_of_the_building_machine_is_in_an_image(engine, image, request):
    built = request.getfixturevalue(image)
    in_a_layer, in_the_configuration = built.sbom[:1000].decode(), "org.opencontainers.image.revision"
    found = search(engine, built.reference, in_a_layer, in_the_configuration, CANARY)
    assert found[in_a_layer]
    assert found[in_the_configuration]
    assert found[CANARY] == []


def search(engine, reference: str, *texts: str) -> dict[str, list[str]]:
    """The parts of an image (layers, configuration with history) that hold each text, with what follows it there."""
    found: dict[str, list[str]] = {text: [] for text in texts}
    overlap = max(map(len, texts))
    with tempfile.TemporaryFile() as file:
        file.writelines(engine.images.get(reference).save())
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            for part in filter(tarfile.TarInfo.isfile, archive):
                content = archive.extractfile(part)
                if content.peek(2)[:2] == b"\x1f\x8b":  # by an engine that stores layers compressed
                    content = gzip.GzipFile(fileobj=content)
                block = b""
                while more := content.read(1 << 24):
                    block = block[-overlap:] + more
                    for text in texts:
                        if (start := block.find(text.encode())) >= 0:
                            found[text].append(f"{part.name}: {block[start : start + 80]!r}")
    return found


def test_the_steps_image_runs_the_pipelines_code_as_any_user_on_a_read_only_root(engine, steps):
    assert json.loads(steps.sbom)["bomFormat"] == "CycloneDX"
    code = "import zenml, bentoml, evidently, steps.finetune, pipelines.finetune_pipeline; print('imported')\n"
    code += "import ctypes, sys; from gpt2core.inference.native import LIBRARIES; "
    code += "[ctypes.CDLL(f'{sys.prefix}/lib/{name}') for name in LIBRARIES]"
    output = engine.containers.run(
        steps.reference,
        ["python", "-c", code],
        user="54321",
        remove=True,
        volumes={str(ROOT / package): {"bind": f"/app/{package}", "mode": "ro"} for package in PACKAGES},
        environment={"ZENML_CUSTOM_SOURCE_ROOT": "/app"},  # ZenML cannot find it for `python -c`
        **HARDENING,
    )
    assert "imported" in output.decode()


def test_the_image_command_writes_the_sbom_and_prints_the_tag_last(first, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "bento.txt").write_text(f"{first.reference}\n")
    result = CliRunner().invoke(main, ["image", "service"], catch_exceptions=False)
    assert result.output.splitlines()[-1] == first.reference
    [sbom] = (tmp_path / "images").iterdir()
    assert sbom.read_bytes() == first.sbom
