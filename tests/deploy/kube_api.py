"""A double of Kubernetes' API server and Deployment controller, for the real client: HTTPS, tokens, server-side apply.

Its behavior was compared with a real API server and controller manager (docs/kubernetes.md). Objects are stored as
fields with owners, as server-side apply defines them; a rollout advances by one step with each read of the Deployment.
"""

import datetime
import hashlib
import ipaddress
import json
import re
import ssl
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import requests
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TOKEN = "token-that-nobody-may-see"
SCHEMA = "1.32"
REVISION = "deployment.kubernetes.io/revision"
# The keys that identify the items of a list, as in Kubernetes' schema; any other list is one value.
KEYS = {
    "containers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "port", "protocol"),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}
# Atomic maps, which are one field, with the values that the API server adds to them.
ATOMIC = {"resourceFieldRef": {"divisor": "0"}}
MODIFIED = "the object has been modified; please apply your changes to the latest version"
UNSCHEDULABLE = "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate."
DEADLINE = 6  # reads of the Deployment without progress, until the controller reports the deadline as exceeded
Field = tuple[Any, ...]


class KubeApi:
    """The API server; tests set what happens.

    Attributes:
        pod_states: by image: "ready" (the default), "unready", "quota", "unschedulable", "OOMKilled", or the waiting
            reason of the container. Statuses are as a kubelet and scheduler 1.36 write them.
        recoveries: by image: the number of reads of its pods after which its state becomes "ready".
        responses: by image: what a ready pod responds to a body: the URL of a real service, or a function.
        forbidden: verb and resource of requests that are answered with 403.
        failures: statuses of the next requests.
        status_updates: the number of the next JSON patches before which a controller changes the object.
        requests: verb and resource of each request so far.
    """

    def __init__(self, folder: Path) -> None:
        self.objects: dict[tuple[str, str], Stored] = {}  # by plural and name
        self.replica_sets: dict[str, dict[str, Any]] = {}
        self.pod_states: dict[str, str] = {}
        self.recoveries: dict[str, int] = {}
        self.responses: dict[str, str | Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.forbidden: set[tuple[str, str]] = set()
        self.failures: list[int] = []
        self.status_updates = 0
        self.requests: list[tuple[str, str]] = []
        self.namespaces: dict[str, dict[str, Any]] = {}
        self.reads = 0
        self.lock = RLock()
        certificate = _certificate(folder)
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keep-alive
            wbufsize = -1  # one packet per response

            def log_message(self, *_: Any) -> None:
                pass

            def _do(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                with api.lock:
                    status, response = api.handle(self.command, self.path, self.headers, body)
                content = response.encode() if isinstance(response, str) else json.dumps(response).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.certificate = certificate
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, token: str = TOKEN, **changes: Any) -> dict[str, Any]:
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": str(self.certificate),
        } | changes
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [
                {"name": "here", "context": {"cluster": "c", "user": "u"}},
                {"name": "there", "context": {"cluster": "c", "user": "u"}},
            ],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": token}}],
        }

    def object(self, plural: str, name: str = "gpt2-instruct") -> dict[str, Any]:
        return self.objects[plural, name].read()

    def image(self) -> str:
        """The image in the Deployment's template."""
        return str(self.object("deployments")["spec"]["template"]["spec"]["containers"][0]["image"])

    def running(self) -> list[str]:
        """The images of the ready pods."""
        return [each["image"] for each in self.replica_sets.values() for _ in range(each["ready"])]

    def handle(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if self.failures:
            return _error(self.failures.pop(0), "ServiceUnavailable", "not now")
        if headers.get("Authorization", "").lower() != f"bearer {TOKEN}":
            return _error(401, "Unauthorized", "Unauthorized")
        url = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            attributes = json.loads(body)["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, (attributes["resource"], attributes.get("subresource"))))
            return 201, {"status": {"allowed": (attributes["verb"], resource) not in self.forbidden}}
        match = re.fullmatch(
            r"/(?:api/v1|apis/[a-z0-9.]+/v\d)(?:/namespaces/(?P<namespace>[^/]+))?"
            r"(?:/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>[a-z]+)(?P<rest>/.*)?)?)?)?",
            url.path,
        )
        if match is None:
            return 404, "404 page not found"
        namespace, plural, name, sub = match["namespace"], match["plural"], match["name"], match["sub"]
        if plural is None:
            plural, name = "namespaces", namespace
        verb = {"GET": "get" if name else "list", "POST": "create", "PUT": "update"}.get(method, method.lower())
        resource = f"{plural}/{sub}" if sub else plural
        self.requests.append((verb, resource))
        if (verb, resource) in self.forbidden:
            return _error(
                403, "Forbidden", f'{plural} "{name}" is forbidden: User "me" cannot {verb} resource "{resource}"'
            )
        if plural != "namespaces" and namespace not in self.namespaces:
            return _error(404, "NotFound", f'namespaces "{namespace}" not found', name=namespace)
        if sub == "proxy":
            return self.proxy(name, match["rest"], json.loads(body), headers)
        if sub == "log":
            return 200, f"log of {query['container']}\nit crashed: no such model\n"
        if method == "GET" and name is None:
            return 200, {"items": self.listed(plural, query.get("labelSelector", ""))}
        if method == "PATCH":
            return self.apply(plural, name, headers["Content-Type"], query, yaml.safe_load(body))
        if method in ("POST", "PUT"):
            return self.write(plural, json.loads(body), is_new=method == "POST")
        if method == "DELETE":
            return self.delete(plural, name, json.loads(body).get("preconditions", {}))
        if plural == "deployments" and (plural, name) in self.objects:
            self.control(self.objects[plural, name])
        if plural == "namespaces" and name in self.namespaces:
            return 200, self.namespaces[name]
        if (plural, name) not in self.objects:
            return _error(404, "NotFound", f'{plural} "{name}" not found', name=name)
        return 200, self.objects[plural, name].read()

    def apply(
        self, plural: str, name: str, content_type: str, query: dict[str, str], body: dict[str, Any]
    ) -> tuple[int, Any]:
        if content_type == "application/json-patch+json":
            return self.json_patch(plural, name, query, {each["path"]: each["value"] for each in body})
        if content_type != "application/apply-patch+yaml":
            return _error(415, "UnsupportedMediaType", content_type)
        if "fieldManager" not in query:
            return _error(400, "BadRequest", "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value")
        if plural == "namespaces":
            self.namespaces[name] = body
            return 201, body
        new = (plural, name) not in self.objects
        stored = Stored() if new else self.objects[plural, name].copy()
        conflicts = stored.apply(body, query["fieldManager"], query.get("force") == "true")
        if conflicts:
            return _error(409, "Conflict", f"Apply failed with {len(conflicts)} conflicts", causes=conflicts)
        try:
            if plural == "deployments":  # the others are applied as they are in k8s/, which test_manifests.py validates
                kubernetes_validate.validate(stored.read(status=False), SCHEMA, strict=True)
        except kubernetes_validate.ValidationError as error:
            return _error(422, "Invalid", f'{plural} "{name}" is invalid: {error.message}')
        if query.get("dryRun") == "All":
            return 200, stored.read()
        self.objects[plural, name] = stored
        if plural == "horizontalpodautoscalers":
            self.scale()
        return 201 if new else 200, stored.read()

    def json_patch(self, plural: str, name: str, query: dict[str, str], values: dict[str, Any]) -> tuple[int, Any]:
        """A JSON patch that sets these paths."""
        if (plural, name) not in self.objects:
            return _error(404, "NotFound", f'{plural} "{name}" not found', name=name)
        if "/metadata/managedFields" in values:
            return self.patch_managers(self.objects[plural, name], values)
        current = str(self.objects[plural, name].version)
        if values.pop("/metadata/resourceVersion", current) != current:
            return _error(409, "Conflict", MODIFIED)
        self.objects[plural, name] = stored = self.objects[plural, name].copy()
        stored.update({tuple(path.split("/")[1:]): value for path, value in values.items()}, query["fieldManager"])
        kubernetes_validate.validate(stored.read(status=False), SCHEMA, strict=True)
        return 200, stored.read()

    def patch_managers(self, stored: "Stored", values: dict[str, Any]) -> tuple[int, Any]:
        """A JSON patch of the managed fields, which is refused if the object has changed since."""
        if self.status_updates:
            self.status_updates -= 1
            stored.version += 1
        if values["/metadata/resourceVersion"] != str(stored.version):
            return _error(409, "Conflict", MODIFIED)
        managers = {each["manager"] for each in values["/metadata/managedFields"]}
        stored.owners = {field: owners & managers for field, owners in stored.owners.items() if owners & managers}
        return 200, stored.read()

    def scale(self) -> None:
        """The HPA, which owns the replicas."""
        deployment = self.objects.get(("deployments", "gpt2-instruct"))
        hpa = self.objects.get(("horizontalpodautoscalers", "gpt2-instruct"))
        if deployment and hpa and ("spec", "replicas") not in deployment.fields:
            deployment.set(("spec", "replicas"), hpa.read()["spec"]["minReplicas"], "kube-controller-manager")

    def write(self, plural: str, body: dict[str, Any], is_new: bool) -> tuple[int, Any]:
        """Creation, or replacement of the resourceVersion in the body."""
        name = body["metadata"]["name"]
        existing = self.objects.get((plural, name))
        if is_new and existing is not None:
            return _error(409, "AlreadyExists", f'{plural} "{name}" already exists', name=name)
        if not is_new and existing is None:
            return _error(404, "NotFound", f'{plural} "{name}" not found', name=name)
        version = body["metadata"].pop("resourceVersion", "")
        if existing is not None and version != str(existing.version):
            return _error(409, "Conflict", MODIFIED)
        stored = Stored() if existing is None else existing.copy()
        stored.fields = dict(_flat({key: value for key, value in body.items() if key != "status"}))
        self.objects[plural, name] = stored
        return 201 if is_new else 200, stored.read()

    def delete(self, plural: str, name: str, preconditions: dict[str, str]) -> tuple[int, Any]:
        stored = self.objects.get((plural, name))
        if stored is not None and preconditions.get("resourceVersion", str(stored.version)) != str(stored.version):
            return _error(409, "Conflict", MODIFIED)
        if plural == "replicasets":
            del self.replica_sets[name]
        else:
            del self.objects[plural, name]
            if plural == "deployments":
                self.replica_sets.clear()
        return 200, {"kind": "Status", "status": "Success"}

    def control(self, deployment: "Stored") -> None:
        """One step of the Deployment controller."""
        self.scale()
        read = deployment.read()
        template = read["spec"]["template"]
        replicas = read["spec"].get("replicas", 1)
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        name = f"gpt2-instruct-{digest}"
        newest = max((each["revision"] for each in self.replica_sets.values()), default=0)
        image = template["spec"]["containers"][0]["image"]
        if name not in self.replica_sets:
            self.replica_sets[name] = {"template": template, "hash": digest, "image": image, "ready": 0, "revision": 0}
        this = self.replica_sets[name]
        if this["revision"] != newest or not newest:
            this["revision"] = newest + 1
            self.reads = 0
        self.reads += 1
        deployment.fields["metadata", "annotations", REVISION] = str(this["revision"])
        # the controller copies the Deployment's annotations to the newest ReplicaSet, and removes none there
        this["annotations"] = this.get("annotations", {}) | deployment.read()["metadata"]["annotations"]
        state = self.pod_states.get(image, "ready")
        if state == "ready" and self.reads > 2 and this["ready"] < replicas:
            this["ready"] += 1
        if this["ready"] >= replicas:
            for other in self.replica_sets.values():
                other["ready"] = this["ready"] = replicas if other is this else 0
            this["ready"] = replicas
        old = sum(each["ready"] for each in self.replica_sets.values() if each is not this)
        updated = 0 if state == "quota" else replicas if this["ready"] == replicas else this["ready"] + 1
        conditions = [{"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}]
        if state == "quota":
            message = (
                'pods "gpt2-instruct-x" is forbidden: exceeded quota: small, requested: cpu=1, used: cpu=2, limited: 2'
            )
            conditions.append(
                {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
            )
        if state != "ready" and self.reads > DEADLINE:
            conditions[0] = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
        deployment.status = {
            "observedGeneration": deployment.generation,
            "replicas": old + updated,
            "updatedReplicas": updated,
            "availableReplicas": old + this["ready"],
            "conditions": conditions,
        }

    def listed(self, plural: str, selector: str) -> list[dict[str, Any]]:
        key, _, value = selector.partition("=")
        if plural == "replicasets":
            items = [self.replica_set(name) for name in self.replica_sets]
        else:
            items = [
                self.pod(each) for each in self.replica_sets.values() if self.pod_states.get(each["image"]) != "quota"
            ]
        return [each for each in items if each["metadata"]["labels"].get(key) == value]

    def replica_set(self, name: str) -> dict[str, Any]:
        this = self.replica_sets[name]
        template = json.loads(json.dumps(this["template"]))
        template["metadata"] |= {"creationTimestamp": None}
        template["metadata"]["labels"]["pod-template-hash"] = this["hash"]
        return {
            "metadata": {
                "name": name,
                "labels": template["metadata"]["labels"],
                "annotations": this.get("annotations", {}) | {REVISION: str(this["revision"])},
                "ownerReferences": [{"kind": "Deployment", "uid": "uid-1"}],
            },
            "spec": {"template": template},
        }

    def pod(self, this: dict[str, Any]) -> dict[str, Any]:
        state = self.pod_states.get(this["image"], "ready")
        if this["image"] in self.recoveries:
            self.recoveries[this["image"]] -= 1
            if self.recoveries[this["image"]] == 0:
                self.pod_states[this["image"]] = "ready"
        container: dict[str, Any] = {"name": "gpt2-instruct", "image": this["image"], "imageID": "", "state": {}}
        if state == "ready":
            container["imageID"] = f"{this['image'].partition(':')[0]}@sha256:{'1' * 64}"
        elif state == "OOMKilled":
            back_off = "back-off 10s restarting failed container=gpt2-instruct"
            container["state"] = {"waiting": {"reason": "CrashLoopBackOff", "message": back_off}}
            container["lastState"] = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
        elif state == "CrashLoopBackOff":
            container["state"] = {"waiting": {"reason": state, "message": f"about {this['image']}"}}
            container["lastState"] = {"terminated": {"reason": "Error", "exitCode": 3}}
        elif state not in ("unready", "unschedulable"):
            container["state"] = {"waiting": {"reason": state, "message": f"about {this['image']}"}}
        ready = {"type": "Ready", "status": "True" if state == "ready" else "False"}
        if state == "unready":
            ready["message"] = "containers with unready status: [gpt2-instruct]"
        status: dict[str, Any] = {"containerStatuses": [container], "conditions": [ready]}
        if state == "unschedulable":
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": UNSCHEDULABLE}
            status = {"phase": "Pending", "conditions": [condition]}
        return {
            "metadata": {"name": f"gpt2-instruct-{this['hash']}-abcde", "labels": {"pod-template-hash": this["hash"]}},
            "spec": this["template"]["spec"],
            "status": status,
        }

    def proxy(self, name: str, rest: str, body: dict[str, Any], headers: Any) -> tuple[int, Any]:
        """Forwards headers except for Authorization, which the API server consumes."""
        assert (name, rest) == ("gpt2-instruct:http", "/predict")
        if not self.running():
            return _error(503, "ServiceUnavailable", 'no endpoints available for service "gpt2-instruct"')
        service = self.responses[self.running()[0]]
        if isinstance(service, str):
            forwarded = {name: value for name, value in headers.items() if name in ("X-Api-Key", "Content-Type")}
            response = requests.post(f"{service}/predict", json=body, headers=forwarded, timeout=60)
            return response.status_code, response.json()
        return 200, service(body)


class Stored:
    """An object as a mapping of fields to values, and of fields to the managers that own them."""

    def __init__(self) -> None:
        self.fields: dict[Field, Any] = {}
        self.owners: dict[Field, set[str]] = {}
        self.generation = self.version = 0
        self.status: dict[str, Any] = {}

    def copy(self) -> "Stored":
        other = Stored()
        other.fields, other.generation, other.status = dict(self.fields), self.generation, self.status
        other.version = self.version + 1
        other.owners = {field: set(owners) for field, owners in self.owners.items()}
        return other

    def apply(self, body: dict[str, Any], manager: str, force: bool) -> list[dict[str, str]]:
        """Server-side apply; returns the conflicts. Fields that the manager no longer states are removed."""
        applied = dict(_flat(body))
        for identity in (("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")):
            self.fields[identity] = applied.pop(identity)
        disputed = {
            field: self.owners.get(field, set()) - {manager}
            for field, value in applied.items()
            if field in self.fields and self.fields[field] != value
        }
        if not force:
            conflicts = [
                {
                    "reason": "FieldManagerConflict",
                    "message": f'conflict with "{owner}"',
                    "field": "." + ".".join(map(str, field)),
                }
                for field, owners in disputed.items()
                for owner in owners
            ]
            if conflicts:
                return conflicts
        before = dict(self.fields)
        for field in [field for field, owners in self.owners.items() if manager in owners and field not in applied]:
            self.owners[field].discard(manager)
            if not self.owners[field]:
                del self.owners[field], self.fields[field]
        for field, value in applied.items():
            self.owners[field] = {manager} if disputed.get(field) else self.owners.get(field, set()) | {manager}
            self.fields[field] = ATOMIC[field[-1]] | value if field[-1] in ATOMIC else value
        if {f: v for f, v in self.fields.items() if f[0] == "spec"} != {
            f: v for f, v in before.items() if f[0] == "spec"
        }:
            self.generation += 1
        return []

    def update(self, values: dict[Field, Any], manager: str) -> None:
        """Replace these parts of the object. The manager becomes the only owner of the fields that change."""
        fields = {each: value for each, value in self.fields.items() if not any(each[: len(p)] == p for p in values)}
        fields |= {field: value for part in values for field, value in _flat(values[part], part)}
        changed = {field for field, value in fields.items() if self.fields.get(field) != value}
        self.owners = {field: owners for field, owners in self.owners.items() if field in fields}
        self.owners |= {field: {manager} for field in changed}
        self.generation += fields != self.fields
        self.fields = fields

    def set(self, field: Field, value: Any, manager: str) -> None:
        """An update by another manager."""
        self.fields[field] = value
        self.owners[field] = {manager}
        self.generation += 1
        self.version += 1

    def read(self, status: bool = True) -> dict[str, Any]:
        read: dict[str, Any] = _nested(self.fields)
        if status:
            managers = sorted({owner for owners in self.owners.values() for owner in owners})
            read["metadata"] |= {"generation": self.generation, "uid": "uid-1", "resourceVersion": str(self.version)}
            read["metadata"]["managedFields"] = [{"manager": manager} for manager in managers]
            read["status"] = self.status
        return read


def _flat(value: Any, field: Field = ()) -> list[tuple[Field, Any]]:
    if isinstance(value, dict) and value and not (field and field[-1] in ATOMIC):
        return [inner for key, each in value.items() if each is not None for inner in _flat(each, (*field, key))]
    keys = KEYS.get(field[-1]) if field and isinstance(field[-1], str) else None
    if isinstance(value, list) and keys:
        named = [(tuple((key, each[key]) for key in keys if key in each), each) for each in value]
        return [inner for key, each in named for inner in _flat(each, (*field, key))]
    return [(field, value)]


def _nested(fields: dict[Field, Any]) -> Any:
    root: dict[Any, Any] = {}
    for field, value in fields.items():
        place = root
        for key in field[:-1]:
            place = place.setdefault(key, {})
        place[field[-1]] = value
    return _lists(root)


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, tuple) for key in value):
        return [_lists(each) for each in value.values()]
    return {key: _lists(each) for key, each in value.items()}


def _error(status: int, reason: str, message: str, **details: Any) -> tuple[int, Any]:
    return status, {
        "kind": "Status",
        "status": "Failure",
        "code": status,
        "reason": reason,
        "message": message,
        "details": details,
    }


def _certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1 in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return file
