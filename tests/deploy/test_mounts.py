"""What a service's container can access of this machine."""

import pytest

from deploy.config import DeployConfig
from deploy.containers.mounts import mount_files
from deploy.containers.rollout import DockerTarget
from deploy.server import service_environment
from deploy.target import DeployError


def test_only_the_directories_of_log_and_adapters_are_mounted(tmp_path):
    log, adapters = tmp_path / "a:log" / "requests.jsonl", tmp_path / "adapters"
    log.parent.mkdir()
    for name in ("requests.jsonl", "requests.jsonl.1"):  # of an earlier service
        (log.parent / name).touch()
    adapters.mkdir()
    given = {"GPT2_REQUEST_LOG": str(log), "GPT2_ADAPTERS_DIR": str(adapters), "GPT2_WEIGHTS": "int8"}
    environment, mounts = mount_files(given)
    assert environment == given | {"GPT2_REQUEST_LOG": "/requests/requests.jsonl"}
    places = {(mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in mounts}
    assert places == {(str(log.parent), "/requests", False), (str(adapters), str(adapters), True)}
    assert mount_files({"GPT2_WEIGHTS": "int8"}) == ({"GPT2_WEIGHTS": "int8"}, [])


def test_a_directory_with_other_files_is_not_mounted(tmp_path, monkeypatch):
    (tmp_path / "requests.jsonl").touch()
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("GPT2_REQUEST_LOG", str(tmp_path / "requests.jsonl"))
    message = rf"access to other files.*\.ssh; .*such as {tmp_path}/requests/requests\.jsonl"
    with pytest.raises(DeployError, match=message):
        DockerTarget(DeployConfig(target="docker")).preflight()


@pytest.mark.parametrize("log", ["requests.jsonl", "../requests.jsonl"])
def test_the_current_directory_is_not_mounted(log, tmp_path, monkeypatch):
    directory = tmp_path / "empty"
    directory.mkdir()
    monkeypatch.chdir(directory)
    with pytest.raises(DeployError, match=r"GPT2_REQUEST_LOG is .*requests\.jsonl"):
        mount_files(service_environment({"GPT2_REQUEST_LOG": log}))
    _, [mount] = mount_files(service_environment({"GPT2_REQUEST_LOG": "log/requests.jsonl"}))
    assert mount["Source"] == str(directory / "log")


@pytest.mark.parametrize("log", ["/requests.jsonl", "/tmp/requests.jsonl", "/dev/null/log"])
def test_a_log_in_a_shared_directory_or_below_a_file_is_an_error(log):
    with pytest.raises(DeployError, match=f"GPT2_REQUEST_LOG is {log}"):
        mount_files({"GPT2_REQUEST_LOG": log})


def test_a_shared_directory_is_not_mounted_even_if_it_is_empty(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    with pytest.raises(DeployError, match="has other uses"):
        mount_files({"GPT2_REQUEST_LOG": str(folder / "requests.jsonl")})


def test_a_log_that_is_a_link_or_a_directory_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").symlink_to(tmp_path / "log")
    (tmp_path / "b" / "log").mkdir(parents=True)
    for folder in ("a", "b"):
        with pytest.raises(DeployError, match="must be a regular file"):
            mount_files({"GPT2_REQUEST_LOG": str(tmp_path / folder / "log")})


@pytest.mark.parametrize("directory", ["/", "/opt", "/usr", "/tmp"])
def test_adapters_do_not_hide_what_the_container_needs(directory):
    with pytest.raises(DeployError, match=f"GPT2_ADAPTERS_DIR is {directory}, which would hide"):
        mount_files({"GPT2_ADAPTERS_DIR": directory})


def test_adapters_that_do_not_exist_are_an_error(tmp_path):
    with pytest.raises(DeployError, match="not a directory"):
        mount_files({"GPT2_ADAPTERS_DIR": str(tmp_path / "none")})
