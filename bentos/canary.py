"""A canary: an adapter that gets a share of the requests for the default model; statistics of both versions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from bentos.completion import CompletionResult, FinishReason, GenerationRequest
from bentos.schemas import TUNED, AdapterVersion, CanaryArm, CanaryRequest, CanaryStatus, ShadowStatus


@dataclass(frozen=True)
class Comparison:
    """A canary's answer, compared with the answer that the client got."""

    shadow: CompletionResult
    agreed: bool  # equal after `gpt2core.metrics.normalize`
    token_f1: float  # F1 of the canary's answer, with the client's answer as reference
    mean_logprob: float | None  # mean log probability of the canary's tokens, in nats; None: it generated no token


class Canary:
    """The canary of this process, if there is one, and the statistics of both versions since it started."""

    def __init__(self) -> None:
        self.request: CanaryRequest | None = None  # None: there is no canary
        self._arms: dict[str, CanaryArm] = {}
        self._shadow_status = ShadowStatus()

    @property
    def adapter(self) -> str | None:
        """The name of the canary's adapter."""
        return None if self.request is None else self.request.adapter

    @property
    def is_shadow(self) -> bool:
        return self.request is not None and self.request.shadow

    def set(self, request: CanaryRequest | None, versions: Sequence[AdapterVersion]) -> bool:
        """Start, change or end (None) the canary.

        Returns whether the statistics were reset, because the mode or a version has changed.

        Args:
            versions: of the default adapter and of the canary.
        """
        is_shadow = request is not None and request.shadow
        restarts = [*versions] != [arm.adapter for arm in self._arms.values()] or is_shadow != self.is_shadow
        if restarts:
            self._arms = {version.name: CanaryArm(adapter=version) for version in versions}
            self._shadow_status = ShadowStatus()
        self.request = request
        return restarts

    def status(self) -> CanaryStatus:
        shadow = self._shadow_status if self.is_shadow else None
        return CanaryStatus(canary=self.request, versions=[*self._arms.values()], shadow=shadow)

    def route(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request for the version that answers it."""
        if self.request is None or self.request.shadow or not self._chooses(request):
            return request
        return replace(request, model=self.request.adapter)

    def repeats(self, result: CompletionResult) -> bool:
        """Whether the canary repeats this request: shadow mode is on, and the answers can be compared.

        Sampled answers differ by chance. A request with a grammar cannot be repeated, because a grammar is used once.
        """
        request = result.request
        is_comparable = request.config.temperature == 0 and request.grammar is None and not request.prompt_only
        is_finished = result.finish_reason in get_args(FinishReason)
        return self.is_shadow and is_comparable and is_finished and self._chooses(request)

    def observe(self, result: CompletionResult) -> bool:
        """Add a completion to the statistics of its version. Return False if this version is not compared any more."""
        arm = self._arms.get(result.request.model)
        if arm is None or arm.adapter != result.adapter:
            return False
        if result.failed:
            arm.failed += 1
        elif result.finish_reason != "cancelled":
            arm.completed += 1
            change = result.ended_at - result.submitted_at - arm.mean_seconds
            arm.mean_seconds += change / arm.completed
            arm.variance += (change * change * (1 - 1 / arm.completed) - arm.variance) / arm.completed  # Welford
        return True

    def observe_shadow(self, comparison: Comparison) -> None:
        """Add the comparison of a canary's answer to the statistics of shadow mode."""
        status = self._shadow_status
        status.compared += 1
        status.agreed += comparison.agreed
        status.mean_token_f1 += (comparison.token_f1 - status.mean_token_f1) / status.compared
        status.mean_logprob += ((comparison.mean_logprob or 0.0) - status.mean_logprob) / status.compared

    def observe_dropped(self) -> None:
        """Count a request that the canary was to repeat, but did not."""
        self._shadow_status.dropped += 1

    def _chooses(self, request: GenerationRequest) -> bool:
        key = request.route_key or request.request_id
        return self.request is not None and request.model == TUNED and routes_to_canary(self.request, key)


def routes_to_canary(canary: CanaryRequest, key: str) -> bool:
    """Whether requests with this key go to the canary. A larger share includes all keys of a smaller share."""
    digest = hashlib.sha256(f"{canary.adapter}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < canary.share * 2**64
