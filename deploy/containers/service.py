"""Deployments on this machine: a service in a container, behind a front that holds the port while services change.

A deployment is known by its port: gpt2-instruct-3000 is the name of its front (`bentos/front.py`), of the network that
front and services share, and of the volume with the file that tells the front which service is current. The service
before the current one is kept, stopped, for `rollback`.
"""

import io
import tarfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from posixpath import basename, dirname
from secrets import token_hex
from typing import Any

import requests
from docker import DockerClient
from docker.errors import APIError, NotFound
from docker.models.containers import Container
from docker.utils import parse_bytes

from deploy import bento
from deploy.config import DeployConfig
from deploy.containers.images import EngineError, engine, read_file, service_image
from deploy.server import SERVICE_VARIABLES, service_environment
from deploy.verify import request_answer, verify_answers

LABEL = "gpt2-instruct.deployment"
PORT = "3000/tcp"  # of the image
ADDRESS = "/front/address"  # bentos/front.py's
START_TIMEOUT = 180  # seconds; a base of 1.5 GB is read in that time
LAST_CONNECT = 2  # seconds in which a request that the front had begun reaches the service before
GRACE = 75  # seconds; longer than the service's deadline for an answer
RESTART = {"Name": "unless-stopped"}
CONFINED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": {"/tmp": "size=128m,mode=1777"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "pids_limit": 512,
    "detach": True,
}


class DeployError(RuntimeError):
    """A deployment that could not be made or taken back; what served before serves on."""


def deploy(tag: str, config: DeployConfig, samples: Sequence[Mapping[str, Any]], max_new_tokens: int) -> dict[str, Any]:
    """Put the Bento's service where users ask, once it answers the samples as the model did; the older one steps back.

    Raises:
        DeployError: it was not ready in time, or the port is taken.
        EngineError: no engine, or the image could not be built.
        BentoError: it answers otherwise.
    """
    image = service_image(tag)
    with engine() as client:
        site = _Site(client, config)
        site.check_host()

        def check(url: str) -> None:
            asked = partial(request_answer, url, max_new_tokens=max_new_tokens)
            verify_answers(tag, asked, samples)

        current = site.current()
        if current is not None and site.serves(current, image.digest):
            check(site.url)
            return site.outcome("unchanged", current, site.previous(current))
        candidate = site.run(image.digest, tag)
        try:
            check(site.wait_until_ready(candidate))
            candidate.update(restart_policy=RESTART)
            site.switch(candidate, current)
        except BaseException:
            candidate.remove(force=True)
            raise
        # the same image again is no version to go back to
        same = current is not None and current.image.id == candidate.image.id
        previous = current if current is not None and not same else site.previous(candidate, current)
        site.retire(candidate, previous)
        return site.outcome("deployed", candidate, previous)


def rollback(config: DeployConfig) -> dict[str, Any]:
    """Put the service before the current one back, and stop the current one; done twice, it is as before.

    Raises:
        DeployError: there is none, or it was not ready in time.
        EngineError: no engine.
    """
    with engine() as client:
        site = _Site(client, config)
        current = site.current()
        previous = site.previous(current)
        if previous is None:
            raise DeployError(f"nothing was deployed on port {config.port} before what is there now")
        previous.start()
        try:
            site.wait_until_ready(previous)
            site.switch(previous, current)
        except BaseException:
            previous.stop(timeout=GRACE)
            raise
        site.retire(previous, current)
        return site.outcome("rolled_back", previous, current)


