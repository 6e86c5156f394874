"""What /metrics says beside BentoML's own: tokens, and how long they took, by adapter; the engine's state."""

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from gpt2core.inference.request import Request

MAX_LABELS = 32  # adapters with series of their own; names that come later share "other"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

requests = Counter("gpt2_requests", "Replies that ended, and why", ["adapter", "finish_reason"])
prompt_tokens = Counter("gpt2_prompt_tokens", "Tokens of prompts", ["adapter"])
completion_tokens = Counter("gpt2_completion_tokens", "Tokens of replies", ["adapter"])
time_to_first_token = Histogram(
    "gpt2_time_to_first_token_seconds", "From asking to the first token, queue included", ["adapter"], buckets=SECONDS
)
inter_token = Histogram(
    "gpt2_inter_token_seconds", "From one token of a reply to the next", ["adapter"], buckets=SECONDS
)
refused = Counter("gpt2_refused_requests", "Requests that the queue had no room for")

_labels: set[str] = set()
_lock = threading.Lock()


def observe(request: Request, adapter: str, finish_reason: str) -> None:
    """Count a reply that ended."""
    label = _label(adapter)
    requests.labels(label, finish_reason).inc()
    prompt_tokens.labels(label).inc(len(request.input_ids))
    completion_tokens.labels(label).inc(len(request.tokens))
    if request.first_token_at is not None:
        time_to_first_token.labels(label).observe(request.first_token_at - request.submitted_at)
    gaps = inter_token.labels(label)
    for before, after in pairwise(request.token_times):
        gaps.observe(after - before)


def gauges(values: Callable[[], dict[str, tuple[str, float]]]) -> str:
    """`{name: (help, value)}` in Prometheus' text form. Not Gauges: those of a process that died would stay."""

    class Now:
        def collect(self) -> Iterator[GaugeMetricFamily]:
            for name, (text, value) in values().items():
                yield GaugeMetricFamily(name, text, value=value)

    registry = CollectorRegistry()
    registry.register(Now())
    return generate_latest(registry).decode()


def _label(adapter: str) -> str:
    with _lock:
        if adapter in _labels or len(_labels) < MAX_LABELS:
            _labels.add(adapter)
            return adapter
    return "other"
