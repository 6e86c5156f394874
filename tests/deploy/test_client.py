"""What can be said of containers without an engine; tests/stacks/test_containers.py has the rest."""

from types import SimpleNamespace

import pytest
from zenml.enums import StoreType

from deploy.containers import client as engine
from stacks import containers


@pytest.fixture
def engine_with(monkeypatch):
    """An engine that has these runtimes; there is no GPU to try a real one on."""

    def change(*runtimes: str) -> None:
        client = SimpleNamespace(info=lambda: {"Runtimes": {name: {} for name in runtimes}})
        monkeypatch.setattr(engine, "connect", lambda: client)

    return change


def arguments(**changes) -> dict:
    values = {"environment": {}, "writable": [], "readable": [], "network": "none", "memory": None}
    return engine.run_arguments(**(values | changes))


def test_a_container_gets_all_gpus_where_the_engine_has_nvidias_runtime(engine_with):
    engine_with("runc", "nvidia")
    [request] = arguments()["device_requests"]
    assert request == {"Driver": "", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}


def test_a_container_asks_for_none_elsewhere(engine_with):
    engine_with("runc")
    assert arguments()["device_requests"] == []


@pytest.mark.parametrize("path", ["data.json", "/nowhere/data.json"])
def test_a_mount_that_is_not_there_is_refused_since_the_engine_would_make_a_folder_of_it(engine_with, path):
    engine_with()
    with pytest.raises(engine.EngineError, match=f"mounts has {path}; name absolute paths that are there"):
        arguments(readable=[engine.Path(path)])


def test_log_lines_are_whole_however_the_bytes_arrive():
    text = "first\nzwölf Boxkämpfer\nlast".encode()
    for size in (1, 2, 3, 100):
        chunks = (text[i : i + size] for i in range(0, len(text), size))
        assert list(engine._lines(chunks)) == ["first", "zwölf Boxkämpfer", "last"]


@pytest.mark.parametrize(
    ("kind", "url", "network"),
    [
        (StoreType.SQL, "sqlite:////home/me/zenml.db", "none"),
        (StoreType.REST, "http://127.0.0.1:8237", "host"),
        (StoreType.REST, "https://zenml.example.com", "bridge"),
    ],
)
def test_a_step_has_as_much_network_as_it_needs_to_reach_zenml(monkeypatch, kind, url, network):
    store = SimpleNamespace(store_configuration=SimpleNamespace(type=kind, url=url))
    monkeypatch.setattr(containers, "GlobalConfiguration", lambda: store)
    assert containers._network() == network


@pytest.mark.parametrize("memory", ["6", "6 g", "6Gi", "0g", "much"])
def test_a_memory_limit_is_a_number_and_a_unit(memory):
    with pytest.raises(ValueError, match="memory"):
        containers.ContainerSettings(memory=memory)
