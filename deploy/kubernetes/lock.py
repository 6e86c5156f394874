"""A lock of a namespace, for deployments and rollbacks of all processes and machines.

The lock is a Lease that its holder renews. A Lease that is not renewed belongs to a killed process, and anyone may take
it over. As in client-go's leader election, each waiting process measures this time with its own clock, so the clocks of
different machines may differ.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from datetime import UTC, datetime
from secrets import token_hex
from threading import Event, Thread

from deploy.kubernetes.client import Cluster, Manifest
from deploy.kubernetes.errors import ConflictError, KubeError, NotFoundError
from deploy.target import LOCK_TIMEOUT
from gpt2core.types import NAME

logger = logging.getLogger(__name__)

EXPIRY = 60.0  # seconds without a renewal after which the lock may be taken over
RENEWAL = 10.0  # seconds between renewals
POLL = 1.0  # seconds


@contextmanager
def namespace_lock(cluster: Cluster) -> Iterator[None]:
    """Context manager: hold the lock of the namespace, which must exist; waits while another process holds it.

    Raises:
        KubeError: another process still holds it after `LOCK_TIMEOUT`.
    """
    cluster = copy(cluster)  # its requests do not wait for the end of an outage
    holder = f"{socket.gethostname()}, process {os.getpid()}, {token_hex(4)}"
    _acquire(cluster, holder)
    ended = Event()
    renewal = Thread(target=_renew, args=(cluster, holder, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        _release(cluster, holder)


def _acquire(cluster: Cluster, holder: str) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT
    version, seen_at = "", 0.0
    while True:
        lease = cluster.get("Lease")
        if lease is None or _holder(lease) == holder:  # ours: the response to the creation was lost
            acquired = lease is not None or _try_write(cluster, holder, None)
        else:
            if lease["metadata"]["resourceVersion"] != version:
                if not version:
                    logger.info("waiting for another deployment in %s, by %s", cluster, _holder(lease))
                version, seen_at = lease["metadata"]["resourceVersion"], time.monotonic()
            acquired = time.monotonic() > seen_at + EXPIRY and _try_write(cluster, holder, lease)
        if acquired:
            return
        if time.monotonic() > deadline and lease is not None:
            raise KubeError(
                f"another deployment in {cluster}, by {_holder(lease)}, did not end within {LOCK_TIMEOUT} seconds; "
                f"wait until it ends (the Lease {NAME} is its lock)"
            )
        time.sleep(POLL)


def _try_write(cluster: Cluster, holder: str, lease: Manifest | None) -> bool:
    """Create the Lease, or take over or renew this one; return False if another process was faster."""
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    spec = {"holderIdentity": holder, "leaseDurationSeconds": int(EXPIRY), "renewTime": now}
    try:
        if lease is None:
            metadata = {"name": NAME, "labels": {"app.kubernetes.io/name": NAME}}
            cluster.create(
                {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
            )
        else:
            try:
                cluster.replace(lease | {"spec": spec})
            except NotFoundError:
                return False
        return True
    except ConflictError:
        return False


def _renew(cluster: Cluster, holder: str, ended: Event) -> None:
    while not ended.wait(RENEWAL):
        try:
            lease = cluster.get("Lease")
            if lease is None or _holder(lease) != holder:
                logger.warning("the lock of this deployment, the Lease %s in %s, was taken over", NAME, cluster)
                return
            _try_write(cluster, holder, lease)
        except KubeError as error:  # an outage: the next renewal may succeed
            logger.debug("the Lease %s could not be renewed: %s", NAME, error)


def _release(cluster: Cluster, holder: str) -> None:
    try:
        lease = cluster.get("Lease")
        if lease is not None and _holder(lease) == holder:
            cluster.delete("Lease", version=lease["metadata"]["resourceVersion"])
    except KubeError as error:
        logger.warning("the Lease %s could not be deleted, and expires in %.0f seconds: %s", NAME, EXPIRY, error)


def _holder(lease: Manifest) -> str:
    return str(lease.get("spec", {}).get("holderIdentity", "another program"))
