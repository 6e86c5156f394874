"""The containers of a deployment's service: create one, wait for it, compare it, and read what its labels say."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from secrets import token_hex
from typing import Any

from docker import DockerClient
from docker.models.containers import Container
from docker.types import LogConfig
from docker.utils import parse_bytes

from deploy.containers.client import hardening
from deploy.containers.mounts import mount_files
from deploy.server import START_TIMEOUT, service_environment
from deploy.target import DeployError, Version
from deploy.verify import is_ready

BENTO_LABEL = "gpt2-instruct.bento"
DEPLOYMENT_LABEL = "gpt2-instruct.deployment"
PORT = "3000/tcp"  # port that the image exposes
POLL = 0.1  # seconds
RESTART = {"Name": "unless-stopped"}
HARDENING = hardening(tmpfs={"/tmp": "size=128m,mode=1777"}, pids_limit=512)
LOG_LIMIT = {"max-size": "10m", "max-file": "5"}  # the defaults of a kubelet


class Services:
    """The service containers of a deployment, whatever their state. Their name begins with the deployment's."""

    def __init__(self, client: DockerClient, deployment: str, memory: str) -> None:
        """`memory`: limit of new services, such as "2g"."""
        self._client, self._deployment, self._memory = client, deployment, memory

    def all(self) -> list[Container]:
        label = f"{DEPLOYMENT_LABEL}={self._deployment}"
        return list(self._client.containers.list(all=True, filters={"label": label}, ignore_removed=True))

    def verified(self) -> list[Container]:
        """Return the services that a deployment or rollback has verified."""
        return [service for service in self.all() if is_verified(service)]

    def create(self, image: str, tag: str) -> Container:
        """Create a service that only the deployment's network and this machine can reach."""
        environment, mounts = mount_files(service_environment())
        # run as the user of this process, who owns the mounted files, instead of the image's user
        user = {"user": f"{os.getuid()}:{os.getgid()}"} if mounts else {}
        return self._client.containers.create(
            image,
            name=f"{self._deployment}-{token_hex(4)}",
            labels={DEPLOYMENT_LABEL: self._deployment, BENTO_LABEL: tag},
            ports={PORT: ("127.0.0.1",)},
            mem_limit=self._memory,
            environment=environment,
            mounts=mounts,
            **user,
            **common_options(self._client, self._deployment),
        )

    def is_up_to_date(self, service: Container, image: str) -> bool:
        """Whether the service has this image, the configured memory and the settings of this process."""
        environment, mounts = mount_files(service_environment())
        host = service.attrs["HostConfig"]
        return (
            service.image.id == image
            and service_environment(environment_of(service)) == environment
            and _places(host.get("Mounts") or []) == _places(mounts)
            and host["Memory"] == parse_bytes(self._memory)
        )


def common_options(client: DockerClient, network: str) -> dict[str, Any]:
    """Return the arguments of `containers.create` that services and their proxy share."""
    options: dict[str, Any] = {"network": network, "detach": True, **HARDENING}
    # without a limit, logs of Docker's default driver would fill the disk
    if client.info().get("LoggingDriver") == LogConfig.types.JSON:
        options["log_config"] = LogConfig(type=LogConfig.types.JSON, config=LOG_LIMIT)
    return options


def wait_until_ready(service: Container) -> str:
    """Wait for a service; return the URL at which this machine reaches it without the proxy.

    Raises:
        DeployError: the service ended or was not ready in time. The message has the last lines of its log.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        service.reload()
        if service.status != "running":
            state = service.attrs["State"]
            reason = "ran out of memory" if state["OOMKilled"] else f"ended with exit code {state['ExitCode']}"
            raise DeployError(f"{bento_of(service)} {reason}; its log ends:\n{log_tail(service)}")
        url = f"http://127.0.0.1:{service.ports[PORT][0]['HostPort']}"
        if is_ready(url):
            return url
        time.sleep(POLL)
    raise DeployError(
        f"{bento_of(service)} was not ready after {START_TIMEOUT} seconds; its log ends:\n{log_tail(service)}"
    )


def newest(services: Iterable[Container]) -> Container | None:
    """Return the service that was started last; None if there is none."""
    return max(services, key=lambda service: str(service.attrs["State"]["StartedAt"]), default=None)


def is_verified(service: Container) -> bool:
    """Whether a deployment or rollback has verified the service: it then got its restart policy."""
    return service.attrs["HostConfig"]["RestartPolicy"]["Name"] not in ("", "no")


def image_of(service: Container) -> str:
    """Return the ID of a service's image, which the engine may not have any more."""
    return str(service.attrs["Image"])


def bento_of(service: Container) -> str:
    return str(service.labels[BENTO_LABEL])


def version_of(service: Container | None) -> Version | None:
    return None if service is None else Version(bento=bento_of(service), image=bento_of(service))


def environment_of(service: Container) -> dict[str, str]:
    return dict(variable.split("=", 1) for variable in service.attrs["Config"]["Env"])


def log_tail(container: Container) -> str:
    return str(container.logs(tail=30).decode(errors="replace")).strip()


def _places(mounts: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    return {(mount["Source"], mount["Target"]) for mount in mounts}
