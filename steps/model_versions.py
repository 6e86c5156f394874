"""Model versions in ZenML's registry, and their stages."""

from zenml.client import Client
from zenml.models import ModelVersionResponse


def in_stage(model: str, stage: str) -> ModelVersionResponse | None:
    """Return the version of the model that is in the stage now; None if the stage is empty."""
    try:
        return Client().get_model_version(model, stage)
    except KeyError:
        return None


def version_name(version: ModelVersionResponse) -> str:
    """Return the name of a model version in lineage and promotions: name/number."""
    return f"{version.model.name}/{version.name}"


def stage_of(version: str) -> str | None:
    """Return the stage of a model version `name/number`; None: it has none, or was deleted."""
    name, _, number = version.partition("/")
    try:
        return Client().get_model_version(name, number).stage
    except KeyError:
        return None
