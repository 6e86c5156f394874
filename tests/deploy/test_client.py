"""The engine client and step containers, without an engine; tests/stacks/test_containers.py has the rest."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from docker.context import ContextAPI
from docker.errors import APIError
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.containers import images
from deploy.containers.client import EngineError, connect
from deploy.containers.steps import StepContainer, log_lines, remove_run, run_arguments


def step(**changes) -> StepContainer:
    return StepContainer(**({"image": "i", "command": ["c"], "run_id": "r", "step": "s"} | changes))


def test_without_an_engine_the_error_names_the_address(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(EngineError, match=r"responds at unix:///nowhere\.sock.*start Docker"), connect():
        pass


def test_without_docker_host_the_engine_is_that_of_the_docker_context(monkeypatch, tmp_path):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    for name in ("colima", "rootless"):
        ContextAPI.create_context(name, host=f"unix:///{name}.sock")
    (tmp_path / "config.json").write_text('{"currentContext": "rootless"}')
    with pytest.raises(EngineError, match=r"responds at .*/rootless\.sock \(Docker context rootless\)"), connect():
        pass
    monkeypatch.setenv("DOCKER_CONTEXT", "colima")
    with pytest.raises(EngineError, match=r"responds at .*/colima\.sock"), connect():
        pass
    monkeypatch.setenv("DOCKER_CONTEXT", "other")
    with pytest.raises(EngineError, match="there is no Docker context other; `docker context ls` lists"), connect():
        pass
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(EngineError, match=r"responds at unix:///nowhere\.sock"), connect():
        pass


def test_without_an_engine_a_run_has_no_containers_to_remove(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    remove_run("a run")


def test_a_container_gets_all_gpus_where_the_engine_has_nvidias_runtime():
    [request] = run_arguments(step(), has_gpus=True)["device_requests"]
    assert request == {"Driver": "", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}


def test_a_container_requests_no_gpu_elsewhere():
    assert run_arguments(step(), has_gpus=False)["device_requests"] == []


@pytest.mark.parametrize("path", ["data.json", "/nowhere/data.json"])
def test_a_mount_that_does_not_exist_is_an_error(path):
    with pytest.raises(EngineError, match=f"mounts has {path}, which must be an absolute path"):
        run_arguments(step(readable=[Path(path)]), has_gpus=False)


@settings(derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 7))
def test_log_lines_do_not_depend_on_how_the_bytes_are_divided(text, size):
    content = text.encode()
    chunks = (content[i : i + size] for i in range(0, len(content), size))
    assert list(log_lines(chunks)) == text.removesuffix("\n").split("\n")[: None if text else 0]


SHA256 = "sha256:" + "1" * 64
NAME = "host:5000/team/gpt2"


@pytest.mark.parametrize(
    ("reference", "digests", "pushed", "expected"),
    [
        (f"{NAME}:1", ["other/gpt2@sha256:" + "0" * 64, f"{NAME}@{SHA256}"], [f"{NAME}@{SHA256}"], f"{NAME}@{SHA256}"),
        ("docker.io/me/gpt2:1", [f"me/gpt2@{SHA256}"], [f"docker.io/me/gpt2@{SHA256}"], f"docker.io/me/gpt2@{SHA256}"),
        (NAME, [f"{NAME}@{SHA256}"], [f"{NAME}@{SHA256}"], f"{NAME}@{SHA256}"),
        (f"{NAME}:1", [f"{NAME}@{SHA256}"], [], f"{NAME}:1"),  # never pushed: Docker 29 lists a digest nevertheless
        (f"{NAME}:1", [], [], f"{NAME}:1"),  # never pushed: older engines do not
        (f"{NAME}@{SHA256}", None, [], f"{NAME}@{SHA256}"),
        (f"{NAME}:1", None, [], f"{NAME}:1"),  # no engine, or one that does not know it
    ],
)
def test_a_tag_is_replaced_by_a_digest_that_its_registry_has(reference, digests, pushed, expected, monkeypatch):
    def inspect_distribution(image):
        if image not in pushed:
            raise APIError("no such manifest")

    @contextmanager
    def connect():
        if digests is None:
            raise EngineError("no such image")
        yield SimpleNamespace(
            images={reference: SimpleNamespace(attrs={"RepoDigests": digests})},
            api=SimpleNamespace(inspect_distribution=inspect_distribution),
        )

    monkeypatch.setattr(images, "connect", connect)
    assert images.pinned(reference) == expected


def test_a_failed_build_does_not_print_the_credentials_of_an_index(monkeypatch):
    index = "https://me:p@SECRET@index.example/simple"
    events = [{"stream": f"Looking in indexes: {index}, {index}\n"}, {"error": f"pip --extra-index-url {index} failed"}]

    @contextmanager
    def connect(timeout):
        yield SimpleNamespace(api=SimpleNamespace(build=lambda **_: iter(events)))

    monkeypatch.setattr(images, "connect", connect)
    monkeypatch.setenv("TORCH_INDEX", index)
    with pytest.raises(EngineError, match="TORCH_INDEX=") as raised:
        images.build_steps()
    assert "SECRET" not in str(raised.value)
    assert str(raised.value).count("https://***@index.example/simple") == 4
