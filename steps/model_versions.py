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


def find_version(name: str) -> ModelVersionResponse | None:
    """Return the model version of this name (name/number); None if it was deleted."""
    model, _, number = name.partition("/")
    try:
        return Client().get_model_version(model, number)
    except KeyError:
        return None


def adapter_of(version: ModelVersionResponse) -> str:
    """Return the sha256 of the version's adapter; "" if the artifact was deleted."""
    adapter = version.get_artifact("adapter")
    return "" if adapter is None else str(adapter.run_metadata.get("sha256", ""))
