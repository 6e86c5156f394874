"""`python run.py verify` and `sign`: check the digests of a Bento, directory or pod, and of what it was made from.

The signature is an in-toto statement (https://github.com/in-toto/attestation) in a DSSE envelope, signed with Ed25519.
Its subjects are the lineage and the directories and records whose digests the lineage states.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from deploy import bento
from deploy.config import DeployConfig
from gpt2core.files import (
    atomic_write,
    checkpoint_files,
    directory_sha256,
    json_bytes,
    model_files,
    read_json,
)
from gpt2core.records import records_sha256
from gpt2core.types import BaseRef, JsonDataclass, Lineage, SplitSummary
from steps.outputs import outputs_dir

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = {
    "_type": "https://in-toto.io/Statement/v1",
    "predicateType": "https://in-toto.io/attestation/link/v0.3",
    "predicate": {"name": "package"},
}
LINEAGE, SIGNATURE = "lineage.json", "lineage.sig.json"
T = TypeVar("T", bound=JsonDataclass)


class VerifyError(ValueError):
    """A part is missing, or differs from its recorded digest or signature."""


def verify(name: str, key: Path | None = None) -> list[str]:
    """Compare all parts of NAME with the digests in its lineage; return one line per check.

    Args:
        name: a directory of outputs/ or a copy of one, a Bento's tag, or a pod.
        key: a public key (PEM, Ed25519). If it is given, a valid signature is required.

    Raises:
        VerifyError: a part differs. The message has both digests.
    """
    if Path(name).is_dir():
        return _verify_directory(Path(name), key)
    if ":" in name:
        return _verify_bento(name, key)
    return _verify_pod(name, key)


def sign(directory: Path, key: Path) -> Path:
    """Check a directory of outputs/, then sign its lineage with a private key; return the file of the signature.

    Args:
        key: a private key (PEM without a password, Ed25519).

    Raises:
        VerifyError: the directory differs from its lineage, or the key cannot be used.
    """
    _verify_directory(directory, None)
    private = _load_key(key, load_pem_private_key, Ed25519PrivateKey)
    lineage = _read_lineage(directory / LINEAGE)
    payload = json.dumps(STATEMENT | {"subject": _subjects(lineage)}, sort_keys=True).encode()
    signature = private.sign(_to_sign(payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    atomic_write(directory / SIGNATURE, json_bytes(envelope))
    return directory / SIGNATURE


def _verify_directory(directory: Path, key: Path | None) -> list[str]:
    lineage = _read_lineage(directory / LINEAGE)
    lines = []
    if (directory / "adapter").is_dir():
        lines.append(_same("adapter", directory_sha256(directory / "adapter"), lineage.adapter.sha256))
    else:
        raise VerifyError(f"{directory} has no adapter/; pass a directory of outputs/")
    if (directory / "base").is_dir():
        base = directory / "base"
        lines.append(_same("base", directory_sha256(base, checkpoint_files(base)), lineage.base.sha256))
    else:
        reference = _read(BaseRef, directory / "base.json")
        lines.append(_same("reference to the base", reference.sha256, lineage.base.sha256))
    split = _read(SplitSummary, directory / "split.json")
    lines += [_same(f"{part} records in split.json", split.digests[part], sha) for part, sha in lineage.data.items()]
    if key is not None:
        lines.append(_check_signature(directory / SIGNATURE, key, lineage))
    if bento.exists(lineage.bento):
        return lines + _verify_bento(lineage.bento, None, lineage)
    return [*lines, f"not checked: the Bento {lineage.bento}, which this machine's store does not have"]


def _verify_bento(tag: str, key: Path | None, expected: Lineage | None = None) -> list[str]:
    try:
        lineage, models = bento.lineage(tag), bento.models(tag)
        bento.verify_version(tag)
    except bento.DAMAGED as error:
        raise VerifyError(f"Bento {tag}: {error}") from None
    lines = [f"code and lineage of the Bento: {tag}"]
    for name, recorded in (("base", lineage.base.sha256), ("adapter", lineage.adapter.sha256)):
        directory = models[name]
        stored = model_files(directory)
        digest = directory_sha256(directory, stored)
        _same(f"{name} in {directory}", digest[:16], directory.name)
        files = checkpoint_files(directory) if name == "base" else stored
        lines.append(_same(f"{name} of the Bento", directory_sha256(directory, files), recorded))
    if expected is not None:
        lines.append(_same("lineage in the Bento", _digest(lineage), _digest(expected)))
    lines += _verify_records(lineage)
    if key is not None:
        lines.append(_check_signature(_signature_of(lineage), key, lineage))
    return lines


def _verify_pod(name: str, key: Path | None) -> list[str]:
    from deploy.kubernetes.client import Cluster
    from deploy.kubernetes.errors import KubeError
    from deploy.kubernetes.render import PREFIX, annotations

    config = DeployConfig()
    try:
        pod = Cluster(config).get("Pod", name)
    except KubeError as error:
        raise VerifyError(
            f"{name!r} is not a directory or a Bento's tag (NAME:VERSION), and cannot be looked up as a pod: {error}"
        ) from None
    if pod is None:
        raise VerifyError(f"{name} is not a directory, a Bento's tag, or a pod in the namespace {config.namespace}")
    stated = pod["metadata"].get("annotations", {})
    tag = stated.get(f"{PREFIX}bento")
    if not tag:
        raise VerifyError(f"the pod {name} has no annotation {PREFIX}bento; this project's deployment sets it")
    lines = _verify_bento(tag, key)  # the Bento in this machine's store, from which the pod's image was built
    for annotation, value in annotations(bento.lineage(tag)).items():
        lines.append(_same(f"annotation {annotation}", stated.get(annotation, ""), value))
    return lines


def _verify_records(lineage: Lineage) -> list[str]:
    """Compare the records in ZenML's artifact store with their digests."""
    from zenml.client import Client  # takes seconds to import

    from commands.lineage.runs import TracedRun

    try:
        artifacts = TracedRun(Client().get_pipeline_run(lineage.run.id)).artifacts
        loaded = {part: artifacts[f"{part}_records"].load() for part in lineage.data}
    except KeyError:
        return [f"not checked: the records of run {lineage.run.name}, which ZenML's store does not have"]
    except (OSError, ValueError) as error:
        raise VerifyError(f"the records of run {lineage.run.name} cannot be read: {error}") from None
    return [_same(f"{part} records", records_sha256(loaded[part]), digest) for part, digest in lineage.data.items()]


