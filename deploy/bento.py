"""Bentos in BentoML's store: build, look up, export. `deploy/server.py` serves them.

A child process builds each Bento from model tags, because BentoML 1.4 mixes up the models of two Bentos that one
process builds. The tags of Bentos and models are digests of their content, so equal content is stored once.
"""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copy2, copytree, disk_usage, rmtree
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from deploy.source import ROOT, code_files
from gpt2core.adapter_files import ADAPTER_CONFIG
from gpt2core.files import (
    STORE_FILE,
    checkpoint_files,
    directory_sha256,
    file_sha256,
    list_files,
    model_files,
    naming_file,
    read_json,
    verify_directory,
)
from gpt2core.inference.native import library_files
from gpt2core.types import NAME, AdapterRef, Lineage

logger = logging.getLogger(__name__)

MODULES = ("bentos.service", "deploy.containers.proxy")  # run from a Bento: service, reverse proxy of the docker target
BUILD_FILES = tuple(
    f"bentos/{name}" for name in ("Dockerfile", "bentofile.yaml", "requirements.txt", "requirements-hashed.txt")
)
LOG_LINES = 60  # lines of a failed command's output in its error
LINE_LENGTH = 1000  # characters of each of these lines


class BentoError(RuntimeError):
    """A Bento that could not be built, found, exported or served."""


# exceptions from reading a Bento whose files are missing or damaged
DAMAGED = (BentoError, ValueError, OSError, KeyError, TypeError, yaml.YAMLError)


def describe_adapter(directory: Path) -> AdapterRef:
    """Return the sha256 of the adapter's files, and its LoRA configuration."""
    lora = read_json(directory / ADAPTER_CONFIG)["lora"]
    return AdapterRef.from_json({"sha256": directory_sha256(directory), **lora})


def build(base_dir: Path, adapter_dir: Path, lineage: Lineage, readme: str = "") -> str:
    """Build a Bento of base, adapter, serving code and lineage, unless the store has it intact; return its tag.

    The Bento's lineage.json is the lineage with this tag in `bento`.

    Args:
        readme: README.md of the Bento; "": BentoML's own.

    Raises:
        BentoError: a directory does not have the sha256 in the lineage, or the build failed; the message then has the
            last lines of BentoML's log.
    """
    _verify_models(base_dir, adapter_dir, lineage)
    models = {
        "base": _store_model(f"{NAME}-base", base_dir),
        "adapter": _store_model(f"{NAME}-adapter", adapter_dir),
    }
    with TemporaryDirectory() as temporary:
        context = Path(temporary)
        for file in (*code_files(*MODULES), *BUILD_FILES):  # no folders: other files may be secrets
            (context / file).parent.mkdir(parents=True, exist_ok=True)
            copy2(ROOT / file, context / file)
        for name, library in library_files().items():
            copy2(library, context / name)
        if readme:
            (context / "README.md").write_text(readme, encoding="utf-8")
        version = _version(directory_sha256(context), models, lineage)
        tag = f"{NAME}:{version}"
        if is_intact(tag):
            return tag
        rmtree(_in_store("bentos", tag), ignore_errors=True)
        described = json.dumps(replace(lineage, bento=tag).to_json(), indent=2)
        (context / "lineage.json").write_text(described, encoding="utf-8")
        arguments = [part for name, model in models.items() for part in ("--arg", f"{name}={model}")]
        _run("build", "--version", version, *arguments, "-f", "bentos/bentofile.yaml", ".", cwd=context)
    return tag


def kernels_sha256() -> str:
    """The sha256 of each library of compiled kernels that `build` adds; "" without them."""
    return ",".join(file_sha256(library) for library in library_files().values())


def exists(tag: str) -> bool:
    """Whether the store holds the Bento and its models. Reads files only."""
    bento = _in_store("bentos", tag) / "bento.yaml"
    if not bento.is_file():
        return False
    services = yaml.safe_load(bento.read_text(encoding="utf-8"))["services"]
    models = [model for service in services for model in service["models"]]
    return all((_in_store("models", model["tag"]) / STORE_FILE).is_file() for model in models)


def is_intact(tag: str) -> bool:
    """Whether the store holds the Bento and its models, and the content of each has the digest in its name."""
    try:
        verify_version(tag)
        for directory in models(tag).values():
            _verify_model(directory)
    except DAMAGED:
        return False
    return True


def lineage(tag: str) -> Lineage:
    """Return the lineage that a Bento of the store was built with.

    Raises:
        BentoError: the store has no such Bento.
    """
    if not exists(tag):
        raise BentoError(f"the Bento {tag} is not in the store; run the pipeline again with --no-cache")
    return Lineage.from_json_file(_in_store("bentos", tag) / "src" / "lineage.json")


def complete_lineage(file: Path) -> Lineage:
    """Read a lineage strictly: unknown or missing keys are an error, because digests and signatures do not cover them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not exactly as this version writes it.
    """
    known, stated = Lineage.from_json_file(file), read_json(file)
    if stated != known.to_json():
        key = _different_key(stated, known.to_json())
        raise ValueError(
            f"{file} was changed, or was written by another version of this project, which alone can check it: "
            f"key {key} is not as this version writes it"
        )
    return known


