"""The docker target: a service in a local container, behind a reverse proxy that owns the port.

The port identifies a deployment. For port 3000, gpt2-instruct-3000 is the name of the proxy (`proxy_container.py`), of
the network that proxy and services (`service.py`) share, and of the volume that stores the current service's address.
The previous service is stopped but kept for `rollback`, which starts another service of its image. A service gets a
restart policy when it is verified: a service without one, except the current service, was left behind by a killed run.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from docker import DockerClient
from docker.errors import APIError
from docker.models.containers import Container
from docker.models.networks import Network

from deploy.bento import BentoError
from deploy.config import DeployConfig
from deploy.containers.client import EngineError, connect, find_container, is_local
from deploy.containers.images import Image, service_image
from deploy.containers.lock import engine_lock
from deploy.containers.mounts import mount_files
from deploy.containers.proxy_container import ProxyContainer
from deploy.containers.service import (
    RESTART,
    Services,
    bento_of,
    environment_of,
    image_of,
    is_verified,
    newest,
    version_of,
    wait_until_ready,
)
from deploy.server import service_environment
from deploy.target import DeployError, DeployOutcome
from deploy.verify import is_ready, request_answer, verify_answers
from gpt2core.types import NAME, Lineage, Sample

logger = logging.getLogger(__name__)

TOKEN = "GPT2_API_TOKEN"  # noqa: S105 (the variable's name)
CONNECT_TIME = 2  # seconds in which requests that the proxy received before the switch connect to the old service
STOP_TIMEOUT = 75  # seconds; longer than the service's time limit for a request
MEMORY = "2g"  # limit of a service; gpt2-nano takes 340 MB


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
        with self._open() as deployment:
            deployment.proxy.check_host()
            deployment.proxy.check_port()
            deployment.check_token()

    def deploy(self, lineage: Lineage, samples: Sequence[Sample], max_new_tokens: int) -> DeployOutcome:
        """Start a service of the Bento, verify its answers, switch the proxy to it, and drain the previous service.

        Raises:
            DeployError: the image cannot be built, the service is not ready in time or answers differently, the port is
                in use, the current service requires a token and this process has none, or the engine fails.
        """
        with self._open() as deployment:
            deployment.proxy.check_host()
            image = service_image(lineage.bento)

            def verify(url: str) -> None:
                verify_answers(lineage.bento, partial(request_answer, url, max_new_tokens=max_new_tokens), samples)

            with deployment.locked(image.digest):
                deployment.proxy.check_host()  # of a proxy that another run created in the meantime
                deployment.check_token()
                return deployment.deploy(image, verify)

    def rollback(self) -> DeployOutcome:
        """Start a service of the kept one's image, switch the proxy to it, and keep the current service.

        A second rollback undoes this. The service gets the settings of this process, like that of a deployment.

        Raises:
            DeployError: there is no kept service, the new one is not ready in time, the current one requires a token
                and this process has none, or the engine fails.
        """
        with self._open() as deployment:
            services = deployment.services.all()
            if not services:
                raise deployment.no_previous_version()
            with deployment.locked(image_of(services[0])):
                deployment.check_token()
                return deployment.rollback()

    @contextmanager
    def _open(self) -> Iterator["_Deployment"]:
        try:
            with connect() as client:
                if not is_local(client):
                    raise DeployError(
                        "the container engine is on another machine, so this machine cannot reach the service; run "
                        "this there, or set DOCKER_HOST to an engine of this machine"
                    )
                yield _Deployment(client, self.config)
        except (EngineError, BentoError) as error:
            raise DeployError(str(error)) from error


class _Deployment:
    """The containers of one port: the proxy, and the services that it can forward to."""

    def __init__(self, client: DockerClient, config: DeployConfig) -> None:
        self._client, self._port = client, config.port
        self.name = f"{NAME}-{config.port}"
        self.proxy = ProxyContainer(client, self.name, config)
        self.services = Services(client, self.name, config.memory or MEMORY)

    @contextmanager
    def locked(self, image: str) -> Iterator[None]:
        """Context manager: exclude other deployments and rollbacks; remove what killed ones left behind."""
        with engine_lock(self._client, f"{self.name}-lock", image):
            current = self.current()
            for service in self.services.all():
                if not is_verified(service) and (current is None or service.id != current.id):
                    logger.warning("removing the container %s, which a killed run left unverified", service.name)
                    service.remove(force=True)
            yield

    def deploy(self, image: Image, verify: Callable[[str], None]) -> DeployOutcome:
        current = self.current()
        if current is not None and self.services.is_up_to_date(current, image.digest) and is_ready(self.proxy.url):
            verify(self.proxy.url)
            return self._outcome("unchanged", current, self.previous(current))
        service = self._replace(current, image.digest, image.reference, verify)
        previous = self.previous(service, current)
        self._stop_others(service, previous)
        return self._outcome("deployed", service, previous)

    def rollback(self) -> DeployOutcome:
        current = self.current()
        previous = self.previous(current)
        if previous is None:
            raise self.no_previous_version()
        # not the kept container, which has the tokens and other settings of its time
        service = self._replace(current, image_of(previous), bento_of(previous), verify=None)
        self._stop_others(service, current)
        return self._outcome("rolled_back", service, current)

    def check_token(self) -> None:
        """Check that this process has a token if the current service requires one: the next would be open to anyone."""
        current = self.current()
        if current is not None and TOKEN in environment_of(current) and TOKEN not in service_environment():
            raise DeployError(
                f"the service of port {self._port} requires a token; set {TOKEN}, or remove the service if the next "
                f"one is to be open: docker rm -f {current.name}"
            )

    def current(self) -> Container | None:
        """Return the service that the proxy forwards requests to; None if there is none.

        If the proxy does not name one: the verified service that runs.
        """
        if name := self.proxy.service():
            return find_container(self._client, name)
        return newest(service for service in self.services.verified() if service.status != "exited")

    def previous(self, service: Container | None, replaced: Container | None = None) -> Container | None:
        """Return the version to roll back to from `service`; None if there is none.

        This is `replaced` or else the verified service that was started last, but none of the same image.
        """
        image = None if service is None else image_of(service)
        if replaced is not None and image_of(replaced) != image:
            return replaced
        return newest(other for other in self.services.verified() if image_of(other) != image)

    def no_previous_version(self) -> DeployError:
        return DeployError(f"port {self._port} has no previous version to roll back to")

    def _replace(
        self, current: Container | None, image: str, tag: str, verify: Callable[[str], None] | None
    ) -> Container:
        """Start a service with the settings of this process, verify it, and switch the proxy to it."""
        try:
            if not self._networks():
                self._client.networks.create(self.name)
            service = self.services.create(image, tag)
            try:
                service.start()
                url = wait_until_ready(service)
                if verify is not None:
                    verify(url)
                service.update(restart_policy=RESTART)
                self.proxy.switch(service, current)
            except BaseException:
                service.remove(force=True)
                raise
        except BaseException:
            self._remove_if_unused()
            raise
        return service

    def _stop_others(self, current: Container, kept: Container | None) -> None:
        """Drain and stop every verified service except `current`; remove the stopped services except `kept`."""
        time.sleep(CONNECT_TIME)
        for service in self.services.verified():
            if service.id != current.id:
                service.stop(timeout=STOP_TIMEOUT)
                if kept is None or service.id != kept.id:
                    service.remove()

    def _remove_if_unused(self) -> None:
        """Remove network and volume if they have no container, as after a failed first deployment."""
        if self.proxy.find() is None and not self.services.all():
            with suppress(APIError):  # there is no volume, or the engine still uses it
                for network in self._networks():
                    network.remove()
                self._client.volumes.get(self.name).remove()

    def _networks(self) -> list[Network]:
        return [network for network in self._client.networks.list(names=[self.name]) if network.name == self.name]

    def _outcome(self, outcome: str, current: Container, previous: Container | None) -> DeployOutcome:
        return DeployOutcome(
            target="docker",
            outcome=outcome,
            bento=bento_of(current),
            url=self.proxy.url,
            image=bento_of(current),
            image_id=current.image.id,
            container=current.name,
            previous=version_of(previous),
        )
