"""The docker target: a service in a local container, behind a reverse proxy that owns the port.

The port identifies a deployment. For port 3000, gpt2-instruct-3000 is the name of the proxy (`proxy.py`), of the
network that proxy and services share, and of the volume that stores the current service's address. The previous service
is stopped but kept for `rollback`, which starts another service of its image. A service gets a restart policy when it
is verified: a service without one, except the current service, was left behind by a killed run.
"""

import errno
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from secrets import token_hex
from typing import Any

from docker import DockerClient
from docker.errors import APIError, NotFound
from docker.models.containers import Container
from docker.models.networks import Network
from docker.types import LogConfig
from docker.utils import parse_bytes

from deploy import bento
from deploy.config import DeployConfig
from deploy.containers.client import EngineError, connect, hardening, is_local, read_file, write_file
from deploy.containers.images import Image, service_image
from deploy.containers.lock import engine_lock
from deploy.containers.mounts import mount_files
from deploy.containers.proxy import ADDRESS
from deploy.server import START_TIMEOUT, service_environment
from deploy.target import DeployError, DeployOutcome, Version
from deploy.verify import is_ready, request_answer, verify_answers
from gpt2core.types import NAME, Lineage, Sample

logger = logging.getLogger(__name__)

BENTO_LABEL = "gpt2-instruct.bento"
DEPLOYMENT_LABEL = "gpt2-instruct.deployment"
TOKEN = "GPT2_API_TOKEN"  # noqa: S105 (the variable's name)
PORT = "3000/tcp"  # port that the image exposes
CONNECT_TIME = 2  # seconds in which requests that the proxy received before the switch connect to the old service
STOP_TIMEOUT = 75  # seconds; longer than the service's time limit for a request
POLL = 0.1  # seconds
RESTART = {"Name": "unless-stopped"}
HARDENING = hardening(tmpfs={"/tmp": "size=128m,mode=1777"}, pids_limit=512)
MEMORY, PROXY_MEMORY = "2g", "256m"  # limits; gpt2-nano takes 340 MB
LOG_LIMIT = {"max-size": "10m", "max-file": "5"}  # the defaults of a kubelet


class DockerTarget:
    """Deploys to containers of the local engine; implements `deploy.target.Target`."""

    def __init__(self, config: DeployConfig) -> None:
        self.config = config

    def preflight(self) -> None:
        """Check the settings of the service, the engine, and that the proxy can listen on its address.

        Raises:
            DeployError: a deployment would be refused.
        """
        mount_files(service_environment())
        with self._open() as group:
            group.check_host()
            group.check_port()
            group.check_token()

    def deploy(self, lineage: Lineage, samples: Sequence[Sample], max_new_tokens: int) -> DeployOutcome:
        """Start a service of the Bento, verify its answers, switch the proxy to it, and drain the previous service.

        Raises:
            DeployError: the image cannot be built, the service is not ready in time or answers differently, the port is
                in use, the current service requires a token and this process has none, or the engine fails.
        """
        with self._open() as group:
            group.check_host()
            image = service_image(lineage.bento)

            def verify(url: str) -> None:
                verify_answers(lineage.bento, partial(request_answer, url, max_new_tokens=max_new_tokens), samples)

            with group.locked(image.digest):
                group.check_host()  # of a proxy that another run created in the meantime
                group.check_token()
                return group.deploy(image, verify)

    def rollback(self) -> DeployOutcome:
        """Start a service of the kept one's image, switch the proxy to it, and keep the current service.

        A second rollback undoes this. The service gets the settings of this process, like that of a deployment.

        Raises:
            DeployError: there is no kept service, the new one is not ready in time, the current one requires a token
                and this process has none, or the engine fails.
        """
        with self._open() as group:
            image = group.any_image()
            if image is None:
                raise DeployError(f"port {self.config.port} has no previous version to roll back to")
            with group.locked(image):
                group.check_token()
                return group.rollback()

    @contextmanager
    def _open(self) -> Iterator["_ServiceGroup"]:
        try:
            with connect() as client:
                if not is_local(client):
                    raise DeployError(
                        "the container engine is on another machine, so this machine cannot reach the service; run "
                        "this there, or set DOCKER_HOST to an engine of this machine"
                    )
                yield _ServiceGroup(client, self.config)
        except (EngineError, bento.BentoError) as error:
            raise DeployError(str(error)) from error


