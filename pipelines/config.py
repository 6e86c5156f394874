"""Reading a run configuration, and refusing it before anything runs if a key or a value in it is wrong.

ZenML is silent about most misspelt keys; here every key is checked, at every level, against the dataclasses and
ZenML's own models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from inspect import getmodule, signature
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from zenml.config import DockerSettings, ResourceSettings
from zenml.config.pipeline_run_configuration import PipelineRunConfiguration
from zenml.pipelines.pipeline_definition import Pipeline
from zenml.steps import BaseStep

from stacks.containers import FLAVOR, ContainerSettings

# Set by `seed`, from which the whole run takes its randomness.
DERIVED = {"train.seed": "seed", "base.pretrain.seed": "seed"}
KUBERNETES = "step_operator.kubernetes"
SETTINGS = ["docker", "resources", f"orchestrator.{FLAVOR}", f"step_operator.{FLAVOR}", KUBERNETES]
PARTS_OF_POD = {  # of pod_settings: what it is in a pod
    "affinity": "V1Affinity",
    "tolerations": "list[V1Toleration]",
    "resources": "V1ResourceRequirements",
    "volumes": "list[V1Volume]",
    "volume_mounts": "list[V1VolumeMount]",
    "env": "list[V1EnvVar]",
    "env_from": "list[V1EnvFromSource]",
    "container_security_context": "V1SecurityContext",
}


class ConfigError(Exception):
    """A run configuration that cannot be used: the message names file, key and the way out."""


def read_config(file: str | Path, pipeline: Pipeline) -> dict[str, Any]:
    """The run configuration in a YAML file, checked.

    Raises:
        ConfigError: no such file, no valid YAML, a key that does not exist, or a value that is not allowed.
    """
    file = Path(file)
    if not file.is_file():
        there = ", ".join(sorted(str(path) for path in Path(file.parent).glob("*.yaml"))) or "no YAML file"
        raise ConfigError(f"{file} is not there; in its folder: {there}")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    check_config(config, str(file), pipeline)
    return config


def set_values(config: dict[str, Any], assignments: Sequence[str], pipeline: Pipeline) -> None:
    """Put each `a.b=value` of the command line into the configuration, under `parameters`, and check what comes out."""
    for assignment in assignments:
        _set_value(config, assignment)
    check_config(config, " ".join(f"--set {assignment}" for assignment in assignments), pipeline)


def _set_value(config: dict[str, Any], assignment: str) -> None:
    """The value is read as YAML."""
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment}: write it as --set key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is not valid YAML: {error}") from None
    *parents, last = path.split(".")
    place = config.setdefault("parameters", {})
    for key in parents:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {assignment}: {key} is a value, not a mapping")
    place[last] = value


def check_config(config: Any, source: str, pipeline: Pipeline) -> None:
    """Raise ConfigError for the first thing in the configuration that is wrong."""
    _check_keys(config, PipelineRunConfiguration, "", source)
    steps = {step.name for step in getmodule(pipeline.entrypoint).__dict__.values() if isinstance(step, BaseStep)}
    _check_names(config.get("steps") or {}, sorted(steps), "steps", source)
    parameters = config.get("parameters") or {}
    types = get_type_hints(pipeline.entrypoint)
    _check_names(parameters, list(signature(pipeline.entrypoint).parameters), "parameters", source)
    for name, value in parameters.items():
        _check_keys(value, types[name], f"parameters.{name}", source)
        _check_value(value, types[name], f"parameters.{name}", source)
    try:
        PipelineRunConfiguration(**{key: value for key, value in config.items() if key != "parameters"})
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first(error, '')}") from None


def _check_keys(value: Any, annotation: Any, path: str, source: str) -> None:
    """Every key of `value` is one that the annotated type has; lists and mappings are looked into."""
    if path == "settings" or path.endswith(".settings"):
        _check_settings(value, path, source)
        return
    if path.endswith(f"settings.{KUBERNETES}.pod_settings") and isinstance(value, Mapping):
        _check_pod_settings(value, path, source)
        return
    if get_origin(annotation) in (Union, UnionType):
        arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
        structured = [argument for argument in arguments if _names(argument) is not None]
        annotation = structured[0] if structured and isinstance(value, Mapping) else arguments[0]
    names = _names(annotation)
    if names is not None:
        if value is None and not path:
            return
        if not isinstance(value, Mapping):
            if is_dataclass(annotation) or not path:
                raise ConfigError(
                    f"{source}: {path or 'the file'} is {value!r}; it must be a mapping of keys to values"
                )
            return  # a ZenML type with a short form
        _check_names(value, list(names), path, source)
        for key, inner in value.items():
            full = f"{path}.{key}".removeprefix("parameters.")
            if is_dataclass(annotation) and full in DERIVED:
                raise ConfigError(f"{source}: {path}.{key} follows from parameters.{DERIVED[full]}; set that instead")
            _check_keys(inner, names[key], f"{path}.{key}".lstrip("."), source)
    elif get_origin(annotation) in (dict, Mapping) and isinstance(value, Mapping):
        for key, inner in value.items():
            _check_keys(inner, get_args(annotation)[1], f"{path}.{key}", source)


def _names(annotation: Any) -> dict[str, Any] | None:
    """Field -> type of a dataclass or pydantic model; None for any other type."""
    if is_dataclass(annotation) and isinstance(annotation, type):
        hints = get_type_hints(annotation)
        return {field.name: hints[field.name] for field in fields(annotation)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return None


def _check_settings(value: Any, path: str, source: str) -> None:
    """Settings of ZenML itself, and of the components in stacks/ by their flavor, which says what keys there are."""
    _check_names(value or {}, SETTINGS, path, source)
    for key, inner in (value or {}).items():
        _check_keys(inner, _settings_class(key), f"{path}.{key}", source)
        _check_value(inner, _settings_class(key), f"{path}.{key}", source)


def _settings_class(key: str) -> type[BaseModel]:
    if key == KUBERNETES:
        # here, since it brings the whole client of Kubernetes along
        from zenml.integrations.kubernetes.flavors.kubernetes_step_operator_flavor import KubernetesStepOperatorSettings

        return KubernetesStepOperatorSettings
    general: dict[str, type[BaseModel]] = {"docker": DockerSettings, "resources": ResourceSettings}
    return general.get(key, ContainerSettings)


def _check_pod_settings(value: Any, path: str, source: str) -> None:
    """Their parts are parts of a pod, whose keys ZenML only warns of; the client of Kubernetes knows them."""
    from kubernetes.client import models
    from zenml.integrations.kubernetes.pod_settings import KubernetesPodSettings

    _check_names(value, list(KubernetesPodSettings.model_fields), path, source)
    for key, inner in value.items():
        if key == "additional_pod_spec_args" and isinstance(inner, Mapping):  # by the names that Python has for them
            _check_names(inner, list(models.V1PodSpec.openapi_types), f"{path}.{key}", source)
            for name, part in inner.items():
                _check_part_of_pod(part, models.V1PodSpec.openapi_types[name], f"{path}.{key}.{name}", source)
        else:
            _check_part_of_pod(inner, PARTS_OF_POD.get(key, ""), f"{path}.{key}", source)


def _check_part_of_pod(value: Any, kind: str, path: str, source: str) -> None:
    """`kind` as the client of Kubernetes writes it: V1Volume, list[V1Volume], dict(str, str), str."""
    from kubernetes.client import models

    if kind.startswith("list[") and isinstance(value, list):
        for i, inner in enumerate(value):
            _check_part_of_pod(inner, kind[len("list[") : -1], f"{path}.{i}", source)
    elif hasattr(models, kind) and isinstance(value, Mapping):
        model = getattr(models, kind)
        kinds = {name: model.openapi_types[attribute] for attribute, name in model.attribute_map.items()}
        _check_names(value, list(kinds), path, source)
        for key, inner in value.items():
            _check_part_of_pod(inner, kinds[key], f"{path}.{key}", source)


def _check_names(value: Mapping[Any, Any], known: list[str], path: str, source: str) -> None:
    for key in value:
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"{source}: no key is called {f'{path}.{key}'.lstrip('.')!r}; {advice}")


def _check_value(value: Any, annotation: Any, path: str, source: str) -> None:
    try:
        strict = None if _names(annotation) is not None else ConfigDict(strict=True)  # those have rules of their own
        TypeAdapter(annotation, config=strict).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first(error, path)}") from None


def _first(error: ValidationError, path: str) -> str:
    detail = error.errors()[0]
    where = ".".join([path, *map(str, detail["loc"])]).strip(".")
    return f"{where}: {detail['msg'].removeprefix('Value error, ')} (got {detail['input']!r})"