def _signature_of(lineage: Lineage) -> Path:
    """Find the newest signature in the directories of outputs/ with this Bento, which include cached reruns.

    Raises:
        VerifyError: none of these directories is signed.
    """
    run_directory = outputs_dir() / lineage.run.name
    stated = (
        file for file in outputs_dir().glob("*/bento.txt") if file.read_text(encoding="utf-8").strip() == lineage.bento
    )
    directories = {run_directory, *(file.parent.resolve() for file in stated)}  # resolved: outputs/latest is a link
    signatures = [directory / SIGNATURE for directory in directories if (directory / SIGNATURE).is_file()]
    if not signatures:
        directory = next((path for path in sorted(directories) if (path / LINEAGE).is_file()), run_directory)
        raise VerifyError(
            f"no directory of the Bento {lineage.bento} in {outputs_dir()} is signed; "
            f"`python run.py sign {directory} --key KEY` signs it"
        )
    return max(signatures, key=lambda file: file.stat().st_mtime_ns)


def _check_signature(file: Path, key: Path, lineage: Lineage) -> str:
    public = _load_key(key, load_pem_public_key, Ed25519PublicKey)
    try:
        envelope = read_json(file)
        payload = base64.b64decode(envelope["payload"])
        public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), _to_sign(payload))
        subjects = json.loads(payload)["subject"]
    except InvalidSignature:
        raise VerifyError(f"{file} is not signed with the key of {key}, or was changed") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise VerifyError(f"{file} is not a signature ({error}); `python run.py sign` creates one") from None
    if subjects != _subjects(lineage):
        raise VerifyError(f"{file} signs another lineage than that of Bento {lineage.bento}")
    return f"signature of the lineage: valid, by the key of {key}"


def _load_key(file: Path, load: Callable[..., Any], kind: type) -> Any:
    private = (None,) if load is load_pem_private_key else ()  # no password
    try:
        key = load(file.read_bytes(), *private)
    except (OSError, ValueError, TypeError) as error:
        raise VerifyError(f"{file} cannot be used as a key: {error}") from None
    if not isinstance(key, kind):
        raise VerifyError(
            f"{file} is not an {kind.__name__}; `openssl genpkey -algorithm ed25519 -out key.pem` creates one"
        )
    return key


def _subjects(lineage: Lineage) -> list[dict[str, Any]]:
    digests = {"lineage": _digest(lineage), "base": lineage.base.sha256, "adapter": lineage.adapter.sha256}
    digests |= {f"{part} records": digest for part, digest in lineage.data.items()}
    return [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()]


def _digest(lineage: Lineage) -> str:
    return hashlib.sha256(json.dumps(lineage.to_json(), sort_keys=True).encode()).hexdigest()


def _to_sign(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding: type and payload with their lengths."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _read_lineage(file: Path) -> Lineage:
    try:
        return bento.complete_lineage(file)
    except (OSError, ValueError) as error:
        raise VerifyError(str(error)) from None


def _read(kind: type[T], file: Path) -> T:
    try:
        return kind.from_json_file(file)
    except (OSError, ValueError) as error:
        raise VerifyError(str(error)) from None


def _same(what: str, found: str, recorded: str) -> str:
    if found != recorded:
        raise VerifyError(f"{what}: sha256 {found}, but {recorded} was recorded; it is damaged or was changed")
    return f"{what}: sha256 {found}"
