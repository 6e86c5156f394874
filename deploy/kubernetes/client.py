"""Connection to one namespace of a cluster, and the API calls that a deployment needs.

Objects are plain mappings as in YAML (`Manifest`). Writes are server-side applies under one field manager: fields of
other managers (the HPA's replicas, a GPU variant) are kept, and a manually changed field is a conflict.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from deploy.config import DeployConfig
from deploy.kubernetes.errors import (
    UNAVAILABLE,
    ConflictError,
    Connection,
    KubeError,
    NotFoundError,
    UnavailableError,
    translate_api_error,
    translate_connection_error,
)
from deploy.source import ROOT
from deploy.verify import RESPONSE_TIMEOUT, api_key_header
from gpt2core.types import NAME

logger = logging.getLogger(__name__)

Manifest = dict[str, Any]

DEPLOYER = ROOT / "k8s" / "optional" / "deployer.yaml"  # its Role lists the permissions that a deployment needs
FIELD_MANAGER = NAME
ROLLBACK = f"{NAME}-rollback"  # the field manager of a rollback
KUBECTL = "kubectl-client-side-apply"  # the field manager of `kubectl apply`
OWNERSHIP_ATTEMPTS = 5  # attempts to remove both as owners of fields, while controllers change the object
REVISION = "deployment.kubernetes.io/revision"  # annotation of Deployments and ReplicaSets
CONNECT_TIMEOUT, TIMEOUT = 10, 60  # seconds
OUTAGE_TIMEOUT, OUTAGE_POLL = 600.0, 1.0  # seconds; the first is progressDeadlineSeconds
LOG_LINES = 20  # lines of a crashed container's log in the error
JSON_PATCH = "application/json-patch+json"
PATHS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "Deployment": "/apis/apps/v1/namespaces/{namespace}/deployments",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
    "ReplicaSet": "/apis/apps/v1/namespaces/{namespace}/replicasets",
    "HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
}
ACCESS_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class Cluster:
    """One namespace of a cluster. Every method raises KubeError with a message that says what to do.

    Attributes:
        outage_timeout: seconds for which requests are retried while the API server is unavailable.
    """

    def __init__(self, config: DeployConfig) -> None:
        configuration, source = _load_configuration(config)
        configuration.retries = Retry(
            4,
            connect=2,
            read=1,
            other=0,  # other errors, such as an untrusted certificate
            backoff_factor=0.5,
            status_forcelist=UNAVAILABLE,
            allowed_methods=None,  # every method: apply and predict are safe to repeat
            raise_on_status=False,
        )
        self.connection = Connection(configuration.host, config.namespace, source)
        self._api = client.ApiClient(configuration)
        self.outage_timeout = 0.0

    def __str__(self) -> str:
        return str(self.connection)

    @property
    def namespace(self) -> str:
        return self.connection.namespace

    def get(self, kind: str, name: str = NAME) -> Manifest | None:
        """Return the object; None if it does not exist."""
        try:
            return self._call("GET", f"{self._path(kind)}/{name}")
        except NotFoundError:
            return None

    def create(self, manifest: Manifest) -> None:
        """Create the object; raises ConflictError if it exists."""
        self._call("POST", self._path(manifest["kind"]), manifest)

    def replace(self, manifest: Manifest) -> None:
        """Replace the object; raises ConflictError unless it still has the manifest's resourceVersion."""
        self._call("PUT", f"{self._path(manifest['kind'])}/{manifest['metadata']['name']}", manifest)

    def apply(self, manifest: Manifest, force: bool = False) -> None:
        """Server-side apply: set the manifest's fields and no others.

        Args:
            force: take ownership of fields that another manager owns, instead of failing with a conflict. Also removes
                kubectl's managed fields: otherwise `kubectl apply` would stay a co-owner of fields with equal values,
                and they would conflict when they change.
        """
        written = self._apply(manifest, force)
        if force:
            self._disown(written, lambda: self._apply(manifest, force))

    def dry_run(self, manifest: Manifest, force: bool = False) -> Manifest:
        """Check that `apply` would be accepted (fields of other managers, schema, quota, admission), and return the
        object as it would be.
        """
        return self._apply(manifest, force, [("dryRun", "All")])

    def _apply(self, manifest: Manifest, force: bool, options: Sequence[tuple[str, str]] = ()) -> Manifest:
        path = f"{self._path(manifest['kind'])}/{manifest['metadata']['name']}"
        query = [("fieldManager", FIELD_MANAGER), ("force", str(force).lower()), *options]
        return dict(self._call("PATCH", path, manifest, query, "application/apply-patch+yaml"))

    def patch_deployment(self, patch: list[Manifest], version: str) -> None:
        """Apply a JSON patch to the Deployment. Its field manager is removed, so the next apply does not conflict.

        Args:
            version: resourceVersion of the Deployment that the patch was made for.

        Raises:
            ConflictError: the Deployment has changed since.
        """
        path = f"{self._path('Deployment')}/{NAME}"
        patch = [*patch, {"op": "replace", "path": "/metadata/resourceVersion", "value": version}]
        written = self._call("PATCH", path, patch, [("fieldManager", ROLLBACK)], JSON_PATCH)
        self._disown(written, lambda: self._call("GET", path))

    def _disown(self, written: Manifest, read_again: Callable[[], Manifest]) -> None:
        """Remove `kubectl apply` and rollbacks as owners of fields of an object that was just written."""
        path = f"{self._path(written['kind'])}/{written['metadata']['name']}"
        for _ in range(OWNERSHIP_ATTEMPTS):
            patch = _disown_patch(written)
            if not patch:
                return
            try:
                self._call("PATCH", path, patch, [("fieldManager", FIELD_MANAGER)], JSON_PATCH)
                return
            except ConflictError:  # a controller wrote the status in between
                written = read_again()
        logger.warning("%s or %s is still an owner of fields of %s: it changed too often", KUBECTL, ROLLBACK, path)

    def delete(self, kind: str, name: str = NAME, version: str = "") -> None:
        """Delete the object, if it exists.

        Args:
            version: its resourceVersion; "" for any.

        Raises:
            ConflictError: the object has changed since.
        """
        preconditions = {"preconditions": {"resourceVersion": version}} if version else {}
        with suppress(NotFoundError):
            self._call("DELETE", f"{self._path(kind)}/{name}", {"propagationPolicy": "Background"} | preconditions)

    def replica_sets(self, deployment: Manifest) -> list[Manifest]:
        """Return the ReplicaSets of the Deployment, oldest revision first."""
        uid = deployment["metadata"]["uid"]
        owned = [
            replica_set
            for replica_set in self._list("ReplicaSet", f"app.kubernetes.io/name={NAME}")
            if any(owner["uid"] == uid for owner in replica_set["metadata"].get("ownerReferences", ()))
            and REVISION in replica_set["metadata"].get("annotations", {})
        ]
        return sorted(owned, key=revision)

    def pods(self, replica_set: Manifest) -> list[Manifest]:
        return self._list("Pod", f"pod-template-hash={replica_set['metadata']['labels']['pod-template-hash']}")

    def crash_log(self, pod: str, container: str) -> str:
        """Return the last log lines of the container's previous instance, which crashed."""
        query = [("container", container), ("previous", "true"), ("tailLines", str(LOG_LINES))]
        # not retried during an outage: status 500 may be that of the node
        return str(self._request("GET", f"{self._path('Pod')}/{pod}/log", query=query, response_type="str"))

    def predict(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send POST /predict through the API server's proxy; return the response, {} unless it is a JSON object."""
        path = f"{self._path('Service')}/{NAME}:http/proxy/predict"
        # not retried during an outage: an error status may be the service's
        response = self._request("POST", path, dict(body), timeout=RESPONSE_TIMEOUT, headers=api_key_header())
        return response if isinstance(response, dict) else {}

    def check_permissions(self) -> None:
        """Raise KubeError if the credentials lack a permission that a deployment needs; it names all of them."""
        manifests = yaml.safe_load_all(DEPLOYER.read_text(encoding="utf-8"))
        [role] = [manifest for manifest in manifests if manifest["kind"] == "Role"]
        missing = [
            f"{verb} {resource}{f'.{group}' if group else ''}"
            for rule in role["rules"]
            for group, resource, verb in product(rule["apiGroups"], rule["resources"], rule["verbs"])
            if not self._is_allowed(group, resource, verb)
        ]
        if missing:
            raise KubeError(
                f"{self.connection.source} lacks permissions in {self}: {', '.join(missing)}; ask a cluster "
                "administrator to apply k8s/optional/deployer.yaml and to bind its Role to your user"
            )

    def _is_allowed(self, group: str, resource: str, verb: str) -> bool:
        name, _, subresource = resource.partition("/")
        attributes = {"namespace": self.namespace, "group": group, "resource": name, "verb": verb}
        if subresource:
            attributes["subresource"] = subresource
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        return bool(self._call("POST", ACCESS_REVIEWS, review)["status"]["allowed"])

    def _list(self, kind: str, selector: str) -> list[Manifest]:
        return list(self._call("GET", self._path(kind), query=[("labelSelector", selector)])["items"])

    def _path(self, kind: str) -> str:
        return PATHS[kind].format(namespace=self.namespace)

    def _call(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        """Send a request (`_request`); retry it during an outage of at most `outage_timeout`."""
        deadline = time.monotonic() + self.outage_timeout
        is_reported = False
        while True:
            try:
                return self._request(method, path, *arguments, **options)
            except UnavailableError as error:
                if not self.outage_timeout:
                    raise
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"{error}. Retries failed for {self.outage_timeout:.0f} seconds, so the outcome of the "
                        "rollout is unknown: run the same command again when the API server responds"
                    ) from None
                if not is_reported:
                    logger.warning("%s; retrying for %.0f seconds", error, self.outage_timeout)
                is_reported = True
                time.sleep(OUTAGE_POLL)

    def _request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Sequence[tuple[str, str]] = (),
        content_type: str = "application/json",
        timeout: float = TIMEOUT,
        response_type: str = "object",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        try:
            return self._api.call_api(
                path,
                method,
                query_params=list(query),
                header_params={"Accept": "application/json", "Content-Type": content_type, **headers},
                body=body,
                response_type=response_type,
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=(CONNECT_TIMEOUT, timeout),
            )
        except ApiException as error:
            raise translate_api_error(error, method, path, self.connection) from None
        except HTTPError as error:
            raise translate_connection_error(error, self.connection) from None


def _disown_patch(written: Manifest) -> list[Manifest]:
    """Return the JSON patch that removes the managed fields of `kubectl apply` and of rollbacks; [] if there are none.

    The API server accepts managed fields in a patch of the object and adds an entry for the patch itself only if it
    changes other fields (k8s.io/apimachinery, pkg/util/managedfields: decodeLiveOrNew, managedFieldsUpdater).
    """
    metadata = written["metadata"]
    entries = metadata.get("managedFields", [])
    others = [entry for entry in entries if entry["manager"] not in (KUBECTL, ROLLBACK)]
    if others == entries:
        return []
    return [
        {"op": "replace", "path": "/metadata/managedFields", "value": others},
        # fails if the object has changed since
        {"op": "replace", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
    ]


def revision(manifest: Manifest) -> int:
    """Return the revision of a Deployment or ReplicaSet; 0 before the controller has set it."""
    return int(manifest["metadata"].get("annotations", {}).get(REVISION, 0))


def _load_configuration(config: DeployConfig) -> tuple[client.Configuration, str]:
    """Return the client configuration and the source of its credentials.

    The source is the configured kubeconfig, $KUBECONFIG, the pod's service account, or ~/.kube/config.

    Raises:
        KubeError: there is no usable kubeconfig, or it does not have the configured context.
    """
    configuration = client.Configuration()
    file = config.kubeconfig or os.environ.get("KUBECONFIG", "")
    if not file and not config.context and "KUBERNETES_SERVICE_HOST" in os.environ:
        source = "the pod's service account"
        _load(source, load_incluster_config, configuration)
        return configuration, source
    file = os.path.expanduser(file or "~/.kube/config")
    source = f"the kubeconfig {file}" + (f", context {config.context}" if config.context else "")
    contexts = _contexts(file)
    if config.context and config.context not in contexts:
        raise KubeError(f"deploy.context is {config.context!r}; {file} has {', '.join(contexts) or 'no context'}")
    options = {"context": config.context or None, "client_configuration": configuration, "persist_config": False}
    with _root_errors() as errors:
        _load(source, load_kube_config, file, **options)
    if errors and not configuration.api_key and not configuration.cert_file:
        raise KubeError(f"{source} yields no credentials: {'; '.join(errors)}")
    return configuration, source


def _load(source: str, load: Any, *arguments: Any, **options: Any) -> None:
    """Run one of the client's loaders. Its errors are not chained: they may quote the file, which contains secrets."""
    try:
        load(*arguments, **options)
    except ConfigException as error:
        raise KubeError(f"{source} cannot be used: {error}") from None
    except Exception as error:
        raise KubeError(f"{source} cannot be used: it is malformed ({type(error).__name__})") from None


@contextmanager
def _root_errors() -> Iterator[list[str]]:
    """Context manager: collect the errors that are logged without a logger, as the client does if it cannot run the
    kubeconfig's exec plugin.
    """
    errors: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            errors.append(record.getMessage())
        return True

    root = logging.getLogger()
    root.addFilter(collect)  # sees only records of the root logger itself
    try:
        yield errors
    finally:
        root.removeFilter(collect)


def _contexts(files: str) -> list[str]:
    """Return the names of the contexts in one or more kubeconfigs, whose paths are separated as in $KUBECONFIG."""
    names = []
    for file in filter(os.path.isfile, files.split(os.pathsep)):
        try:
            names += [
                entry["name"] for entry in yaml.safe_load(Path(file).read_text(encoding="utf-8"))["contexts"] or ()
            ]
        except (yaml.YAMLError, OSError, UnicodeDecodeError, TypeError, KeyError):
            raise KubeError(f"{file} is not a kubeconfig: it must be YAML with a list of contexts") from None
    return names
