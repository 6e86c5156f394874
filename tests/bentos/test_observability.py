"""Metrics, request ids, the access log and the request log of a running service."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deploy import server
from deploy.bento import bentoml_environment
from tests.bentos.client import admin, end_canary, metric, pids, predict, served, server_pid, start_canary
from tests.helpers import wait_until

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_unknown_paths_share_one_series(url):
    requests.get(f"{url}/first", timeout=10)
    before = len(requests.get(f"{url}/metrics", timeout=10).text.splitlines())
    for i in range(50):
        assert requests.get(f"{url}/nothing/{i}", timeout=10).status_code == 404
    assert len(requests.get(f"{url}/metrics", timeout=10).text.splitlines()) == before


def test_paths_with_parameters_are_counted_by_their_template(url):
    start = 'bentoml_service_request_total{endpoint="/v1/models/{model}",http_response_code="404"'
    before = metric(url, start)
    for i in range(3):
        assert requests.get(f"{url}/v1/models/missing-{i}", timeout=10).status_code == 404
    assert metric(url, start) == before + 3


def test_metrics_count_tokens_and_latencies(url):
    names = (
        "gpt2_prompt_tokens_total",
        "gpt2_completion_tokens_total",
        "gpt2_time_to_first_token_seconds_count",
        "gpt2_inter_token_seconds_count",
    )
    before = [metric(url, name) for name in names]
    usage = predict(url, instruction="Hi.", max_new_tokens=5).json()["usage"]
    after = [metric(url, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        usage["prompt_tokens"],
        usage["completion_tokens"],
        1,
        usage["completion_tokens"] - 1,
    ]


def test_the_dashboard_queries_existing_metrics_and_labels(url):
    admin(url, "load", lora_name="next", lora_path="good")
    start_canary(url, adapter="next", share=1, shadow=True)
    predict(url, instruction="Hello.", max_new_tokens=3)
    wait_until(lambda: metric(url, "gpt2_shadow_seconds_count") > 0, 60, "an answer of the canary")
    end_canary(url)
    admin(url, "unload", lora_name="next")
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    labels = {}  # of each metric
    for line in lines:
        if not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels.setdefault(name.split(" ")[0], set()).update(re.findall(r'(\w+)="', rest))
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 10
    for query in queries:
        grouped = {label.strip() for names in re.findall(r"by \(([^)]*)\)", query) for label in names.split(",")}
        selectors = re.findall(r"\b((?:gpt2|bentoml)_\w+)(?:\{([^}]*)\})?", query)
        assert selectors, query
        for name, matchers in selectors:
            assert name in labels, query
            assert grouped | set(re.findall(r"(\w+)!?=", matchers)) <= labels[name], query


def test_spans_reach_a_collector_with_the_documented_settings(bento_tag, tmp_path, monkeypatch):
    [settings] = re.findall(r"### Tracing.*?```yaml\n(.*?)```", (DOCS / "serving.md").read_text(), flags=re.DOTALL)
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever).start()
        (tmp_path / "tracing.yaml").write_text(settings.replace("localhost:4318", f"127.0.0.1:{collector.server_port}"))
        environment = bentoml_environment() | {"BENTOML_CONFIG": str(tmp_path / "tracing.yaml")}  # which tests lack
        monkeypatch.setattr(server, "bentoml_environment", lambda: environment | {"OTEL_SDK_DISABLED": "false"})
        with served(bento_tag) as url:
            requests.get(f"{url}/metadata", headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}, timeout=10)
            wait_until(lambda: any(b"/metadata" in each.SerializeToString() for each in received), 60, "a span")
        collector.shutdown()
    spans = [span for each in received for part in each.resource_spans for s in part.scope_spans for span in s.spans]
    assert ("GET /metadata", "a" * 32) in [(span.name, span.trace_id.hex()) for span in spans]


def test_a_request_keeps_a_valid_id_of_the_client(url):
    response = requests.get(f"{url}/metadata", headers={"X-Request-Id": "mine-1"}, timeout=10)
    assert response.headers["X-Request-Id"] == "mine-1"
    response = requests.get(f"{url}/metadata", headers={"X-Request-Id": "a b\t<"}, timeout=10)
    assert len(response.headers["X-Request-Id"]) == 32


def test_the_request_log_has_a_line_per_completion_without_text(url, request_log):
    body = {"instruction": "Whisper a secret.", "max_new_tokens": 4}
    requests.post(f"{url}/predict", json=body, headers={"X-Request-Id": "logged-1"}, timeout=60)
    wait_until(lambda: "logged-1" in request_log.read_text(), 20, "a line in the request log")
    text = request_log.read_text()
    (line,) = [json.loads(line) for line in text.splitlines() if "logged-1" in line]
    assert (line["completion_tokens"], line["finish_reason"], line["model"]) == (4, "length", "gpt2-instruct")
    assert len(line["prompt_sha256"]) == len(line["answer_sha256"]) == 64
    assert "secret" not in text


@pytest.mark.slow
def test_64_clients_get_their_responses_and_memory_stays_flat(bento_tag):
    """Half of them stream; some disconnect in the middle, which must leave nothing behind."""
    wrong: list[str] = []

    def client(number: int) -> int:
        responses = 0
        while time.monotonic() < end:
            body = {"instruction": f"Say {responses % 7}.", "max_new_tokens": 8 * (1 + number % 8), "temperature": 1.0}
            body["stream"] = bool(number % 2)
            with requests.post(f"{url}/predict", json=body, stream=True, timeout=60) as response:
                if number % 16 == 1:
                    next(response.iter_content(16))  # and disconnect
                elif response.status_code != 200 or not response.text.rstrip().endswith(("}", "data: [DONE]")):
                    wrong.append(f"{response.status_code} {response.text[-300:]}")
            responses += 1
        return responses

    with served(bento_tag) as url, ThreadPoolExecutor(64) as pool:
        (worker,) = pids("-P", str(server_pid(url)))
        memory = []
        for seconds in (10, 10, 10):
            end = time.monotonic() + seconds
            assert sum(pool.map(client, range(64))) > 64
            memory.append(int(Path(f"/proc/{worker}/statm").read_text().split()[1]))  # resident pages
        wait_until(
            lambda: metric(url, "gpt2_running_requests") == metric(url, "gpt2_queue_depth") == 0, 20, "an idle engine"
        )
    assert wrong == []
    assert memory[2] < 1.1 * memory[1], memory  # a leak of 1 KB per request adds more than this
