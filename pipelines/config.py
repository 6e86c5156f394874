"""Reads and validates run configurations. Every wrong key or value is reported before anything runs.

ZenML ignores most misspelled keys. Here every key at every level is checked against the dataclasses and ZenML's models.
"""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from inspect import getmodule, signature
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from zenml.config.pipeline_run_configuration import PipelineRunConfiguration
from zenml.pipelines.pipeline_definition import Pipeline
from zenml.steps import BaseStep

from pipelines.errors import ConfigError, check_names
from pipelines.platform_settings import KUBERNETES, SETTINGS, check_pod_settings, settings_class
from pipelines.yaml_files import load_yaml

# Keys that are set from `seed`, the source of all randomness of a run
DERIVED = {"train.seed": "seed", "pretrain.seed": "seed", "base.pretrain.seed": "seed"}


def read_config(file: str | Path, pipeline: Pipeline) -> dict[str, Any]:
    """Read and check the run configuration in a YAML file.

    Raises:
        ConfigError: the file does not exist, is not valid YAML, is for another pipeline, or has an unknown key or a
            value that is not allowed.
    """
    file = Path(file)
    if file.is_dir():
        raise ConfigError(f"{file} is a directory; pass a YAML file")
    if not file.is_file():
        if not file.parent.is_dir():
            raise ConfigError(f"{file} does not exist; there is no directory {file.parent}")
        existing = ", ".join(sorted(str(path) for path in Path(file.parent).glob("*.yaml"))) or "no YAML file"
        raise ConfigError(f"{file} does not exist; its directory has {existing}")
    try:
        config = load_yaml(file.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error}; save it as UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    _check_is_of(pipeline, config, str(file))
    check_config(config, str(file), pipeline)
    return config


def _check_is_of(pipeline: Pipeline, config: Any, source: str) -> None:
    """Raise ConfigError if a sweep configuration is used with another pipeline, or the reverse."""
    parameters = (config.get("parameters") or {}) if isinstance(config, Mapping) else {}
    is_sweep = isinstance(parameters, Mapping) and "sweep" in parameters
    if is_sweep and pipeline.name != "sweep_pipeline":
        raise ConfigError(
            f"{source} configures a sweep (parameters.sweep); use `python run.py sweep --config {source}`"
        )
    if pipeline.name == "sweep_pipeline" and not is_sweep:
        raise ConfigError(f"{source} has no parameters.sweep; configs/experiments/ has configurations of sweeps")


def set_values(config: dict[str, Any], assignments: Sequence[str], pipeline: Pipeline) -> None:
    """Apply each `a.b=value` of the command line to the configuration's `parameters`, then check the result."""
    for assignment in assignments:
        _set_value(config, assignment)
    check_config(config, " ".join(f"--set {assignment}" for assignment in assignments), pipeline)


def check_config(config: Any, source: str, pipeline: Pipeline) -> None:
    """Raise ConfigError for the first error in the configuration.

    Args:
        source: origin of the configuration, for the message.
    """
    names = list(signature(pipeline.entrypoint).parameters)
    if isinstance(config, Mapping):
        known = list(PipelineRunConfiguration.model_fields)
        check_names(config, known, "", source, {name: f"parameters.{name}" for name in names if name not in known})
    _check_keys(config, PipelineRunConfiguration, "", source)
    for name in ("parameters", "steps", "model"):
        if not isinstance(config.get(name), Mapping | None):
            raise _no_mapping(config[name], name, source)
    steps = {step.name for step in getmodule(pipeline.entrypoint).__dict__.values() if isinstance(step, BaseStep)}
    check_names(config.get("steps") or {}, sorted(steps), "steps", source)
    parameters = config.get("parameters") or {}
    types = get_type_hints(pipeline.entrypoint, include_extras=True)
    check_names(parameters, names, "parameters", source)
    for name, value in parameters.items():
        _check_keys(value, types[name], f"parameters.{name}", source)
        _check_value(value, types[name], f"parameters.{name}", source)
    try:
        PipelineRunConfiguration(**{key: value for key, value in config.items() if key != "parameters"})
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first(error, '')}") from None


def _set_value(config: dict[str, Any], assignment: str) -> None:
    """Set a value, which is parsed as YAML."""
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(
            f"--set {assignment}: the value is missing; use --set KEY=VALUE, like --set seed=1 or --set lora.rank=16"
        )
    try:
        value = load_yaml(text)
    except ValueError as error:
        hint = f"put text in quotes, also for the shell: --set '{path}={json.dumps(text)}'"
        raise ConfigError(f"--set {assignment}: the value is not valid YAML: {error}\n{hint}") from None
    *parents, last = path.removeprefix("parameters.").split(".")
    mapping = config
    for key in ("parameters", *parents):
        if mapping.get(key) is None:
            mapping[key] = {}
        mapping = mapping[key]
        if not isinstance(mapping, dict):
            raise ConfigError(f"--set {assignment}: {key} is a value, not a mapping")
    mapping[last] = value


