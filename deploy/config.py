"""Where a Bento is deployed, with the default of every value."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Literal

from gpt2core.config import check_choices, check_field


@dataclass(frozen=True)
class DeployConfig:
    """Where the Bento answers users: nowhere yet, in a container of this machine's engine, or in a cluster."""

    target: Literal["none", "docker", "kubernetes"] = "none"
    require_stage: Literal["", "staging", "production"] = ""  # of the model version; "": any
    host: str = "127.0.0.1"  # of docker: the address that is listened on; 0.0.0.0 lets other machines ask
    port: int = 3000  # of docker, and the deployment's name; as `make serve` and all examples have it
    memory: str = "2g"  # of docker: more ends the container; gpt2-nano takes 340 MB
    image: str = ""  # of kubernetes: what its nodes pull, name:tag or name@sha256:…
    kubeconfig: str = ""  # "": $KUBECONFIG, in a pod its service account, or ~/.kube/config
    context: str = ""  # "": the kubeconfig's current one
    namespace: str = "gpt2-instruct"
    force: bool = False  # of kubernetes: take over fields that somebody else set

    def __post_init__(self) -> None:
        check_choices(self)
        check_field(self, "host", _is_ipv4(self.host), "an IPv4 address of this machine, or 0.0.0.0 for all of them")
        check_field(self, "port", 1 <= self.port <= 65535, "from 1 to 65535")
        check_field(
            self, "memory", re.fullmatch(r"[1-9]\d*[mg]", self.memory) is not None, "a number with m or g, like 2g"
        )
        reference = r"[^:@]+(:(?!latest$)[\w.-]+|(:[\w.-]+)?@sha256:[0-9a-f]{64})"
        exact = re.fullmatch(reference, self.image.rpartition("/")[2]) is not None
        rule = "name:tag (not latest) or name@sha256:… of what the cluster's nodes pull"
        check_field(self, "image", exact or (self.target != "kubernetes" and not self.image), rule)
        name = re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", self.namespace) is not None
        check_field(self, "namespace", name, "a namespace's name: at most 63 of a-z, 0-9 and -")


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True
