"""ZenML's Kubeflow orchestrator with support for memory limits and GPUs, which ZenML 0.98.0 lacks.

ZenML passes memory as a number, which kfp rejects. It passes GPUs only together with a node selector, which it removes
from all settings.
"""

from functools import cache
from typing import Any

from zenml.config import ResourceSettings
from zenml.integrations.kubeflow.flavors import KubeflowOrchestratorFlavor

FLAVOR = "kubeflow_gpu"
GPU = "nvidia.com/gpu"  # the Kubernetes resource for `gpu_count`


class KubeflowGpuOrchestratorFlavor(KubeflowOrchestratorFlavor):
    @property
    def name(self) -> str:
        return FLAVOR

    @property
    def implementation_class(self) -> type[Any]:
        return _orchestrator()


@cache
def _orchestrator() -> type[Any]:
    """Define the orchestrator in a function, because its base class imports kfp, which is in a separate extra."""
    from zenml.integrations.kubeflow.orchestrators import KubeflowOrchestrator

    class KubeflowGpuOrchestrator(KubeflowOrchestrator):
        def _configure_container_resources(
            self, dynamic_component: Any, resource_settings: ResourceSettings, node_selector_constraint: Any = None
        ) -> Any:
            task = dynamic_component
            if resource_settings.cpu_count:
                task = task.set_cpu_limit(str(resource_settings.cpu_count))
            if resource_settings.memory:
                # ZenML's 12GB is 12G in Kubernetes
                task = task.set_memory_limit(resource_settings.memory.removesuffix("B"))
            if resource_settings.gpu_count:
                task = task.set_accelerator_type(GPU).set_accelerator_limit(resource_settings.gpu_count)
            return task

    return KubeflowGpuOrchestrator
