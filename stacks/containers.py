"""ZenML components that run steps in containers of the local engine: a step operator and an orchestrator.

ZenML's local_docker orchestrator cannot mount outputs/ and the Bento store, shows a step's log only after the step, and
leaves its container running if the run is interrupted.
"""

import atexit
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from pydantic import Field
from zenml.client import Client
from zenml.config.base_settings import BaseSettings
from zenml.config.build_configuration import BuildConfiguration
from zenml.config.global_config import GlobalConfiguration
from zenml.config.step_run_info import StepRunInfo
from zenml.config.store_config import StoreConfiguration
from zenml.constants import ENV_ZENML_LOCAL_STORES_PATH
from zenml.entrypoints import StepEntrypointConfiguration
from zenml.enums import ExecutionMode, ExecutionStatus, StoreType
from zenml.models import PipelineRunResponse, PipelineSnapshotBase, PipelineSnapshotResponse, StepRunResponse
from zenml.orchestrators import (
    BaseOrchestratorConfig,
    BaseOrchestratorFlavor,
    ContainerizedOrchestrator,
    SubmissionResult,
)
from zenml.stack import Stack
from zenml.step_operators import BaseStepOperator, BaseStepOperatorConfig, BaseStepOperatorFlavor

from deploy.containers import steps as containers
from deploy.containers.client import EngineError
from deploy.containers.steps import StepContainer
from deploy.source import ROOT

logger = logging.getLogger(__name__)

FLAVOR = "container"
RUN_ID = "GPT2_INSTRUCT_ORCHESTRATOR_RUN_ID"  # environment variable of a step's container
LOCALHOSTS = ("localhost", "127.0.0.1", "::1")

_submitted: set[tuple[str, str]] = set()  # (run id, step) of containers in the background


@atexit.register
def _remove_submitted() -> None:
    """Remove containers that are still running: an interrupt can arrive between ZenML's submit and wait."""
    for key in _submitted:
        containers.remove(*key)


class ContainerSettings(BaseSettings):
    """Settings of a step's container in a run configuration.

    memory: limit, such as "8g". Files that the step writes to /tmp count towards it. None: no limit.
    network: "bridge" if the step downloads something, such as a base from the hub. None: the minimum that ZenML needs,
        which is no network if its store is a directory of this machine.
    mounts: absolute paths of this machine that the step may read, such as `data.path`.
    """

    memory: str | None = Field(default=None, pattern=r"^[1-9][0-9]*[kmg]$")
    network: str | None = None
    mounts: list[str] = Field(default=[])


class ContainerStepOperator(BaseStepOperator):
    """Runs the steps that are configured to use it in containers. Other steps run in the process of the run."""

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
        _submitted.add((str(info.run_id), info.pipeline_step_name))
        containers.start(
            _step_container(
                image=info.get_image(key=FLAVOR),
                command=entrypoint_command,
                run_id=str(info.run_id),
                step=info.pipeline_step_name,
                environment=environment,
                settings=self.get_settings(info),
            )
        )

    def wait(self, step_run: StepRunResponse) -> ExecutionStatus:
        try:
            containers.follow(*_key(step_run))
        except EngineError:
            recorded = Client().get_run_step(step_run.id)
            if recorded.exception_info is None:  # the step was killed before it could record the reason
                raise
        _submitted.discard(_key(step_run))
        return Client().get_run_step(step_run.id).status

    def get_status(self, step_run: StepRunResponse) -> ExecutionStatus:
        if containers.is_running(*_key(step_run)):
            return ExecutionStatus.RUNNING
        return Client().get_run_step(step_run.id).status

    def cancel(self, step_run: StepRunResponse) -> None:
        containers.remove(*_key(step_run))

    def cleanup_step_submission(self, step_run: StepRunResponse) -> None:
        containers.remove(*_key(step_run))


class ContainerOrchestrator(ContainerizedOrchestrator):
    """Runs every step in a container, one after the other."""

    @property
    def settings_class(self) -> type[BaseSettings]:
        return ContainerSettings

    @property
    def supported_execution_modes(self) -> list[ExecutionMode]:
        return [ExecutionMode.FAIL_FAST]

    def get_orchestrator_run_id(self) -> str:
        """Return the ID of the run. ZenML calls this in the containers of the steps."""
        return os.environ[RUN_ID]

    def submit_pipeline(
        self,
        snapshot: PipelineSnapshotResponse,
        stack: Stack,
        base_environment: dict[str, str],
        step_environments: dict[str, dict[str, str]],
        placeholder_run: PipelineRunResponse | None = None,
    ) -> SubmissionResult | None:
        """Run the steps in order. The first step that fails ends the run.

        Raises:
            EngineError: a step failed. The message has the last lines of its log.
        """
        stack.check_local_paths()
        run_id = str(placeholder_run.id if placeholder_run else uuid4())
        for name, step in snapshot.step_configurations.items():
            if self.requires_resources_in_orchestration_environment(step):
                logger.warning("The container orchestrator ignores the resource settings of step `%s`.", name)
            logger.info("Running step `%s` in a container:", name)
            containers.run(
                _step_container(
                    image=self.get_image(snapshot, name),
                    command=[
                        *StepEntrypointConfiguration.get_entrypoint_command(),
                        *StepEntrypointConfiguration.get_entrypoint_arguments(step_name=name, snapshot_id=snapshot.id),
                    ],
                    run_id=run_id,
                    step=name,
                    environment=step_environments[name] | {RUN_ID: run_id},
                    settings=self.get_settings(step),
                )
            )
        return None


def _key(step_run: StepRunResponse) -> tuple[str, str]:
    return str(step_run.pipeline_run_id), step_run.name


def _step_container(
    image: str,
    command: Sequence[str],
    run_id: str,
    step: str,
    environment: Mapping[str, str],
    settings: BaseSettings,
) -> StepContainer:
    """Describe a container that mounts ZenML's local stores, the Bento store, outputs/ and the hub's cache."""
    assert isinstance(settings, ContainerSettings)
    directories = {
        ENV_ZENML_LOCAL_STORES_PATH: Path(GlobalConfiguration().local_stores_path),
        "BENTOML_HOME": Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml"),
        "GPT2_INSTRUCT_OUTPUTS": Path(os.environ.get("GPT2_INSTRUCT_OUTPUTS") or ROOT / "outputs"),
        "HF_HOME": Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"),
    }
    # the engine takes a relative path for the name of a volume
    directories = {name: path.absolute() for name, path in directories.items()}
    for path in directories.values():
        path.mkdir(parents=True, exist_ok=True)  # otherwise the engine creates it, owned by root
    paths = {name: str(path) for name, path in directories.items()}
    return StepContainer(
        image=image,
        command=command,
        run_id=run_id,
        step=step,
        environment={"ZENML_CONFIG_PATH": "/tmp/zenml", **environment, **paths},
        writable=list(directories.values()),
        readable=[Path(mount) for mount in settings.mounts],
        network=settings.network or least_network(GlobalConfiguration().store_configuration),
        memory=settings.memory,
    )


def least_network(store: StoreConfiguration) -> str:
    """Return the network mode with the least access that a step needs to reach ZenML's store."""
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
    def implementation_class(self) -> type[ContainerOrchestrator]:
        return ContainerOrchestrator
