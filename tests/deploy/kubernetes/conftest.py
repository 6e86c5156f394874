"""What runs in the namespace before a test."""

import pytest

from tests.deploy.kube_target import OLD, deploy, kubectl_apply


@pytest.fixture
def first(config):
    """A namespace with a deployment of OLD in it."""
    return deploy(config)


@pytest.fixture
def applied_by_kubectl(api):
    """What `kubectl apply -f k8s` leaves, with the image OLD."""
    kubectl_apply(api, OLD)
