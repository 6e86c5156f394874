"""The service on a Kubernetes cluster: k8s/ applied by the official client, watched, asked, and rolled back.

Server-side apply under one field manager: fields that others set (the HPA's replicas, a GPU variant) stay theirs, and a
field that somebody changed by hand is a conflict to be explained, not overwritten.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError
from urllib3.util import Retry

from deploy.bento import DEPLOYED_AGREEMENT, NAME, BentoError, check, key_header
from deploy.config import DeployConfig

logger = logging.getLogger(__name__)

MANIFESTS = Path(__file__).parent.parent.parent / "k8s"
DEPLOYER = MANIFESTS / "optional" / "deployer.yaml"  # its Role is what a deployment needs to be allowed
MANAGER = NAME  # of the fields that we apply
PREFIX = f"{NAME}/"  # of labels and annotations that name what a pod is made of
REVISION = "deployment.kubernetes.io/revision"
LABEL_LENGTH = 63  # Kubernetes' limit
POLL = 1.0  # seconds
SETTLE = 30.0  # seconds in which the old pods' last endpoints may still be asked
CONNECT_TIMEOUT, TIMEOUT, ANSWER_TIMEOUT = 10, 60, 120  # seconds
LOG_LINES = 20  # of a container that crashed
PATHS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "Deployment": "/apis/apps/v1/namespaces/{namespace}/deployments",
    "ReplicaSet": "/apis/apps/v1/namespaces/{namespace}/replicasets",
    "HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
}
# What a container waits for in vain, and what helps.
LOAD = "is it pushed, or loaded into the cluster's nodes; does deploy.image name it as they do; may they read it?"
HOPELESS = {
    "ErrImagePull": LOAD,
    "ImagePullBackOff": LOAD,
    "ErrImageNeverPull": LOAD,
    "InvalidImageName": "deploy.image is no valid reference",
    "CreateContainerConfigError": "look at the pod's environment and volumes",
    "CreateContainerError": "look at the container's command and security context",
    "RunContainerError": "look at the container's command and security context",
    "CrashLoopBackOff": "its last lines:",
}

Manifest = dict[str, Any]


class KubeError(RuntimeError):
    """A cluster that cannot be reached or used as it was meant, or a rollout that failed."""


def deploy(
    lineage: Mapping[str, Any], config: DeployConfig, samples: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> dict[str, Any]:
    """Roll the image out, ask it, and go back to what was there before if it does not answer as it should.

    Args:
        lineage: of the Bento in the image; its ids become labels and annotations of the pods.
        samples: rows with `instruction`, `input` and the answer that has to come, `tuned`.

    Returns:
        `outcome`: "deployed"; "rolled_back", to what ran before or, for a first deployment, to none; or "failed", which
        could not be rolled back. `reason`, `revision`, `previous` and what else is known of it.

    Raises:
        KubeError: nothing was rolled out.
    """
    cluster = Cluster(config)
    cluster.check_permissions()
    before = cluster.get("Deployment")
    if before is not None and before["spec"].get("replicas") == 0:
        raise KubeError(
            f"the Deployment in {cluster} is scaled to 0 replicas; `kubectl scale deployment {NAME} "
            f"-n {cluster.namespace} --replicas=2` first"
        )
    *others, deployment = render(config.image, lineage, cluster.namespace)
    for manifest in others:
        # an existing namespace may be shared: its labels are its owner's
        if manifest["kind"] != "Namespace" or cluster.get("Namespace", cluster.namespace) is None:
            cluster.apply(manifest, config.force)
    cluster.apply(deployment, config.force)
    about: dict[str, Any] = {
        "namespace": cluster.namespace,
        "image": config.image,
        "bento": lineage["bento"],
        "previous": None if before is None else _about(before),
    }
    try:
        rolled_out = _wait(cluster)
        _check_answers(cluster, lineage["bento"], samples, max_new_tokens)
        reason = f"{len(samples)} prompts were answered as the model did when it was evaluated"
        known = {"image_id": _image_id(cluster, rolled_out), "revision": _revision(rolled_out)}
        return about | {"outcome": "deployed", "reason": reason, **known}
    except (KubeError, BentoError) as error:
        logger.warning("the rollout failed, going back: %s", error)
        outcome, now, revision = _go_back(cluster, before)
        return about | {"outcome": outcome, "reason": f"{error}; {now}", "revision": revision}
    except KeyboardInterrupt:
        logger.warning("interrupted: %s", _go_back(cluster, before)[1])
        raise


def rollback(config: DeployConfig) -> dict[str, Any]:
    """Go back to the revision before the one that runs, as `kubectl rollout undo` does; twice is there and back again.

    Raises:
        KubeError: nothing is deployed, no earlier revision is kept, or it does not become ready.
    """
    cluster = Cluster(config)
    cluster.check_permissions()
    live = cluster.get("Deployment")
    if live is None:
        raise KubeError(f"{cluster} has no Deployment {NAME}; there is nothing to roll back")
    earlier = [each for each in cluster.replica_sets(live) if _revision(each) < _revision(live)]
    if not earlier:
        raise KubeError(f"{cluster} keeps no revision of {NAME} before {_revision(live)}; there is none to go back to")
    _restore(cluster, earlier[-1])
    now = _wait(cluster)
    return {
        "namespace": cluster.namespace,
        **_about(now),
        "previous": _about(live),
        "outcome": "rolled_back",
        "reason": f"revision {_revision(live)} was rolled back by hand",
    }


def render(image: str, lineage: Mapping[str, Any], namespace: str) -> list[Manifest]:
    """The manifests of k8s/ for this image; the Deployment last, since its pods need the others."""
    manifests: list[Manifest] = [yaml.safe_load(file.read_text()) for file in sorted(MANIFESTS.glob("*.yaml"))]
    for manifest in manifests:
        manifest["metadata"]["name" if manifest["kind"] == "Namespace" else "namespace"] = namespace
    manifests.sort(key=lambda manifest: manifest["kind"] == "Deployment")
    deployment = manifests[-1]
    template = deployment["spec"]["template"]
    [container] = template["spec"]["containers"]
    container["image"] = image
    for place in (deployment, template):
        metadata = place["metadata"]
        metadata["labels"] = metadata["labels"] | labels(lineage)
        metadata["annotations"] = metadata.get("annotations", {}) | annotations(lineage)
    return manifests


def annotations(lineage: Mapping[str, Any]) -> dict[str, str]:
    """The ids of what a pod is made of: those of its /metadata."""
    ids = {
        "run-id": lineage["run"]["id"],
        "run-name": lineage["run"]["name"],
        "model-version": lineage["model_version"],
        "bento": lineage["bento"],
        "commit": lineage["commit"]["sha"],
        "commit-dirty": str(lineage["commit"]["dirty"]).lower(),
        "base-name": lineage["base"]["name"],
        "base-revision": lineage["base"]["revision"],
        "base-sha256": lineage["base"]["sha256"],
        "adapter-sha256": lineage["adapter"]["sha256"],
        **{f"data-{split}-sha256": digest for split, digest in lineage["data"].items()},
    }
    return {PREFIX + key: value for key, value in ids.items()}


def labels(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Those of the annotations that pods are looked for by; a label holds a digest but for its last digit."""
    wanted = ("run-id", "commit", "adapter-sha256", "data-train-sha256")
    known = annotations(lineage)
    found = {PREFIX + key: known[PREFIX + key][:LABEL_LENGTH] for key in wanted}
    return found | {"app.kubernetes.io/version": lineage["bento"].partition(":")[2]}


