"""The deploy configuration, with the default of every value."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Literal

from gpt2core.config import check_field, check_types

# An image reference as nodes parse it, with a tag or digest: [host[:port]/]name[/name...], :tag, @digest
_HOST = r"([a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(:[0-9]+)?"
_NAME = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
_TAG = r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}"
IMAGE = rf"({_HOST}/)?{_NAME}(/{_NAME})*(:(?!latest$){_TAG}|(:{_TAG})?@sha256:[0-9a-f]{{64}})"


@dataclass(frozen=True)
class DeployConfig:
    """The deploy target: none, a container of this machine's engine, or a Kubernetes cluster."""

    target: Literal["none", "docker", "kubernetes"] = "none"  # none: the Bento stays in the Bento store
    require_stage: Literal["", "staging", "production"] = ""  # stage that the model must be in, or a later one; "": any
    host: str = "127.0.0.1"  # docker: the address to listen on; 0.0.0.0 also accepts requests from other machines
    port: int = 3000  # docker: also names the deployment
    memory: str = ""  # memory limit of the service; "": 2g (docker), or as in k8s/ (kubernetes)
    image: str = ""  # kubernetes: the image that nodes pull, name:tag or name@sha256:…
    kubeconfig: str = ""  # kubernetes; "": $KUBECONFIG, the pod's service account, or ~/.kube/config
    context: str = ""  # kubernetes; "": the kubeconfig's current context
    namespace: str = "gpt2-instruct"  # kubernetes; created if it is missing
    force: bool = False  # kubernetes: take ownership of fields that another field manager set

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "host", _is_ipv4(self.host), "an IPv4 address of this machine, or 0.0.0.0 for all of them")
        check_field(self, "port", 1 <= self.port <= 65535, "from 1 to 65535")
        memory = re.fullmatch(r"([1-9]\d{2,}m|[1-9]\d*g)?", self.memory) is not None
        check_field(self, "memory", memory, "a number with m or g, like 2g, at least 100m, or empty")
        image = re.fullmatch(IMAGE, self.image) is not None
        rule = "lowercase name:tag (not latest) or name@sha256:… of an image that the cluster's nodes can pull"
        check_field(self, "image", image or (self.target != "kubernetes" and not self.image), rule)
        namespace = re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", self.namespace) is not None
        check_field(self, "namespace", namespace, "a namespace's name: at most 63 characters of a-z, 0-9 and -")


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True
