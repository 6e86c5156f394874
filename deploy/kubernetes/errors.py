"""Errors of the Kubernetes target, and the translation of API errors into messages that say what to do."""

import json
import re
from dataclasses import dataclass
from typing import Any

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from deploy.target import DeployError
from gpt2core.types import NAME

UNAVAILABLE = (429, 500, 502, 503, 504)  # statuses of a server that may recover


class KubeError(DeployError):
    """The cluster cannot be reached or used as configured, or a rollout failed."""


class NotFoundError(KubeError):
    """There is no object of this name."""


class ConflictError(KubeError):
    """The object was changed after it was read, or exists already."""


class SupersededError(KubeError):
    """Someone else has deployed another version in the meantime, which must not be rolled back."""


class UnavailableError(KubeError):
    """The API server did not respond, or not now; it may recover."""


@dataclass(frozen=True)
class Connection:
    """Description of the connection to a cluster, for messages. `str()` is the namespace and the API server."""

    host: str
    namespace: str
    source: str  # source of the credentials: a kubeconfig or the pod's service account

    def __str__(self) -> str:
        return f"namespace {self.namespace} of {self.host}"


def translate_api_error(error: ApiException, method: str, path: str, connection: Connection) -> KubeError:
    """Return the error for a response with an error status."""
    host, source = connection.host, connection.source
    status = _status(error.body)
    details = status.get("details", {})
    message = status.get("message") or error.body or error.reason
    match error.status:
        case 401 if '"unauthorized"' in (error.body or ""):  # response of the service, through the API server's proxy
            return KubeError(
                f"the service requires a token: set GPT2_API_TOKEN in the environment of this run to the value in "
                f"Secret {NAME} of {connection}"
            )
        case 401:
            return KubeError(
                f"{host} does not accept the credentials of {source}: they are wrong or have expired; log in again "
                "(check with `kubectl get namespaces`)"
            )
        case 404 if details.get("name"):
            return NotFoundError(f"{host} has no such object: {message}")
        case 404:
            return KubeError(
                f"{host} does not know {path}: Kubernetes 1.27 or later is required, and {source} must have the "
                "address of the API server"
            )
        case 403 if "exceeded quota" in message:
            return KubeError(f"the quota of {connection} is used up: {message}; free some of it or have it raised")
        case 403 if "is being terminated" in message:
            return KubeError(f"{connection} is being deleted; wait until it is gone, then run the same command again")
        case 403 if not re.search('User ".*" cannot ', message):
            return KubeError(f"{method} {path} on {host} was refused by a policy of the cluster: {message}")
        case 403:
            return KubeError(f"{source} lacks a permission: {message}; k8s/optional/deployer.yaml grants it")
        case 409 if "causes" in details:
            fields = "; ".join(f"{cause['field']}: {cause['message']}" for cause in details["causes"])
            return KubeError(
                f"another field manager set fields of {path.rpartition('/namespaces/')[2]} in {connection} that k8s/ "
                f"sets too: {fields}. Put their values into k8s/, or take the fields over with "
                "`--set deploy.force=true`"
            )
    kinds = {409: ConflictError} | dict.fromkeys(UNAVAILABLE, UnavailableError)
    return kinds.get(error.status, KubeError)(f"{method} {path} on {host} failed with status {error.status}: {message}")


def translate_connection_error(error: HTTPError, connection: Connection) -> KubeError:
    """Return the error for a request without a response."""
    cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
    if isinstance(cause, SSLError):
        return KubeError(f"{connection.source} does not trust the certificate of {connection.host}: {cause}")
    return UnavailableError(
        f"{connection.host} cannot be reached ({type(cause).__name__}); check that the cluster is running, that this "
        f"network reaches it, and that {connection.source} is the right one"
    )


def _status(body: Any) -> dict[str, Any]:
    """Return the body as a Kubernetes Status object; {} if it is not one."""
    try:
        status = json.loads(body)
    except (TypeError, ValueError):
        return {}
    return status if isinstance(status, dict) and status.get("kind") == "Status" else {}
