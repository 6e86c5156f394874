"""Prometheus metrics in addition to BentoML's own: tokens and latencies by adapter, and the engine's state."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from threading import Lock
from time import time
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import GaugeMetricFamily

from bentos.canary import Comparison
from bentos.completion import CompletionResult
from bentos.limits import MAX_ADAPTERS, MAX_BATCH
from bentos.schemas import TUNED

if TYPE_CHECKING:
    from gpt2core.engine import Engine

Gauge = tuple[str, float] | tuple[str, float, dict[str, str]]  # help, value, labels
MAX_LABELS = 32  # adapter names with their own time series; later names share the label "other"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms over completions. Thread-safe."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["adapter"], buckets=SECONDS, registry=registry)

        self._requests = counter("gpt2_requests", "Completions that ended", "adapter", "finish_reason")
        self._prompt_tokens = counter("gpt2_prompt_tokens", "Tokens of prompts", "adapter")
        self._completion_tokens = counter("gpt2_completion_tokens", "Generated tokens", "adapter")
        self._time_to_first_token = histogram(
            "gpt2_time_to_first_token_seconds", "Time to first token, queueing included"
        )
        self._inter_token = histogram("gpt2_inter_token_seconds", "Time between two tokens of a completion")
        self.refused = counter("gpt2_refused_requests", "Requests refused because the queue was full")
        self._shadows = counter("gpt2_shadow_requests", "Answers of a canary in shadow mode", "adapter", "outcome")
        self._shadow_seconds = histogram("gpt2_shadow_seconds", "Duration of these answers")
        self._shadow_f1 = Summary(
            "gpt2_shadow_token_f1", "Words in common with the client's answer", ["adapter"], registry=registry
        )
        self.dropped_shadows = counter("gpt2_shadow_dropped", "Requests that a canary in shadow mode did not answer")
        self._labels: set[str] = set()
        self._lock = Lock()

    def observe(self, result: CompletionResult) -> None:
        """Count a completion that ended."""
        label = self._label(result.request.model)
        self._requests.labels(label, result.finish_reason).inc()
        self._prompt_tokens.labels(label).inc(len(result.request.prompt))
        self._completion_tokens.labels(label).inc(len(result.token_times))
        if result.time_to_first_token is not None:
            self._time_to_first_token.labels(label).observe(result.time_to_first_token)
        gaps = self._inter_token.labels(label)
        for before, after in pairwise(result.token_times):
            gaps.observe(after - before)

    def observe_shadow(self, comparison: Comparison) -> None:
        """Count an answer of a canary in shadow mode, separately from the completions of clients."""
        shadow = comparison.shadow
        label = self._label(shadow.request.model)
        outcome = "failed" if shadow.failed else "agreed" if comparison.agreed else "differed"
        for each in ("agreed", "differed", "failed"):  # also creates the series with value 0, so shares can be computed
            self._shadows.labels(label, each).inc(each == outcome)
        if not shadow.failed:
            self._shadow_seconds.labels(label).observe(shadow.ended_at - shadow.submitted_at)
            self._shadow_f1.labels(label).observe(comparison.token_f1)

    def _label(self, adapter: str) -> str:
        with self._lock:
            if adapter in self._labels or len(self._labels) < MAX_LABELS:
                self._labels.add(adapter)
                return adapter
        return "other"


def engine_gauges(engine: "Engine") -> str:
    """Return the engine's state as gauges, in the Prometheus text format."""
    stats = engine.stats()
    running, waiting = engine.adapters_in_use()
    model = {"model_name": TUNED}
    # share of the full context of all slots in the batch; caches grow on demand and have no limit of their own
    kv_usage = stats["cached_tokens"] / (MAX_BATCH * engine.config.n_positions)
    adapters = {
        "max_lora": str(MAX_ADAPTERS + 1),
        "running_lora_adapters": ",".join(running),
        "waiting_lora_adapters": ",".join(waiting),
    }
    gauges: dict[str, Gauge] = {
        "gpt2_queue_depth": ("Requests waiting for a slot in the batch", stats["waiting"]),
        "gpt2_running_requests": ("Requests in the running batch, in prefill or decode", stats["running"]),
        "gpt2_cached_tokens": ("Tokens of running requests in the KV cache", stats["cached_tokens"]),
        "gpt2_cached_prefix_tokens": ("Tokens in the prefix cache", stats["cached_prefix_tokens"]),
        "gpt2_adapters": ("Loaded adapters", len(engine.adapters)),
        "gpt2_weights_info": ("Format of the weights; the value is 1", 1, {"format": engine.weights}),
        # vLLM's names, which dashboards and the Gateway API inference extension (proposal 003) read
        "vllm:num_requests_running": ("Requests in the running batch", stats["running"], model),
        "vllm:num_requests_waiting": ("Requests waiting for a slot in the batch", stats["waiting"], model),
        "vllm:kv_cache_usage_perc": ("Used share of the KV cache, 1 is full", kv_usage, model),
        "vllm:gpu_cache_usage_perc": ("The same, by its older name", kv_usage, model),
        "vllm:lora_requests_info": ("Adapters of requests; the value is the time", time(), adapters),
    }
    if (increase := engine.perplexity_increase) is not None:
        text = "Relative increase of perplexity by the weights' format, measured at start by GPT2_WEIGHTS=auto"
        gauges["gpt2_weights_perplexity_increase"] = (text, increase)
    return render_gauges(gauges)


def render_gauges(gauges: Mapping[str, Gauge]) -> str:
    """Render `{name: (help, value, labels)}` in the Prometheus text format.

    prometheus_client's `Gauge` is not used: in multiprocess mode, which BentoML uses, it would keep reporting the
    values of terminated workers.
    """

    class Now:
        def collect(self) -> Iterator[GaugeMetricFamily]:
            for name, (text, value, *labels) in gauges.items():
                names = labels[0] if labels else {}
                family = GaugeMetricFamily(name, text, labels=list(names))
                family.add_metric(list(names.values()), value)
                yield family

    registry = CollectorRegistry()
    registry.register(Now())
    return generate_latest(registry).decode()
