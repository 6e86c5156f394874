"""The container of a deployment's reverse proxy (`proxy.py`): create it, start it, and switch it to another service."""

import errno
import re
import socket
import time

from docker import DockerClient
from docker.errors import APIError, NotFound
from docker.models.containers import Container

from deploy.config import DeployConfig
from deploy.containers.client import find_container, read_file, write_file
from deploy.containers.proxy import ADDRESS
from deploy.containers.service import PORT, RESTART, common_options, image_of, log_tail
from deploy.server import START_TIMEOUT
from deploy.target import DeployError
from deploy.verify import is_ready

MEMORY = "256m"  # limit
POLL = 0.1  # seconds


class ProxyContainer:
    """The proxy of one port, whether its container exists or not. The container and its volume have the same name."""

    def __init__(self, client: DockerClient, name: str, config: DeployConfig) -> None:
        self._client, self.name, self._host, self._port = client, name, config.host, config.port
        self.url = f"http://{config.host if config.host != '0.0.0.0' else '127.0.0.1'}:{config.port}"  # noqa: S104 (compares)

    def find(self) -> Container | None:
        """Return the container; None if there is none."""
        return find_container(self._client, self.name)

    def service(self) -> str | None:
        """Return the name of the service that it forwards requests to.

        None: there is no proxy, or its address file is not complete after a power loss.
        """
        proxy = self.find()
        try:
            content = b"" if proxy is None else read_file(proxy, address_file(proxy))
        except NotFound:
            return None
        address = re.fullmatch(r"http://([\w.-]+):\d+\n", content.decode(errors="replace"))
        return None if address is None else address[1]

    def switch(self, new: Container, old: Container | None) -> None:
        """Make the proxy forward requests to `new`. If that fails, restore `old`, or remove the proxy."""
        existing = self.find()
        proxy = existing or self._create(image_of(new))
        _set_service(proxy, new)
        try:
            self._start(proxy)
        except BaseException:
            if existing is None or old is None:
                proxy.remove(force=True, v=True)
            else:
                _set_service(proxy, old)
            raise

    def check_host(self) -> None:
        """Check deploy.host: a proxy cannot change its address, and a second proxy cannot use the same port.

        Raises:
            DeployError: the port is served on another address.
        """
        proxy = self.find()
        host = self._host if proxy is None else proxy.attrs["HostConfig"]["PortBindings"][PORT][0]["HostIp"]
        if host != self._host:
            raise DeployError(
                f"deploy.host is {self._host}, but port {self._port} is served on {host}; choose another deploy.port, "
                f"or remove the existing proxy: docker rm -f {self.name}"
            )

    def check_port(self) -> None:
        """Check that the proxy can listen on its port, unless it runs: then it does.

        Raises:
            DeployError: another program listens on the port, or the address is not of this machine.
        """
        proxy = self.find()
        if proxy is not None and proxy.status in ("running", "paused"):
            return
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
            try:
                listener.bind((self._host, self._port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise self._port_in_use() from None
                if error.errno == errno.EADDRNOTAVAIL:
                    raise DeployError(f"deploy.host is {self._host}, no address of this machine") from None
                # any other reason, such as a port that only the engine may open, is left to the engine

    def _port_in_use(self) -> DeployError:
        return DeployError(
            f"port {self._port} of {self._host} is in use by another program; stop that, or set deploy.port to a free "
            "port"
        )

    def _create(self, image: str) -> Container:
        return self._client.containers.create(
            image,
            name=self.name,
            entrypoint=["python", "-m", "deploy.containers.proxy"],
            ports={PORT: (self._host, self._port)},
            volumes={self.name: {"bind": str(ADDRESS.parent), "mode": "rw"}},
            mem_limit=MEMORY,
            restart_policy=RESTART,
            **common_options(self._client, network=self.name),
        )

    def _start(self, proxy: Container) -> None:
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
                raise DeployError(f"{self.url} does not respond; the proxy's log ends:\n{log_tail(proxy)}")
            time.sleep(POLL)


def _set_service(proxy: Container, service: Container) -> None:
    address = f"http://{service.name}:{PORT.partition('/')[0]}\n"
    write_file(proxy, address_file(proxy), address.encode())


def address_file(proxy: Container) -> str:
    """Return the path of the file with the current service's address in a proxy's container.

    Deployments do not replace an existing proxy, so the proxy of an older version may have another mount point.
    """
    proxy.reload()  # the object of a newly created container has no mounts yet
    [mount] = [mount for mount in proxy.attrs["Mounts"] if mount.get("Name") == proxy.name]
    return f"{mount['Destination']}/{ADDRESS.name}"