def _different_key(stated: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Return the dotted key, like run.name, of the first value in which the two mappings differ."""
    key = next(key for key in [*stated, *known] if (key in stated) != (key in known) or stated[key] != known[key])
    inner = stated.get(key, ""), known.get(key, "")
    return f"{key}.{_different_key(*inner)}" if all(isinstance(value, dict) for value in inner) else key


def models(tag: str) -> dict[str, Path]:
    """Return the stored directories of a Bento's base and adapter."""
    tags = yaml.safe_load((_in_store("bentos", tag) / "bento.yaml").read_text(encoding="utf-8"))["args"]
    return {name: _in_store("models", tags[name]) for name in ("base", "adapter")}


def verify_version(tag: str) -> None:
    """Verify the digest in a Bento's tag, which covers its code, model tags and lineage.

    Raises:
        BentoError: they have another digest.
        Other errors of DAMAGED: one of its files is missing or damaged.
    """
    source = _in_store("bentos", tag) / "src"
    stored = {name: f"{path.parent.name}:{path.name}" for name, path in models(tag).items()}
    added = ("lineage.json", "bentofile.yaml")  # files that `build` and BentoML add
    files = [file for file in list_files(source, exclude=added) if "__pycache__" not in file]
    code = directory_sha256(source, files)
    version = _version(code, stored, replace(complete_lineage(source / "lineage.json"), bento=""))
    if f"{NAME}:{version}" != tag:
        raise BentoError(f"its code or lineage was changed: their digest is {version}")


def _version(code_sha256: str, models: Mapping[str, str], lineage: Lineage) -> str:
    content = json.dumps([code_sha256, models, lineage.to_json()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def export(tag: str, file: Path) -> None:
    """Write a Bento and its models as a tar archive; the file name must end in .tar.

    Raises:
        BentoError: the export failed; the message has the last lines of BentoML's log.
    """
    _run("export", tag, str(file.absolute()), cwd=file.absolute().parent)


def bentoml_command(verb: str) -> list[str]:
    return [sys.executable, "-m", "bentoml", verb]


def bentoml_environment() -> dict[str, str]:
    """Return this process's environment without variables that would import this checkout's code or change the service.

    The store is that of this process, independent of the child's working directory. The output is UTF-8: BentoML
    prints characters that a latin-1 locale lacks.
    """
    removed = ("PYTHONPATH", "PORT", "BENTOML_PORT", "BENTOML_CONFIG", "BENTOML_CONFIG_OPTIONS", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return kept | {"BENTOML_HOME": str(bentoml_home()), "BENTOML_DO_NOT_TRACK": "true", "PYTHONUTF8": "1"}


def bentoml_home() -> Path:
    return Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml").absolute()


def check_bentoml_home() -> None:
    """
    Raises:
        ValueError: BentoML would read the name of a directory as that of a variable; some names never end.
    """
    home = str(bentoml_home())
    if os.path.expandvars(home) != home:
        raise ValueError(f"BentoML's store {home} contains a variable; set BENTOML_HOME to a directory without $")


def log_tail(log: str) -> str:
    return "\n".join(_shorten(line) for line in log.splitlines()[-LOG_LINES:])


def _shorten(line: str) -> str:
    return line if len(line) <= LINE_LENGTH else f"{line[:LINE_LENGTH]} … ({len(line):,} characters)"


def _verify_models(base_dir: Path, adapter_dir: Path, lineage: Lineage) -> None:
    try:
        verify_directory(base_dir, lineage.base.sha256, checkpoint_files(base_dir))
        verify_directory(adapter_dir, lineage.adapter.sha256)
    except ValueError as error:
        raise BentoError(str(error)) from None


def _store_model(name: str, directory: Path) -> str:
    """Copy a directory into BentoML's model store unless the store has it; return its tag, a digest of its content.

    A damaged stored copy is replaced.
    """
    import bentoml  # takes 1 s to import; cached runs do not need it

    version = directory_sha256(directory)[:16]
    tag = f"{name}:{version}"
    stored = _in_store("models", tag)
    if stored.is_dir():
        try:
            _verify_model(stored)
        except ValueError as error:
            logger.warning("%s; it is stored again", error)
            rmtree(stored)
    if not (stored / STORE_FILE).is_file():
        size = sum(file.stat().st_size for file in directory.rglob("*"))
        with naming_file(stored, size), bentoml.models.create(tag) as model:
            copytree(directory, model.path, dirs_exist_ok=True)
        stored.chmod(0o755)  # BentoML creates it with 0700, which a container's user cannot read
    return tag


def _verify_model(stored: Path) -> None:
    """Raise ValueError if the content of a directory of the model store does not have the digest in its name."""
    verify_directory(stored, stored.name, model_files(stored))


def _in_store(kind: str, tag: str) -> Path:
    name, _, version = tag.partition(":")
    return bentoml_home() / kind / name / version


def _run(verb: str, *arguments: str, cwd: Path) -> None:
    command = [*bentoml_command(verb), *arguments]
    done = subprocess.run(  # noqa: S603 (no shell)
        command, cwd=cwd, env=bentoml_environment(), capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        log, home = done.stdout + done.stderr, bentoml_home()
        is_full = os.strerror(errno.ENOSPC) in log and home.is_dir()
        free = f"; {home} has {disk_usage(home).free:,} bytes free" if is_full else ""
        raise BentoError(f"bentoml {verb} failed{free}:\n{log_tail(log)}")
