"""How the Kubernetes target connects, and the messages of connection errors."""

import json

import pytest
import yaml

from deploy.config import DeployConfig
from deploy.kubernetes.client import Cluster
from deploy.kubernetes.errors import KubeError
from tests.deploy.kube_api import TOKEN


def connect(**values) -> None:
    """Connect, and make one request."""
    Cluster(DeployConfig(**values)).check_permissions()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a kubeconfig: it must be YAML"),
        ("- a\n- b\n", "is not a kubeconfig"),
        ("contexts: []\n", "cannot be used"),
        (None, "cannot be used"),
    ],
)
def test_an_unusable_kubeconfig_is_named(tmp_path, write_kubeconfig, content, message):
    file = str(tmp_path / "missing") if content is None else write_kubeconfig(content)
    with pytest.raises(KubeError) as error:
        connect(kubeconfig=file)
    assert file in str(error.value)
    assert message in str(error.value)


def test_errors_do_not_quote_a_malformed_kubeconfig(api, write_kubeconfig):
    config = api.kubeconfig()
    config["users"][0]["user"] = {"client-certificate-data": TOKEN, "client-key-data": "!" + TOKEN}
    for content in (config, json.dumps(config)[:-2], yaml.safe_dump(config) + f"\n  {TOKEN}: ["):
        with pytest.raises(KubeError) as error:
            connect(kubeconfig=write_kubeconfig(content))
        assert TOKEN not in str(error.value)
        assert error.value.__cause__ is None


def test_an_unknown_context_is_named_with_the_known_ones(config):
    with pytest.raises(KubeError, match=r"deploy.context is 'prod'; .*kubeconfig has here, there"):
        connect(kubeconfig=config.kubeconfig, context="prod")
    connect(kubeconfig=config.kubeconfig, context="there")


def test_the_default_is_the_kubeconfig_of_the_environment(api, config, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", config.kubeconfig)
    connect()


def test_the_default_in_a_pod_is_its_service_account(api, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_bytes(api.certificate.read_bytes())
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    connect()


def test_requests_to_a_busy_server_are_repeated(api, config):
    api.failures = [503, 429, 500]
    connect(kubeconfig=config.kubeconfig)
    assert api.failures == []


def test_rejected_credentials_are_named(api, write_kubeconfig):
    file = write_kubeconfig(api.kubeconfig(token="expired"))
    with pytest.raises(KubeError, match=r"does not accept the credentials of the kubeconfig .*log in again"):
        connect(kubeconfig=file)


@pytest.mark.parametrize(
    ("command", "cause"), [("no-such-plugin", "No such file or directory: 'no-such-plugin'"), ("false", "returned 1")]
)
def test_an_exec_plugin_that_fails_is_named(api, write_kubeconfig, command, cause):
    config = api.kubeconfig()
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": command, "args": []}
    config["users"][0]["user"] = {"exec": plugin}
    file = write_kubeconfig(config)
    with pytest.raises(KubeError) as error:
        connect(kubeconfig=file)
    assert f"the kubeconfig {file} yields no credentials: " in str(error.value)
    assert cause in str(error.value)


def test_an_unreachable_server_is_named(api, write_kubeconfig):
    file = write_kubeconfig(api.kubeconfig(server="https://127.0.0.1:1"))
    with pytest.raises(KubeError, match=r"https://127.0.0.1:1 cannot be reached .*check that the cluster is running"):
        connect(kubeconfig=file)


def test_an_untrusted_certificate_is_named(api, write_kubeconfig):
    config = api.kubeconfig()
    del config["clusters"][0]["cluster"]["certificate-authority"]
    with pytest.raises(KubeError, match=r"does not trust the certificate of https://127.0.0.1:"):
        connect(kubeconfig=write_kubeconfig(config))


def test_an_address_without_an_api_server_is_named(api, write_kubeconfig):
    file = write_kubeconfig(api.kubeconfig(server=f"https://127.0.0.1:{api.port}/elsewhere"))
    with pytest.raises(KubeError, match=r"does not know /apis/.*Kubernetes 1.27 or later is required"):
        connect(kubeconfig=file)
