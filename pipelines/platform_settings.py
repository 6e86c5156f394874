"""Checks `settings` in a run configuration: of ZenML, of the components in stacks/, and of a Kubernetes step's pod."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, model_validator
from zenml.config import DockerSettings, ResourceSettings

from pipelines.errors import check_names
from stacks.containers import FLAVOR, ContainerSettings

KUBERNETES, KUBEFLOW = "step_operator.kubernetes", "orchestrator.kubeflow_gpu"
SETTINGS = ["docker", "resources", f"orchestrator.{FLAVOR}", f"step_operator.{FLAVOR}", KUBERNETES, KUBEFLOW]
POD_TYPES = {  # key of pod_settings -> its type in Kubernetes
    "affinity": "V1Affinity",
    "tolerations": "list[V1Toleration]",
    "resources": "V1ResourceRequirements",
    "volumes": "list[V1Volume]",
    "volume_mounts": "list[V1VolumeMount]",
    "env": "list[V1EnvVar]",
    "env_from": "list[V1EnvFromSource]",
    "container_security_context": "V1SecurityContext",
}


def settings_class(key: str) -> type[BaseModel]:
    """Return the pydantic model of a key of `SETTINGS`."""
    if key == KUBERNETES:
        # imported here because it imports the whole Kubernetes client, which only configurations for a cluster need
        from zenml.integrations.kubernetes.flavors.kubernetes_step_operator_flavor import KubernetesStepOperatorSettings

        return KubernetesStepOperatorSettings
    if key == KUBEFLOW:
        return _kubeflow_settings()
    general: dict[str, type[BaseModel]] = {"docker": DockerSettings, "resources": ResourceSettings}
    return general.get(key, ContainerSettings)


@cache
def _kubeflow_settings() -> type[BaseModel]:
    from zenml.integrations.kubeflow.flavors.kubeflow_orchestrator_flavor import KubeflowOrchestratorSettings

    class KubeflowSettings(KubeflowOrchestratorSettings):
        """The orchestrator's settings without pod_settings, which ZenML 0.98.0 replaces by its own."""

        @model_validator(mode="before")
        @classmethod
        def _refuse_pod_settings(cls, data: Any) -> Any:
            if isinstance(data, Mapping) and "pod_settings" in data:
                raise ValueError("ZenML ignores pod_settings on Kubeflow; remove them")
            return data

    return KubeflowSettings


def check_pod_settings(value: Mapping[str, Any], path: str, source: str) -> None:
    """Raise ConfigError for an unknown key in the settings of a pod. ZenML would only log a warning."""
    from kubernetes.client import models
    from zenml.integrations.kubernetes.pod_settings import KubernetesPodSettings

    check_names(value, list(KubernetesPodSettings.model_fields), path, source)
    for key, inner in value.items():
        if key == "additional_pod_spec_args" and isinstance(inner, Mapping):  # keys are the Python client's names
            check_names(inner, list(models.V1PodSpec.openapi_types), f"{path}.{key}", source)
            for name, part in inner.items():
                _check_part(part, models.V1PodSpec.openapi_types[name], f"{path}.{key}.{name}", source)
        else:
            _check_part(inner, POD_TYPES.get(key, ""), f"{path}.{key}", source)


def _check_part(value: Any, kind: str, path: str, source: str) -> None:
    """Check the keys of a part of a pod.

    Args:
        kind: its type in the notation of the Kubernetes client: V1Volume, list[V1Volume], dict(str, str), str.
    """
    from kubernetes.client import models

    if kind.startswith("list[") and isinstance(value, list):
        for i, inner in enumerate(value):
            _check_part(inner, kind[len("list[") : -1], f"{path}.{i}", source)
    elif hasattr(models, kind) and isinstance(value, Mapping):
        model = getattr(models, kind)
        kinds = {name: model.openapi_types[attribute] for attribute, name in model.attribute_map.items()}
        check_names(value, list(kinds), path, source)
        for key, inner in value.items():
            _check_part(inner, kinds[key], f"{path}.{key}", source)
