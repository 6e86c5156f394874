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


@pytest.mark.parametrize("memory", ["6", "6 g", "6Gi", "0g", "much"])
def test_a_memory_limit_is_a_number_and_a_unit(memory):
    with pytest.raises(ValueError, match="memory"):
        containers.ContainerSettings(memory=memory)
