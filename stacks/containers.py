"""ZenML's components whose steps run in containers of this machine's engine: a step operator and an orchestrator."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field
from zenml.client import Client
from zenml.config.base_settings import BaseSettings
from zenml.config.build_configuration import BuildConfiguration
from zenml.config.global_config import GlobalConfiguration
from zenml.config.step_run_info import StepRunInfo
from zenml.constants import ENV_ZENML_LOCAL_STORES_PATH
from zenml.enums import ExecutionMode, ExecutionStatus, StoreType
from zenml.models import PipelineSnapshotBase, StepRunResponse
from zenml.orchestrators import BaseOrchestratorConfig, BaseOrchestratorFlavor
from zenml.orchestrators.local_docker.local_docker_orchestrator import (
    ENV_ZENML_DOCKER_ORCHESTRATOR_RUN_ID,
    LocalDockerOrchestrator,
    LocalDockerOrchestratorSettings,
)
from zenml.step_operators import BaseStepOperator, BaseStepOperatorConfig, BaseStepOperatorFlavor

from deploy.containers import client as engine

FLAVOR = "container"
ROOT = Path(__file__).parent.parent
LOCALHOSTS = ("localhost", "127.0.0.1", "::1")


class ContainerSettings(BaseSettings):
    """What a config may say of a step's container.

    memory: its limit, e.g. "8g"; what it writes to /tmp counts. None: all there is.
    network: "bridge" where the step fetches something, e.g. a base of the hub. None: as little as ZenML needs, which is
        no network at all where its store is a folder of this machine.
    mounts: absolute paths of this machine that the step may read, e.g. of `data.path`.
    """

    memory: str | None = Field(default=None, pattern=r"^[1-9][0-9]*[kmg]$")
    network: str | None = None
    mounts: list[str] = Field(default=[])


class ContainerStepOperator(BaseStepOperator):
    """Runs the steps that name it in a container, while all others run in the process of the run."""

    @property
    def settings_class(self) -> type[BaseSettings]:
        return ContainerSettings

    def get_docker_builds(self, snapshot: PipelineSnapshotBase) -> list[BuildConfiguration]:
        return [
            BuildConfiguration(key=FLAVOR, settings=step.config.docker_settings, step_name=name)
            for name, step in snapshot.step_configurations.items()
            if step.config.uses_step_operator(self.name)
        ]

    def submit(self, info: StepRunInfo, entrypoint_command: list[str], environment: dict[str, str]) -> None:
        arguments = _run_arguments(self.get_settings(info), environment)
        image = info.get_image(key=FLAVOR)
        engine.start(image, entrypoint_command, arguments, str(info.run_id), info.pipeline_step_name)

    def wait(self, step_run: StepRunResponse) -> ExecutionStatus:
        container = self._container(step_run)
        try:
            if container is not None:
                engine.follow(container)
        except engine.EngineError:
            recorded = Client().get_run_step(step_run.id)
            if recorded.exception_info is None:  # it was killed before it could say why
                raise
        return Client().get_run_step(step_run.id).status

    def get_status(self, step_run: StepRunResponse) -> ExecutionStatus:
        container = self._container(step_run)
        running = container is not None and container.status in ("created", "running")
        return ExecutionStatus.RUNNING if running else Client().get_run_step(step_run.id).status

    def cancel(self, step_run: StepRunResponse) -> None:
        self.cleanup_step_submission(step_run)

    def cleanup_step_submission(self, step_run: StepRunResponse) -> None:
        engine.remove(self._container(step_run))

    def _container(self, step_run: StepRunResponse) -> engine.Container | None:
        return engine.find(str(step_run.pipeline_run_id), step_run.name)


class ContainerOrchestrator(LocalDockerOrchestrator):
    """ZenML's local_docker orchestrator, every step in a container; here the containers are started and ended as ours.

    ZenML's own knows no mount of outputs/ and the Bento store, shows a step's log only when the step is over, and
    leaves the container running when the run is interrupted.
    """

    @property
    def settings_class(self) -> type[BaseSettings]:
        return ContainerSettings

    @property
    def supported_execution_modes(self) -> list[ExecutionMode]:
        return [ExecutionMode.FAIL_FAST]

    def get_settings(self, container: Any) -> BaseSettings:
        """As ZenML's loop over the steps wants them: arguments of `containers.run`."""
        settings = super().get_settings(container)
        return LocalDockerOrchestratorSettings(run_args=_run_arguments(settings, {}))

    @property
    def docker_client(self) -> Any:
        """What ZenML's loop over the steps uses of docker's client."""
        return SimpleNamespace(containers=SimpleNamespace(run=self._run))

    def _run(self, image: str, entrypoint: list[str], command: list[str], **arguments: Any) -> list[bytes]:
        """Run a step to its end; nothing is left to log."""
        del arguments["stream"], arguments["extra_hosts"]
        # ZenML's mounts and environment of its own were added to those of `get_settings`
        run = arguments["environment"][ENV_ZENML_DOCKER_ORCHESTRATOR_RUN_ID]
        step = command[command.index("--step_name") + 1]
        engine.run_to_end(image, [*entrypoint, *command], arguments, run, step)
        return []


def _run_arguments(settings: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    """The step sees ZenML's local stores, the Bento store, outputs/ and the hub's cache where the host has them."""
    stores = Path(GlobalConfiguration().local_stores_path)
    places = {
        ENV_ZENML_LOCAL_STORES_PATH: stores,
        "BENTOML_HOME": Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml"),
        "GPT2_INSTRUCT_OUTPUTS": Path(os.environ.get("GPT2_INSTRUCT_OUTPUTS") or ROOT / "outputs"),
        "HF_HOME": Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"),
    }
    for path in places.values():
        path.mkdir(parents=True, exist_ok=True)  # the engine would make it root's
    return engine.run_arguments(
        environment={
            "ZENML_CONFIG_PATH": "/tmp/zenml",
            **environment,
            **{name: str(path) for name, path in places.items()},
        },
        writable=list(places.values()),
        readable=[Path(mount) for mount in settings.mounts],
        network=settings.network or _network(),
        memory=settings.memory,
    )


def _network() -> str:
    """As much as the step needs to reach ZenML."""
    store = GlobalConfiguration().store_configuration
    if store.type == StoreType.SQL and store.url.startswith("sqlite"):
        return "none"
    return "host" if urlsplit(store.url).hostname in LOCALHOSTS else "bridge"


class ContainerStepOperatorConfig(BaseStepOperatorConfig, ContainerSettings):
    @property
    def is_local(self) -> bool:
        return True


class ContainerStepOperatorFlavor(BaseStepOperatorFlavor):
    @property
    def name(self) -> str:
        return FLAVOR

    @property
    def config_class(self) -> type[BaseStepOperatorConfig]:
        return ContainerStepOperatorConfig

    @property
    def implementation_class(self) -> type[BaseStepOperator]:
        return ContainerStepOperator


class ContainerOrchestratorConfig(BaseOrchestratorConfig, ContainerSettings):
    @property
    def is_local(self) -> bool:
        return True

    @property
    def is_synchronous(self) -> bool:
        return True


class ContainerOrchestratorFlavor(BaseOrchestratorFlavor):
    @property
    def name(self) -> str:
        return FLAVOR

    @property
    def config_class(self) -> type[BaseOrchestratorConfig]:
        return ContainerOrchestratorConfig

    @property
    def implementation_class(self) -> type[LocalDockerOrchestrator]:
        return ContainerOrchestrator
