"""A canary: an adapter that gets a share of the requests for the default model; statistics of both versions."""

import hashlib

from bentos.completion import CompletionResult
from bentos.schemas import CanaryArm, CanaryRequest, ShadowStatus
from bentos.shadow import Comparison


def routes_to_canary(canary: CanaryRequest, key: str) -> bool:
    """Whether requests with this key go to the canary. A larger share includes all keys of a smaller share."""
    digest = hashlib.sha256(f"{canary.adapter}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < canary.share * 2**64


def observe(arm: CanaryArm, result: CompletionResult) -> None:
    """Add a completion to the statistics of its version, in place."""
    if result.failed:
        arm.failed += 1
    elif result.finish_reason != "cancelled":
        arm.completed += 1
        change = result.ended_at - result.submitted_at - arm.mean_seconds
        arm.mean_seconds += change / arm.completed
        arm.variance += (change * change * (1 - 1 / arm.completed) - arm.variance) / arm.completed  # Welford


def observe_shadow(status: ShadowStatus, comparison: Comparison) -> None:
    """Add the comparison of a canary's answer to the statistics of shadow mode, in place."""
    status.compared += 1
    status.agreed += comparison.agreed
    status.mean_token_f1 += (comparison.token_f1 - status.mean_token_f1) / status.compared
    status.mean_logprob += ((comparison.mean_logprob or 0.0) - status.mean_logprob) / status.compared