class _ServiceGroup:
    """The containers of one port: the proxy, and the services that it can forward to."""

    def __init__(self, client: DockerClient, config: DeployConfig) -> None:
        self.client = client
        self.config = config
        self._memory = config.memory or MEMORY
        self.name = f"{NAME}-{config.port}"
        self.url = f"http://{config.host if config.host != '0.0.0.0' else '127.0.0.1'}:{config.port}"  # noqa: S104 (compares)

    @contextmanager
    def locked(self, image: str) -> Iterator[None]:
        """Context manager: exclude other deployments and rollbacks; remove what killed ones left behind."""
        with engine_lock(self.client, f"{self.name}-lock", image):
            current = self.current()
            for service in self._services():
                if not _is_verified(service) and (current is None or service.id != current.id):
                    logger.warning("removing the container %s, which a killed run left unverified", service.name)
                    service.remove(force=True)
            yield

    def deploy(self, image: Image, verify: Callable[[str], None]) -> DeployOutcome:
        current = self.current()
        if current is not None and self.is_up_to_date(current, image.digest):
            verify(self.url)
            return self.outcome("unchanged", current, self.previous(current))
        service = self.replace(current, image.digest, image.reference, verify)
        previous = self.previous(service, current)
        self.stop_old_services(service, previous)
        return self.outcome("deployed", service, previous)

    def rollback(self) -> DeployOutcome:
        current = self.current()
        previous = self.previous(current)
        if previous is None:
            raise DeployError(f"port {self.config.port} has no previous version to roll back to")
        # not the kept container, which has the tokens and other settings of its time
        service = self.replace(current, _image(previous), _bento_of(previous), verify=None)
        self.stop_old_services(service, current)
        return self.outcome("rolled_back", service, current)

    def replace(
        self, current: Container | None, image: str, tag: str, verify: Callable[[str], None] | None
    ) -> Container:
        """Start a service with the settings of this process, verify it, and switch the proxy to it."""
        try:
            service = self.create_service(image, tag)
            try:
                service.start()
                url = self.wait_until_ready(service)
                if verify is not None:
                    verify(url)
                service.update(restart_policy=RESTART)
                self.switch(service, current)
            except BaseException:
                service.remove(force=True)
                raise
        except BaseException:
            self.remove_if_unused()
            raise
        return service

    def check_host(self) -> None:
        """Check deploy.host: a proxy cannot change its address, and a second proxy cannot use the same port."""
        proxy = self._get(self.name)
        host = self.config.host if proxy is None else proxy.attrs["HostConfig"]["PortBindings"][PORT][0]["HostIp"]
        if host != self.config.host:
            raise DeployError(
                f"deploy.host is {self.config.host}, but port {self.config.port} is served on {host}; choose another "
                f"deploy.port, or remove the existing proxy: docker rm -f {self.name}"
            )

    def check_port(self) -> None:
        """Check that another program does not listen on the port, unless the proxy runs, which listens on it."""
        proxy = self._get(self.name)
        if proxy is not None and proxy.status in ("running", "paused"):
            return
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
            try:
                listener.bind((self.config.host, self.config.port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise self._port_in_use() from None
                if error.errno == errno.EADDRNOTAVAIL:
                    raise DeployError(f"deploy.host is {self.config.host}, no address of this machine") from None
                # any other reason, such as a port that only the engine may open, is left to the engine

    def check_token(self) -> None:
        """Check that this process has a token if the current service requires one: the next would be open to anyone."""
        current = self.current()
        if current is not None and TOKEN in _environment(current) and TOKEN not in service_environment():
            raise DeployError(
                f"the service of port {self.config.port} requires a token; set {TOKEN}, or remove the service if the "
                f"next one is to be open: docker rm -f {current.name}"
            )

    def _port_in_use(self) -> DeployError:
        return DeployError(
            f"port {self.config.port} of {self.config.host} is in use by another program; stop that, or set "
            "deploy.port to a free port"
        )

    def current(self) -> Container | None:
        """Return the service that the proxy forwards requests to; None if there is none.

        Without a proxy, or if it has no complete address after a power loss: the verified service that runs.
        """
        if address := re.fullmatch(r"http://([\w.-]+):\d+\n", self._address()):
            return self._get(address[1])
        return _newest(service for service in self._services() if _is_verified(service) and service.status != "exited")

    def previous(self, service: Container | None, replaced: Container | None = None) -> Container | None:
        """Return the version to roll back to from `service`; None if there is none.

        This is `replaced` or else the verified service that was started last, but none of the same image.
        """
        image = None if service is None else _image(service)
        if replaced is not None and _image(replaced) != image:
            return replaced
        return _newest(other for other in self._services() if _is_verified(other) and _image(other) != image)

    def any_image(self) -> str | None:
        """Return the image of a service; None if there is no service."""
        return next((_image(service) for service in self._services()), None)

    def create_service(self, image: str, tag: str) -> Container:
        """Create a service that only the proxy's network and this machine can reach."""
        if not self._networks():
            self.client.networks.create(self.name)
        environment, mounts = mount_files(service_environment())
        # run as the user of this process, who owns the mounted files, instead of the image's user
        user = {"user": f"{os.getuid()}:{os.getgid()}"} if mounts else {}
        return self.client.containers.create(
            image,
            name=f"{self.name}-{token_hex(4)}",
            labels={DEPLOYMENT_LABEL: self.name, BENTO_LABEL: tag},
            network=self.name,
            ports={PORT: ("127.0.0.1",)},
            mem_limit=self._memory,
            environment=environment,
            mounts=mounts,
            detach=True,
            **user,
            **self._log_limit(),
            **HARDENING,
        )

    def wait_until_ready(self, service: Container) -> str:
        """Wait for a service; return the URL at which this machine reaches it without the proxy."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            service.reload()
            if service.status != "running":
                state = service.attrs["State"]
                reason = "ran out of memory" if state["OOMKilled"] else f"ended with exit code {state['ExitCode']}"
                raise DeployError(f"{_bento_of(service)} {reason}; its log ends:\n{_log_tail(service)}")
            url = f"http://127.0.0.1:{service.ports[PORT][0]['HostPort']}"
            if is_ready(url):
                return url
            time.sleep(POLL)
        raise DeployError(
            f"{_bento_of(service)} was not ready after {START_TIMEOUT} seconds; its log ends:\n{_log_tail(service)}"
        )

    def switch(self, new: Container, old: Container | None) -> None:
        """Make the proxy forward requests to `new`. If that fails, restore `old`, or remove the proxy."""
        existing = self._get(self.name)
        proxy = existing or self._create_proxy(_image(new))
        _set_current(proxy, new)
        try:
            self._start_proxy(proxy)
        except BaseException:
            if existing is None or old is None:
                proxy.remove(force=True, v=True)
            else:
                _set_current(proxy, old)
            raise

    def stop_old_services(self, current: Container, kept: Container | None) -> None:
        """Drain and stop every verified service except `current`; remove the stopped services except `kept`."""
        time.sleep(CONNECT_TIME)
        for service in self._services():
            if _is_verified(service) and service.id != current.id:
                service.stop(timeout=STOP_TIMEOUT)
                if kept is None or service.id != kept.id:
                    service.remove()

    def remove_if_unused(self) -> None:
        """Remove network and volume if they have no container, as after a failed first deployment."""
        if self._get(self.name) is None and not self._services():
            with suppress(APIError):  # there is no volume, or the engine still uses it
                for network in self._networks():
                    network.remove()
                self.client.volumes.get(self.name).remove()

    def is_up_to_date(self, current: Container, image: str) -> bool:
        """Whether the service is ready and has this image, the configured memory and this process's settings."""
        environment, mounts = mount_files(service_environment())
        return (
            current.image.id == image
            and service_environment(_environment(current)) == environment
            and _places(current.attrs["HostConfig"].get("Mounts") or []) == _places(mounts)
            and current.attrs["HostConfig"]["Memory"] == parse_bytes(self._memory)
            and is_ready(self.url)
        )

    def outcome(self, outcome: str, current: Container, previous: Container | None) -> DeployOutcome:
        return DeployOutcome(
            target="docker",
            outcome=outcome,
            bento=_bento_of(current),
            url=self.url,
            image=_bento_of(current),
            image_id=current.image.id,
            container=current.name,
            previous=_version(previous),
        )

    def _create_proxy(self, image: str) -> Container:
        return self.client.containers.create(
            image,
            name=self.name,
            entrypoint=["python", "-m", "deploy.containers.proxy"],
            network=self.name,
            ports={PORT: (self.config.host, self.config.port)},
            volumes={self.name: {"bind": str(ADDRESS.parent), "mode": "rw"}},
            mem_limit=PROXY_MEMORY,
            restart_policy=RESTART,
            detach=True,
            **self._log_limit(),
            **HARDENING,
        )

    def _log_limit(self) -> dict[str, Any]:
        """Return container options for log rotation: logs of Docker's default driver would grow without limit."""
        if self.client.info().get("LoggingDriver") != LogConfig.types.JSON:
            return {}
        return {"log_config": LogConfig(type=LogConfig.types.JSON, config=LOG_LIMIT)}

    def _start_proxy(self, proxy: Container) -> None:
        """Start the proxy if it does not run, and wait until it reaches the current service."""
        try:
            if proxy.status == "paused":
                proxy.unpause()
            proxy.start()
        except APIError as error:
            if "already" in str(error):  # "port is already allocated", "address already in use"
                raise self._port_in_use() from None
            raise
        deadline = time.monotonic() + START_TIMEOUT
        while not is_ready(self.url):
            if time.monotonic() > deadline:
                raise DeployError(f"{self.url} does not respond; the proxy's log ends:\n{_log_tail(proxy)}")
            time.sleep(POLL)

    def _address(self) -> str:
        """Return the content of the proxy's address file; "" if there is none."""
        proxy = self._get(self.name)
        try:
            return "" if proxy is None else read_file(proxy, address_file(proxy)).decode(errors="replace")
        except NotFound:
            return ""

    def _networks(self) -> list[Network]:
        return [network for network in self.client.networks.list(names=[self.name]) if network.name == self.name]

    def _services(self) -> list[Container]:
        label = f"{DEPLOYMENT_LABEL}={self.name}"
        return list(self.client.containers.list(all=True, filters={"label": label}, ignore_removed=True))

    def _get(self, name: str) -> Container | None:
        try:
            return self.client.containers.get(name)
        except NotFound:
            return None


def _newest(services: Iterable[Container]) -> Container | None:
    return max(services, key=lambda service: str(service.attrs["State"]["StartedAt"]), default=None)


def _image(service: Container) -> str:
    """Return the ID of a service's image, which the engine may not have any more."""
    return str(service.attrs["Image"])


def _environment(service: Container) -> dict[str, str]:
    return dict(variable.split("=", 1) for variable in service.attrs["Config"]["Env"])


def _is_verified(service: Container) -> bool:
    return service.attrs["HostConfig"]["RestartPolicy"]["Name"] not in ("", "no")


def _places(mounts: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    return {(mount["Source"], mount["Target"]) for mount in mounts}


def _set_current(proxy: Container, service: Container) -> None:
    address = f"http://{service.name}:{PORT.partition('/')[0]}\n"
    write_file(proxy, address_file(proxy), address.encode())


def address_file(proxy: Container) -> str:
    """Return the path of the file with the current service's address in a proxy's container.

    Deployments do not replace an existing proxy, so the proxy of an older version may have another mount point.
    """
    proxy.reload()  # the object of a newly created container has no mounts yet
    [mount] = [mount for mount in proxy.attrs["Mounts"] if mount.get("Name") == proxy.name]
    return f"{mount['Destination']}/{ADDRESS.name}"


def _version(service: Container | None) -> Version | None:
    return None if service is None else Version(bento=_bento_of(service), image=_bento_of(service))


def _bento_of(service: Container) -> str:
    return str(service.labels[BENTO_LABEL])


def _log_tail(container: Container) -> str:
    return str(container.logs(tail=30).decode(errors="replace")).strip()