class Cluster:
    """One namespace of a cluster, by Kubernetes' API."""

    def __init__(self, config: DeployConfig) -> None:
        """Read how to reach it: from the kubeconfig ($KUBECONFIG or ~/.kube/config if none is named), or in a pod from
        its service account.

        Raises:
            KubeError: there is no usable kubeconfig, or no such context in it.
        """
        self.namespace = config.namespace
        kubeconfig, context = config.kubeconfig, config.context
        configuration = client.Configuration()
        file = kubeconfig or os.environ.get("KUBECONFIG", "")
        if not file and not context and "KUBERNETES_SERVICE_HOST" in os.environ:
            self.source = "the pod's service account"
            _load(self.source, load_incluster_config, configuration)
        else:
            file = os.path.expanduser(file or "~/.kube/config")
            self.source = f"the kubeconfig {file}" + (f", context {context}" if context else "")
            there = _contexts(file)
            if context and context not in there:
                raise KubeError(f"deploy.context is {context!r}; {file} has {', '.join(there) or 'no context'}")
            _load(
                self.source,
                load_kube_config,
                file,
                context=context or None,
                client_configuration=configuration,
                persist_config=False,
            )
        configuration.retries = Retry(
            4,
            connect=2,
            read=1,
            other=0,  # a certificate that is not trusted
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,  # all: applying and asking may be done twice
            raise_on_status=False,
        )
        self.host = configuration.host
        self.api = client.ApiClient(configuration)

    def __str__(self) -> str:
        return f"namespace {self.namespace} of {self.host}"

    def get(self, kind: str, name: str = NAME) -> Manifest | None:
        """The object, or None where there is none."""
        try:
            return self._call("GET", f"{self._path(kind)}/{name}")
        except _NotFound:
            return None

    def apply(self, manifest: Manifest, force: bool = False) -> None:
        """Make the fields of the manifest so, and nothing else."""
        path = f"{self._path(manifest['kind'])}/{manifest['metadata']['name']}"
        query = [("fieldManager", MANAGER), ("force", str(force).lower())]
        self._call("PATCH", path, manifest, query, "application/apply-patch+yaml")

    def delete(self, kind: str, name: str = NAME) -> None:
        self._call("DELETE", f"{self._path(kind)}/{name}", {"propagationPolicy": "Background"})

    def replica_sets(self, deployment: Manifest) -> list[Manifest]:
        """Those of the Deployment, by revision: each is one version of its pods."""
        query = [("labelSelector", f"app.kubernetes.io/name={NAME}")]
        listed = self._call("GET", self._path("ReplicaSet"), query=query)["items"]
        uid = deployment["metadata"]["uid"]
        owned = [
            each
            for each in listed
            if any(owner["uid"] == uid for owner in each["metadata"].get("ownerReferences", ()))
            and REVISION in each["metadata"].get("annotations", {})
        ]
        return sorted(owned, key=_revision)

    def pods(self, replica_set: Manifest) -> list[Manifest]:
        selector = f"pod-template-hash={replica_set['metadata']['labels']['pod-template-hash']}"
        return list(
            self._call("GET", f"/api/v1/namespaces/{self.namespace}/pods", query=[("labelSelector", selector)])["items"]
        )

    def log(self, pod: str) -> str:
        """The last lines of the container that ran before this one crashed."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        query = [("container", NAME), ("previous", "true"), ("tailLines", str(LOG_LINES))]
        return str(self._call("GET", path, query=query, response_type="str"))

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What the service answers to a POST /predict, through the API server."""
        path = f"/api/v1/namespaces/{self.namespace}/services/{NAME}:http/proxy/predict"
        answer = self._call("POST", path, dict(body), timeout=ANSWER_TIMEOUT, headers=key_header())
        return answer if isinstance(answer, dict) else {}

    def check_permissions(self) -> None:
        """Raise KubeError with all that a deployment needs and these credentials may not."""
        [role] = [each for each in yaml.safe_load_all(DEPLOYER.read_text()) if each["kind"] == "Role"]
        missing = []
        for rule in role["rules"]:
            for group, resource, verb in (
                (group, resource, verb)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
            ):
                name, _, subresource = resource.partition("/")
                wanted = {"namespace": self.namespace, "group": group, "resource": name, "verb": verb}
                review = {
                    "apiVersion": "authorization.k8s.io/v1",
                    "kind": "SelfSubjectAccessReview",
                    "spec": {"resourceAttributes": wanted | ({"subresource": subresource} if subresource else {})},
                }
                answer = self._call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
                if not answer["status"]["allowed"]:
                    missing.append(f"{verb} {resource}{f'.{group}' if group else ''}")
        if missing:
            raise KubeError(
                f"{self.source} may not {', '.join(missing)} in {self}; the Role in k8s/optional/deployer.yaml is what "
                "a deployment needs: have it bound to you"
            )

    def _path(self, kind: str) -> str:
        return PATHS[kind].format(namespace=self.namespace)

    def _call(
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
            return self.api.call_api(
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
            raise self._explained(error, method, path) from None
        except HTTPError as error:
            raise self._unreachable(error) from None

    def _explained(self, error: ApiException, method: str, path: str) -> KubeError:
        status = _status(error.body)
        message = status.get("message") or error.body or error.reason
        if error.status == 401 and '"unauthorized"' in (error.body or ""):  # the service's own, through the proxy
            return KubeError(
                f"the service asks for a token: set GPT2_API_TOKEN, as the Secret {NAME} in {self} has it, where the "
                "run is started"
            )
        if error.status == 401:
            return KubeError(
                f"{self.host} does not accept the credentials of {self.source}: they are wrong, or have expired; "
                "log in again (`kubectl get namespaces` shows whether it worked)"
            )
        if error.status == 404 and status.get("details", {}).get("name"):
            return _NotFound(f"{self.host} has no such thing: {message}")
        if error.status == 404:
            return KubeError(
                f"{self.host} does not know {path}: Kubernetes 1.25 or later is needed, and the address of the API "
                f"server in {self.source}"
            )
        if error.status == 403 and "exceeded quota" in message:
            return KubeError(f"the quota of {self} is used up: {message}; free some of it, or have it raised")
        if error.status == 403:
            return KubeError(f"{self.source} lacks a permission: {message}; k8s/optional/deployer.yaml grants them")
        if error.status == 409 and "causes" in status.get("details", {}):
            fields = "; ".join(f"{cause['field']}: {cause['message']}" for cause in status["details"]["causes"])
            return KubeError(
                f"somebody else set fields in {self} that k8s/ sets too, {path.rpartition('/namespaces/')[2]}: "
                f"{fields}. Put their values into k8s/, or take the fields over with `--set deploy.force=true`, once"
            )
        return KubeError(f"{method} {path} on {self.host} answered {error.status}: {message}")

    def _unreachable(self, error: HTTPError) -> KubeError:
        cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        if isinstance(cause, SSLError):
            return KubeError(f"the certificate of {self.host} is not one that {self.source} trusts: {cause}")
        return KubeError(
            f"{self.host} cannot be reached ({type(cause).__name__}); is the cluster up, does this network reach it, "
            f"and is {self.source} the right one?"
        )


class _NotFound(KubeError):
    """No object of that name."""


def _load(source: str, load: Any, *arguments: Any, **options: Any) -> None:
    """Run one of the client's loaders. What goes wrong may quote the file, and the file holds secrets."""
    try:
        load(*arguments, **options)
    except ConfigException as error:
        raise KubeError(f"{source} cannot be used: {error}") from None
    except Exception as error:
        raise KubeError(f"{source} cannot be used: it is malformed ({type(error).__name__})") from None


def _contexts(files: str) -> list[str]:
    """Names of the contexts in one or more kubeconfigs."""
    names = []
    for file in filter(os.path.isfile, files.split(os.pathsep)):
        try:
            names += [entry["name"] for entry in yaml.safe_load(Path(file).read_text())["contexts"] or ()]
        except (yaml.YAMLError, OSError, UnicodeDecodeError, TypeError, KeyError):
            raise KubeError(f"{file} is no kubeconfig: it must be YAML with a list of contexts") from None
    return names


def _status(body: Any) -> dict[str, Any]:
    """Kubernetes' own account of an error, where this is one."""
    try:
        status = json.loads(body)
    except (TypeError, ValueError):
        return {}
    return status if isinstance(status, dict) and status.get("kind") == "Status" else {}


def _revision(manifest: Manifest) -> int:
    return int(manifest["metadata"].get("annotations", {}).get(REVISION, 0))


def _about(deployment: Manifest) -> dict[str, Any]:
    [container] = [each for each in deployment["spec"]["template"]["spec"]["containers"] if each["name"] == NAME]
    known = deployment["spec"]["template"]["metadata"].get("annotations", {})
    about = {"image": container["image"], "revision": _revision(deployment)}
    return about | {key: known[PREFIX + key] for key in ("bento", "run-id") if PREFIX + key in known}


def _wait(cluster: Cluster) -> Manifest:
    """The Deployment, once all its pods are of its newest version and available.

    Raises:
        KubeError: they will not be, or were not in time.
    """
    start = time.monotonic()
    while True:
        deployment = cluster.get("Deployment")
        if deployment is None:
            raise KubeError(f"somebody deleted the Deployment in {cluster}")
        status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
        if status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]:
            counts = ("replicas", "updatedReplicas", "availableReplicas")
            if all(status.get(count, 0) == wanted for count in counts):
                return deployment
            _check_progress(cluster, deployment)
        # the controller gives a rollout up by itself, after this long without a step forward; if there is a controller
        patience = deployment["spec"].get("progressDeadlineSeconds", 600) * (wanted + 1)
        if time.monotonic() > start + patience:
            raise KubeError(f"the rollout in {cluster} was not done after {patience} seconds")
        time.sleep(POLL)


def _check_progress(cluster: Cluster, deployment: Manifest) -> None:
    """Raise KubeError if there is no use in waiting."""
    conditions = {each["type"]: each for each in deployment["status"].get("conditions", ())}
    failure = conditions.get("ReplicaFailure", {})
    if failure.get("status") == "True":
        raise KubeError(f"no pod could be made in {cluster}: {failure['message']}")
    newest = cluster.replica_sets(deployment)[-1:]
    pods = [pod for each in newest for pod in cluster.pods(each)]
    for pod in pods:
        for container in pod.get("status", {}).get("containerStatuses", ()):
            waiting = container.get("state", {}).get("waiting", {})
            reason = waiting.get("reason", "")
            if reason in HOPELESS:
                name = pod["metadata"]["name"]
                advice = HOPELESS[reason] + (f"\n{_log(cluster, name)}" if reason == "CrashLoopBackOff" else "")
                message = f" ({waiting['message']})" if waiting.get("message") else ""
                raise KubeError(f"pod {name}, image {container['image']}: {reason}{message}; {advice}")
    progressing = conditions.get("Progressing", {})
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        pending = [
            condition["message"]
            for pod in pods
            for condition in pod.get("status", {}).get("conditions", ())
            if condition["status"] == "False" and condition.get("message")
        ]
        why = pending[0] if pending else "its pods did not become ready"
        raise KubeError(f"the rollout in {cluster} came no further in its deadline: {why}")


def _log(cluster: Cluster, pod: str) -> str:
    try:
        return cluster.log(pod)
    except KubeError as error:
        return f"(the log cannot be read: {error})"


def _image_id(cluster: Cluster, deployment: Manifest) -> str:
    """The digest that runs, as a node names it."""
    [newest] = cluster.replica_sets(deployment)[-1:]
    statuses = [status for pod in cluster.pods(newest) for status in pod["status"].get("containerStatuses", ())]
    return next((status["imageID"] for status in statuses if status.get("imageID")), "")


def _check_answers(cluster: Cluster, bento: str, samples: Sequence[Mapping[str, Any]], max_new_tokens: int) -> None:
    """Raise KubeError or BentoError unless the service is this Bento and answers as the samples have it."""
    end = time.monotonic() + SETTLE

    def ask(instruction: str, input: str) -> str:
        body = {"instruction": instruction, "input": input, "max_new_tokens": max_new_tokens}
        return str(_answer(cluster, bento, body, end))

    check(bento, ask, samples, DEPLOYED_AGREEMENT)


def _answer(cluster: Cluster, bento: str, body: Mapping[str, Any], end: float) -> Any:
    """What this Bento answers. Until `end` (`time.monotonic`) the service may still know other pods, or none."""
    while True:
        try:
            answer = cluster.ask(body)
            if answer.get("model") == bento:
                return answer.get("answer")
            problem = KubeError(f"the service is {answer.get('model')}, not {bento}: deploy.image holds another Bento")
        except KubeError as error:
            problem = error
        if time.monotonic() > end:
            raise problem
        time.sleep(POLL)


def _go_back(cluster: Cluster, before: Manifest | None) -> tuple[str, str, int | None]:
    """Undo a failed rollout: the outcome, what is there now in words, and its revision where it is known."""
    try:
        if before is None:
            cluster.delete("Deployment")
            return "rolled_back", "nothing was deployed before, and the Deployment was removed again", None
        revision = _revision(before)
        replica_sets = cluster.replica_sets(before)
        old = next((each for each in replica_sets if _revision(each) == revision), None)
        if old is None:
            return "failed", f"the cluster keeps no revision {revision} to go back to", None
        failed = replica_sets[-1]
        if failed is old:
            return "failed", f"revision {revision} ran before as well, so there is nothing to go back to", revision
        _restore(cluster, old)
        now = _wait(cluster)
        cluster.delete("ReplicaSet", failed["metadata"]["name"])  # nobody should be able to roll back to it
        return "rolled_back", f"rolled back to {_about(before)['image']}, now revision {_revision(now)}", _revision(now)
    except KubeError as error:
        return "failed", f"and it could not be rolled back: {error}", None


def _restore(cluster: Cluster, replica_set: Manifest) -> None:
    """Apply the pods' template of an earlier version. By apply and not by a patch, which would make another manager of
    us and the next deployment a conflict with ourselves."""
    template = replica_set["spec"]["template"]
    labels = {key: value for key, value in template["metadata"]["labels"].items() if key != "pod-template-hash"}
    known = template["metadata"].get("annotations", {})
    file = yaml.safe_load((MANIFESTS / "30-deployment.yaml").read_text())
    file["metadata"] |= {
        "namespace": cluster.namespace,
        "labels": labels,
        "annotations": {key: value for key, value in known.items() if key.startswith(PREFIX)},
    }
    file["spec"]["template"] = template | {"metadata": {"labels": labels, "annotations": known}}
    cluster.apply(file, force=True)
