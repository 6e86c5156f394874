"""`python run.py canary`: start, observe and end a canary of a running service through its admin API."""

from collections.abc import Mapping
from ipaddress import ip_address
from math import sqrt
from statistics import NormalDist
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from statsmodels.stats.proportion import confint_proportions_2indep

from bentos.schemas import CanaryArm, CanaryStatus
from deploy.verify import first_token

TIMEOUT = 60  # seconds
MIN_COMPLETIONS = 30  # minimum per version for comparing durations
Z = NormalDist().inv_cdf(0.975)

Interval = tuple[float, float]
Verdict = Literal["promote", "abort", "wait"]


class CanaryError(RuntimeError):
    """The service cannot be reached, or rejected the request; the message says why."""


class Service:
    """The admin API of a service. Every method raises CanaryError."""

    def __init__(self, url: str) -> None:
        """Read the token from the environment variable GPT2_ADMIN_TOKEN; if it has several, the first one."""
        self.url = url.rstrip("/")
        self._token = first_token("GPT2_ADMIN_TOKEN")

    def start(self, name: str, path: str, share: float, shadow: bool) -> CanaryStatus:
        """Load the adapter unless `path` is "", and send it a share of the requests, or copies of them (`shadow`)."""
        if path:
            self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        return self._status("POST", "/v1/start_canary", {"adapter": name, "share": share, "shadow": shadow})

    def status(self) -> CanaryStatus:
        return self._status("GET", "/v1/canary")

    def promote(self) -> CanaryStatus:
        """Send all requests to the canary."""
        return self._status("POST", "/v1/start_canary", {"adapter": self._canary(), "share": 1})

    def abort(self) -> CanaryStatus:
        """Send no more requests to the canary, and unload it."""
        name = self._canary()
        status = self._status("POST", "/v1/end_canary")
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        return status

    def _canary(self) -> str:
        canary = self.status().canary
        if canary is None:
            raise CanaryError(f"{self.url} has no canary; start one with `python run.py canary start NAME`")
        return canary.adapter

    def _status(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> CanaryStatus:
        content = self._call(method, path, body)
        try:
            return CanaryStatus.model_validate(content)
        except ValueError:
            raise CanaryError(f"{self.url}{path} did not return a canary's status; it is not this service") from None

    def _authenticate(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            with requests.Session() as session:
                session.auth = self._authenticate  # a password of ~/.netrc would replace a header
                # a proxy of the environment cannot reach this machine, and must not get the token
                session.trust_env = not _is_loopback(self.url)
                response = session.request(method, self.url + path, json=body, timeout=TIMEOUT)
            content: dict[str, Any] = response.json()
            problem = None if response.ok else content["error"]["message"]
        except (requests.RequestException, LookupError, TypeError) as error:
            raise CanaryError(f"{self.url} cannot be reached, or is not this service: {error}") from None
        if problem is not None:
            raise CanaryError(f"{self.url}{path}: {problem}")
        return content


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name, or no valid URL
        return False


def decide(status: CanaryStatus, max_failures: float, max_slowdown: float) -> tuple[Verdict, str]:
    """Return "abort", "promote" or "wait", and the reason.

    "abort": the canary is significantly worse than the limits allow. "promote": it is significantly within the limits.

    Args:
        status: the response of GET /v1/canary.
        max_failures: allowed increase of the share of failed completions.
        max_slowdown: allowed increase of the mean duration, as a fraction of the stable version's mean.
    """
    if status.canary is None:
        raise CanaryError("there is no canary to decide about")
    if status.shadow is not None:
        raise CanaryError("the canary is in shadow mode, where `status` compares answers; start it without --shadow")
    stable, new = status.versions
    if min(arm.completed + arm.failed for arm in (stable, new)) < 1:
        return "wait", "one of the versions has had no request yet"
    measures = [("failures", _failures(stable, new), max_failures)]
    if min(arm.completed for arm in (stable, new)) >= MIN_COMPLETIONS:
        measures.append(("duration", _slowdown(stable, new), max_slowdown))
    texts = [f"{name} {low:+.1%} to {high:+.1%} (at most {limit:+.1%})" for name, (low, high), limit in measures]
    reason = "canary minus stable, 95 % intervals: " + "; ".join(texts)
    if any(low > limit for _, (low, _), limit in measures):
        return "abort", reason
    if len(measures) == 2 and all(high <= limit for _, (_, high), limit in measures):
        return "promote", reason
    return "wait", reason


def describe(status: CanaryStatus) -> str:
    if status.canary is None:
        return "no canary"
    name, shadow = status.canary.adapter, status.shadow
    lines = [f"{status.canary.share:.0%} of the requests go to {name}" + (" too, in shadow mode" if shadow else "")]
    for arm in status.versions:
        mean = f", {arm.mean_seconds:.3f} s on average" if arm.completed else ""
        version = f"{arm.adapter.name} ({arm.adapter.sha256[:16]})"
        lines.append(f"{version}: {arm.completed} completed, {arm.failed} failed{mean}")
    if shadow:
        means = (
            f": {shadow.agreed} agree, token F1 {shadow.mean_token_f1:.3f}, "
            f"log probability per token of {name} {shadow.mean_logprob:.3f}"
        )
        compared = f"{shadow.compared} answers compared{means if shadow.compared else ''}"
        lines.append(f"{compared}; {shadow.dropped} requests dropped")
    return "\n".join(lines)


def _failures(stable: CanaryArm, new: CanaryArm) -> Interval:
    """Compute the interval of the difference in the share of failed completions, by Newcombe's method."""
    counts = [(arm.failed, arm.completed + arm.failed) for arm in (new, stable)]
    low, high = confint_proportions_2indep(*counts[0], *counts[1], method="newcomb", compare="diff")
    return float(low), float(high)


def _slowdown(stable: CanaryArm, new: CanaryArm) -> Interval:
    """Compute the interval of the difference in the mean duration, as a share of the stable version's mean."""
    difference = new.mean_seconds - stable.mean_seconds
    error = Z * sqrt(sum(arm.variance / arm.completed for arm in (new, stable)))
    mean = stable.mean_seconds
    return (difference - error) / mean, (difference + error) / mean
