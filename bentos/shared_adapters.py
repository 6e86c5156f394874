"""Adapters shared by all replicas: every replica applies `adapters.json` of a shared directory when it changes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bentos.limits import ADAPTERS_POLL, MAX_ADAPTERS
from bentos.metrics import render_gauges
from bentos.schemas import BASE, TUNED, AdapterName, CanaryRequest
from gpt2core.files import directory_sha256, json_bytes, model_files, write_files
from gpt2core.peft_config import PEFT_CONFIG

MANIFEST = "adapters.json"

logger = logging.getLogger(__name__)


class SharedAdapter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str  # path of the adapter's directory, relative to the manifest's directory
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The adapters that every replica serves, by name, and the canary."""

    model_config = ConfigDict(extra="forbid")

    adapters: Annotated[dict[AdapterName, SharedAdapter], Field(max_length=MAX_ADAPTERS)]
    canary: CanaryRequest | None = None

    @model_validator(mode="after")
    def _check_names(self) -> "Manifest":
        if reserved := self.adapters.keys() & {TUNED, BASE}:
            raise ValueError(f"the name {reserved.pop()} is reserved")
        if self.canary is not None and self.canary.adapter not in self.adapters:
            raise ValueError(f"the canary {self.canary.adapter} is not one of the adapters")
        return self


def read(content: bytes | str) -> Manifest:
    """Parse a manifest.

    Raises:
        ValueError: it is not valid, with a message of one line.
    """
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise ValueError(f"{MANIFEST}: {key}: {first['msg']}" if key else f"{MANIFEST}: {first['msg']}") from None


def publish(
    directory: Path, adapters: Mapping[str, str], canary: tuple[str, float] | None = None, shadow: bool = False
) -> Manifest:
    """Write the manifest atomically, with the current digests of the adapters.

    Args:
        adapters: name -> directory, relative to `directory`.
        canary: the canary's name and share.
        shadow: the canary is in shadow mode.

    Raises:
        ValueError, OSError: a name or the canary is wrong, or a directory has no adapter or is not below `directory`.
    """
    shared = {}
    for name, path in adapters.items():
        files = model_files(directory / path) if (directory / path).is_dir() else []
        if not {"adapter.json", PEFT_CONFIG} & {*files}:
            raise ValueError(f"{directory / path} is not a directory with an adapter")
        for file in ("", *files):
            if directory.resolve() not in (directory / path / file).resolve().parents:
                raise ValueError(f"{directory / path / file} is not below {directory}, so no replica would load it")
        shared[name] = {"path": path, "sha256": directory_sha256(directory / path, files)}
    request = None if canary is None else {"adapter": canary[0], "share": canary[1], "shadow": shadow}
    content = json_bytes({"adapters": shared, "canary": request})
    manifest = read(content)
    write_files(directory, {MANIFEST: content})
    return manifest


class Follower:
    """Applies the manifest of a directory whenever it changes. Polls, because network volumes send no change events.

    Attributes:
        ready: whether a manifest has been applied. Stays True if a later manifest cannot be applied.
        error: why the current manifest is not applied; "" if it is applied.
    """

    def __init__(self, directory: str, apply: Callable[[Manifest], Awaitable[None]]) -> None:
        """`apply` raises ValueError or OSError if an adapter differs from the manifest; it is then retried."""
        self.ready, self.error = False, ""
        self._file, self._apply = Path(directory, MANIFEST), apply
        self._applied = b""

    def metrics_text(self) -> str:
        """Return a gauge, in the Prometheus text format: whether this replica serves the current manifest."""
        return render_gauges({"gpt2_adapters_in_sync": ("1 if adapters.json is applied, else 0", not self.error)})

    async def run(self) -> None:
        while True:
            await self.poll()
            await asyncio.sleep(ADAPTERS_POLL)

    async def poll(self) -> None:
        try:
            content = await asyncio.to_thread(self._file.read_bytes)
            if content != self._applied:
                manifest = read(content)
                await self._apply(manifest)
                self._applied, self.ready = content, True
                logger.info("%s: serving %s", self._file, ", ".join(manifest.adapters) or "no adapters")
            self.error = ""
        except (ValueError, OSError) as error:
            if str(error) != self.error:
                logger.warning("%s is not applied, trying again: %s", self._file, error)
            self.error = str(error)
