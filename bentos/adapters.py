"""The adapters that the engine serves, and which of them is the canary."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bentos.canary import Canary
from bentos.errors import ServiceError
from bentos.limits import MAX_ADAPTERS
from bentos.schemas import BASE, TUNED, AdapterVersion, CanaryRequest
from bentos.shadow import ShadowQueue
from bentos.shared_adapters import MANIFEST, Manifest
from gpt2core.files import directory_sha256, model_files

if TYPE_CHECKING:
    from gpt2core.engine import Engine


class Adapters:
    """Loads and unloads the engine's adapters, and sets the canary. Not thread-safe: use it from one event loop."""

    def __init__(
        self,
        engine: "Engine",
        tuned_dir: Path,
        canary: Canary,
        shadows: ShadowQueue,
        adapters_dir: str = "",
        follow_adapters: bool = False,
    ) -> None:
        """Load the run's adapter.

        Args:
            tuned_dir: directory of the run's adapter.
            shadows: cleared when the canary changes.
            adapters_dir: directory below which other adapters may be loaded; "": no other adapters.
            follow_adapters: only `follow` may change adapters and canary; other changes are rejected.
        """
        self._engine, self._canary, self._shadows = engine, canary, shadows
        self._adapters_dir, self._follow_adapters = adapters_dir, follow_adapters
        self._versions: dict[str, AdapterVersion] = {}
        self._changing = asyncio.Lock()
        self._load(TUNED, tuned_dir)

    @property
    def models(self) -> dict[str, AdapterVersion | None]:
        """Return the names that requests may use: base with the run's adapter, base alone, and loaded adapters."""
        return {TUNED: self._versions[TUNED], BASE: None, **self._versions}

    def check_model(self, name: str, param: str | None) -> None:
        """
        Raises:
            ServiceError: no model has that name.
        """
        if name not in self.models:
            message = f"there is no model {name!r}; available: {', '.join(self.models)}"
            raise ServiceError("model_not_found", message, param)

    async def load(self, name: str, directory: str) -> AdapterVersion:
        """Load an adapter, or replace the adapter of this name. Running completions keep their adapter.

        Raises:
            ServiceError: the name is reserved, too many are loaded, or the directory holds no adapter for this base.
        """
        if not self._adapters_dir:
            raise ServiceError("forbidden", "loading adapters is disabled: GPT2_ADAPTERS_DIR is not set")
        self._check_not_following()
        if name in (TUNED, BASE):
            raise ServiceError("invalid_request", f"lora_name: {name} is reserved", "lora_name")
        try:
            path = self._find(directory)
        except FileNotFoundError as error:
            raise ServiceError("adapter_not_found", f"lora_path: {error}", "lora_path") from None
        async with self._changing:
            if name not in self._versions and len(self._versions) > MAX_ADAPTERS:
                message = f"{MAX_ADAPTERS} adapters are already loaded; unload one first"
                raise ServiceError("too_many_adapters", message, "lora_name")
            try:
                version = await asyncio.to_thread(self._load, name, path)
            except (ValueError, OSError) as error:
                raise ServiceError("invalid_adapter", f"lora_path: {error}", "lora_path") from None
            self._set_canary(self._canary.request)  # its adapter may be another version now
            return version

    async def unload(self, name: str) -> None:
        """Unload an adapter; running completions keep it.

        Raises:
            ServiceError: no adapter has that name, it is reserved, or it is the canary.
        """
        self._check_not_following()
        async with self._changing:
            if name in (TUNED, BASE):
                raise ServiceError("invalid_request", f"lora_name: {name} cannot be unloaded", "lora_name")
            self.check_model(name, "lora_name")
            if self._canary.adapter == name:
                raise ServiceError("invalid_request", f"lora_name: {name} is the canary; end it first", "lora_name")
            self._unload(name)

    async def set_canary(self, request: CanaryRequest | None) -> None:
        """Start a canary, change its share, or end it (None). Running completions keep their adapter.

        Raises:
            ServiceError: no adapter has that name.
        """
        self._check_not_following()
        async with self._changing:
            if request is not None and request.adapter not in self._versions.keys() - {TUNED}:
                message = f"adapter: {request.adapter!r} is not loaded; load it with POST /v1/load_lora_adapter"
                raise ServiceError("adapter_not_found", message, "adapter")
            self._set_canary(request)

    async def follow(self, manifest: Manifest) -> None:
        """Serve the adapters and the canary of the manifest.

        No request fails: an adapter is loaded before requests are routed to it, and unloaded afterwards.

        Raises:
            ValueError, OSError: an adapter is missing, or differs from the manifest. Adapters that were loaded before
                stay loaded, and the canary does not change.
        """
        async with self._changing:
            for name, shared in manifest.adapters.items():
                loaded = self._versions.get(name)
                if loaded is None or loaded.sha256 != shared.sha256:
                    await asyncio.to_thread(self._load, name, self._find(shared.path), shared.sha256)
            self._set_canary(manifest.canary)
            for name in self._versions.keys() - {TUNED, *manifest.adapters}:
                self._unload(name)

    def _set_canary(self, request: CanaryRequest | None) -> None:
        names = [] if request is None else [TUNED, request.adapter]
        if self._canary.set(request, [self._versions[name] for name in names]):
            self._shadows.clear()

    def _check_not_following(self) -> None:
        if self._follow_adapters:
            message = f"GPT2_FOLLOW_ADAPTERS is true: {MANIFEST} in GPT2_ADAPTERS_DIR says which adapters are served"
            raise ServiceError("forbidden", message)

    def _find(self, directory: str) -> Path:
        """Return the path of an adapter's directory.

        Raises:
            FileNotFoundError: the directory does not exist or is not below GPT2_ADAPTERS_DIR.
        """
        root = Path(self._adapters_dir).resolve()
        try:
            path = (root / directory).resolve()
            if root in path.parents and path.is_dir():
                return path
        except (OSError, ValueError, RuntimeError):  # too long a name, a NUL, a cycle of symbolic links
            pass
        raise FileNotFoundError(f"there is no directory {directory!r} below GPT2_ADAPTERS_DIR")

    def _load(self, name: str, directory: Path, sha256: str | None = None) -> AdapterVersion:
        files = model_files(directory)
        if name != TUNED:
            self._check_links(directory, files)
        version = AdapterVersion(name=name, sha256=directory_sha256(directory, files))
        if sha256 not in (None, version.sha256):
            raise ValueError(f"{directory} has the sha256 {version.sha256}, not {sha256} as {MANIFEST} says")
        self._engine.load_adapter(name, directory)
        self._versions[name] = version
        return version

    def _check_links(self, directory: Path, files: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a file is a symbolic link to a file outside of GPT2_ADAPTERS_DIR.
        """
        root = Path(self._adapters_dir).resolve()
        for file in files:
            if root not in (directory / file).resolve().parents:
                raise ValueError(f"{directory / file} is a link to a file outside of GPT2_ADAPTERS_DIR")

    def _unload(self, name: str) -> None:
        del self._versions[name]
        self._engine.unload_adapter(name)
