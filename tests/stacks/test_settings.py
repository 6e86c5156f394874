"""Settings and network of step containers; tests/stacks/test_containers.py runs them."""

import pytest
from zenml.config.store_config import StoreConfiguration
from zenml.enums import StoreType

from stacks import containers


@pytest.mark.parametrize(
    ("kind", "url", "network"),
    [
        (StoreType.SQL, "sqlite:////home/me/zenml.db", "none"),
        (StoreType.REST, "http://127.0.0.1:8237", "host"),
        (StoreType.REST, "https://zenml.example.com", "bridge"),
    ],
)
def test_a_step_has_no_more_network_than_it_needs_to_reach_zenml(kind, url, network):
    assert containers.least_network(StoreConfiguration(type=kind, url=url)) == network


def test_relative_directories_of_this_machine_are_mounted_by_their_absolute_paths(monkeypatch, tmp_path):
    """The engine would take a relative path for the name of a volume."""
    monkeypatch.chdir(tmp_path)
    for name in ("BENTOML_HOME", "GPT2_INSTRUCT_OUTPUTS", "HF_HOME"):
        monkeypatch.setenv(name, name.lower())
    step = containers._step_container("image", ["command"], "run", "step", {}, containers.ContainerSettings())
    assert all(path.is_absolute() for path in step.writable)
    assert step.environment["BENTOML_HOME"] == str(tmp_path / "bentoml_home")


@pytest.mark.parametrize("memory", ["6", "6 g", "6Gi", "0g", "much"])
def test_a_memory_limit_is_a_number_and_a_unit(memory):
    with pytest.raises(ValueError, match="memory"):
        containers.ContainerSettings(memory=memory)