class _Site:
    """The containers of one port."""

    def __init__(self, client: DockerClient, config: DeployConfig) -> None:
        self.client = client
        self.config = config
        self.name = f"{bento.NAME}-{config.port}"
        self.url = f"http://{config.host if config.host != '0.0.0.0' else '127.0.0.1'}:{config.port}"

    def check_host(self) -> None:
        """A front can't change the address that it listens on, and a second one can't have its port."""
        front = self._get(self.name)
        host = self.config.host if front is None else front.attrs["HostConfig"]["PortBindings"][PORT][0]["HostIp"]
        if host != self.config.host:
            raise DeployError(
                f"deploy.host is {self.config.host}, but port {self.config.port} is served on {host}; take another "
                f"deploy.port, or take that down first: docker rm -f {self.name}"
            )

    def current(self) -> Container | None:
        """The service that the front passes requests on to."""
        front = self._get(self.name)
        if front is None:
            return None
        try:
            address = read_file(front, ADDRESS).decode()
        except NotFound:
            return None
        return self._get(address.removeprefix("http://").partition(":")[0])

    def previous(self, *others: Container | None) -> Container | None:
        """The newest service that is none of the others."""
        ids = {other.id for other in others if other is not None}
        rest = [container for container in self._services() if container.id not in ids]
        return max(rest, key=lambda container: container.attrs["State"]["StartedAt"], default=None)

    def run(self, image: str, tag: str) -> Container:
        """Start a service beside the others, for this machine alone to ask."""
        if not [network for network in self.client.networks.list(names=[self.name]) if network.name == self.name]:
            self.client.networks.create(self.name)
        return self.client.containers.run(
            image,
            name=f"{self.name}-{token_hex(4)}",
            labels={LABEL: self.name, "gpt2-instruct.bento": tag},
            network=self.name,
            ports={PORT: ("127.0.0.1",)},
            mem_limit=self.config.memory,
            environment=service_environment(),
            **CONFINED,
        )

    def wait_until_ready(self, container: Container) -> str:
        """The address at which this machine can ask the service."""
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            container.reload()
            if container.status != "running":
                state = container.attrs["State"]
                reason = "ran out of memory" if state["OOMKilled"] else f"ended with exit code {state['ExitCode']}"
                raise DeployError(f"{_bento_of(container)} {reason}; its log ends:\n{_tail(container)}")
            url = f"http://127.0.0.1:{container.ports[PORT][0]['HostPort']}"
            if _is_ready(url):
                return url
            time.sleep(0.1)
        raise DeployError(
            f"{_bento_of(container)} was not ready after {START_TIMEOUT} seconds; its log ends:\n{_tail(container)}"
        )

    def switch(self, new: Container, old: Container | None) -> None:
        """Let the front pass requests on to `new`; if it cannot, to `old` as before."""
        front = self._get(self.name) or self._create_front(new.image.id)
        _point(front, new)
        try:
            try:
                front.start()  # does nothing where it runs
            except APIError as error:
                if "already" in str(error):  # "port is already allocated", "address already in use"
                    raise DeployError(
                        f"port {self.config.port} of {self.config.host} is taken by something else; stop that, or set "
                        "deploy.port to a free one"
                    ) from None
                raise
            end = time.monotonic() + START_TIMEOUT
            while not _is_ready(self.url):
                if time.monotonic() > end:
                    raise DeployError(f"nothing answers at {self.url}; the front's log ends:\n{_tail(front)}")
                time.sleep(0.1)
        except BaseException:
            if old is None:
                front.remove(force=True, v=True)
            else:
                _point(front, old)
            raise

    def retire(self, current: Container, kept: Container | None) -> None:
        """Let every other service finish its answers and stop, and remove all but the one that is kept."""
        time.sleep(LAST_CONNECT)
        for container in self._services():
            if container.id != current.id:
                container.stop(timeout=GRACE)
                if kept is None or container.id != kept.id:
                    container.remove()

    def serves(self, current: Container, image: str) -> bool:
        """Whether the current service is of this image and is there as configuration and environment ask."""
        has = dict(variable.split("=", 1) for variable in current.attrs["Config"]["Env"])
        return (
            current.image.id == image
            and {name: has[name] for name in SERVICE_VARIABLES if name in has} == service_environment()
            and current.attrs["HostConfig"]["Memory"] == parse_bytes(self.config.memory)
            and _is_ready(self.url)
        )

    def outcome(self, outcome: str, current: Container, previous: Container | None) -> dict[str, Any]:
        return {
            "outcome": outcome,
            "bento": _bento_of(current),
            "url": self.url,
            "image": _bento_of(current),
            "digest": current.image.id,
            "container": current.name,
            "previous": "" if previous is None else _bento_of(previous),
        }

    def _create_front(self, image: str) -> Container:
        return self.client.containers.create(
            image,
            name=self.name,
            entrypoint=["python", "-m", "bentos.front"],
            network=self.name,
            ports={PORT: (self.config.host, self.config.port)},
            volumes={self.name: {"bind": dirname(ADDRESS), "mode": "rw"}},
            mem_limit="256m",
            restart_policy=RESTART,
            **CONFINED,
        )

    def _services(self) -> list[Container]:
        return list(self.client.containers.list(all=True, filters={"label": f"{LABEL}={self.name}"}))

    def _get(self, name: str) -> Container | None:
        try:
            return self.client.containers.get(name)
        except NotFound:
            return None


def _point(front: Container, service: Container) -> None:
    content = f"http://{service.name}:{PORT.partition('/')[0]}\n".encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(basename(ADDRESS))
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    if not front.put_archive(dirname(ADDRESS), archive.getvalue()):
        raise EngineError(f"{front.name} could not be told of {service.name}")


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=5).ok
    except requests.RequestException:
        return False


def _bento_of(service: Container) -> str:
    return str(service.labels["gpt2-instruct.bento"])


def _tail(container: Container) -> str:
    return str(container.logs(tail=30).decode(errors="replace")).strip()