def _check_keys(value: Any, annotation: Any, path: str, source: str) -> None:
    """Check recursively that every key of `value` is a field of the annotated type."""
    annotation = _member_for(value, annotation)
    if path == "settings" or path.endswith(".settings"):
        _check_settings(value, path, source)
    elif path.endswith(f"settings.{KUBERNETES}.pod_settings") and isinstance(value, Mapping):
        check_pod_settings(value, path, source)
    elif is_dataclass(annotation):
        _check_dataclass(value, annotation, path, source)
    elif _field_types(annotation) is not None:
        _check_model(value, annotation, path, source)
    elif get_origin(annotation) in (dict, Mapping) and isinstance(value, Mapping):
        for key, inner in value.items():
            _check_keys(inner, get_args(annotation)[1], f"{path}.{key}", source)


def _member_for(value: Any, annotation: Any) -> Any:
    """Return the member of a union whose keys are checked; any other annotation unchanged."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    members = [member for member in get_args(annotation) if member is not type(None)]
    structured = [member for member in members if _field_types(member) is not None]
    return structured[0] if structured and isinstance(value, Mapping) else members[0]


def _check_dataclass(value: Any, annotation: Any, path: str, source: str) -> None:
    """Check a parameter of this project's pipelines."""
    if not isinstance(value, Mapping):
        raise _no_mapping(value, path, source)
    types = _field_types(annotation) or {}
    check_names(value, list(types), path, source)
    for key, inner in value.items():
        full = f"{path}.{key}"
        if given := DERIVED.get(full.removeprefix("parameters.")):
            raise ConfigError(f"{source}: {full} is derived from parameters.{given}; set that")
        _check_bool(inner, types[key], full, source)
        _check_keys(inner, types[key], full, source)


def _check_model(value: Any, annotation: Any, path: str, source: str) -> None:
    """Check a part of ZenML's configuration. Below the top, it may also be a short form, which is no mapping."""
    if isinstance(value, Mapping):
        types = _field_types(annotation) or {}
        check_names(value, list(types), path, source)
        for key, inner in value.items():
            _check_keys(inner, types[key], f"{path}.{key}".lstrip("."), source)
    elif value is not None and not path:
        raise _no_mapping(value, "the file", source)


def _no_mapping(value: Any, path: str, source: str) -> ConfigError:
    return ConfigError(f"{source}: {path} is {_shorten(value)}; it must be a mapping of keys to values")


def _check_bool(value: Any, annotation: Any, path: str, source: str) -> None:
    """Reject a bool for a number and vice versa. pydantic would convert them: `epochs: true` would be 1."""
    if annotation is bool and isinstance(value, int) and not isinstance(value, bool):
        raise ConfigError(f"{source}: {path} is {_shorten(value)}; it must be true or false")
    if annotation is not bool and isinstance(value, bool):
        raise ConfigError(f"{source}: {path} is {value}; it must not be true or false")


def _field_types(annotation: Any) -> dict[str, Any] | None:
    """Return the types of a dataclass's or pydantic model's fields by name; None for any other type."""
    if is_dataclass(annotation) and isinstance(annotation, type):
        hints = get_type_hints(annotation)
        return {field.name: hints[field.name] for field in fields(annotation)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return None


def _check_settings(value: Any, path: str, source: str) -> None:
    """Check the settings of ZenML and of the components in stacks/, which are keyed by type and flavor."""
    if not isinstance(value, Mapping | None):
        raise _no_mapping(value, path, source)
    check_names(value or {}, SETTINGS, path, source)
    for key, inner in (value or {}).items():
        _check_keys(inner, settings_class(key), f"{path}.{key}", source)
        _check_value(inner, settings_class(key), f"{path}.{key}", source)


def _check_value(value: Any, annotation: Any, path: str, source: str) -> None:
    try:
        # Plain types are checked strictly: "1" is not a number, and true is not 1. Dataclasses and pydantic models have
        # their own rules.
        strict = None if _field_types(annotation) is not None else ConfigDict(strict=True)
        TypeAdapter(annotation, config=strict).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first(error, path)}") from None
    except TypeError:  # ZenML's models raise it for a value that is no mapping
        raise _no_mapping(value, path, source) from None


def _shorten(value: Any) -> str:
    """Shorten a value for a message. With YAML aliases, a small file can have a huge value."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    return short.repr(value)


# pydantic's names of Python types -> names of YAML types
_YAML_TERMS = {
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "a mapping",
    "Tuple ": "The list ",
}


def _first(error: ValidationError, path: str) -> str:
    """Return the message of the first error, with the key as the user knows it instead of the Python class."""
    detail = error.errors()[0]
    where = ".".join([path, *map(str, detail["loc"])]).strip(".")
    message = detail["msg"].removeprefix("Value error, ")
    if prefix := re.match(r"\w+Config\.(?=\w+ is )", message):  # from `check_field` of a dataclass
        return f"{where}.{message[prefix.end() :]}"
    for python, yaml in _YAML_TERMS.items():
        message = message.replace(python, yaml)
    is_number = detail["type"] == "string_type" and isinstance(detail["input"], int | float)
    quotes = "; put it in quotes" if is_number else ""
    return f"{where}: {message} (got {_shorten(detail['input'])}){quotes}"
