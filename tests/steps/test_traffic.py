"""Reading the service's request log."""

import json

import pytest

from steps.traffic import read_traffic

COMPLETION = {
    "time": "2026-01-01T00:00:00+00:00",
    "milliseconds": 1.0,
    "temperature": 0.0,
    "request_id": "a",
    "model": "gpt2-instruct",
    "adapter_sha256": None,
    "finish_reason": "stop",
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "first_token_milliseconds": None,
    "prompt_characters": 1,
    "answer_characters": 1,
}
FEEDBACK = {"time": "2026-01-01T00:00:00+00:00", "request_id": "a", "rating": "bad"}


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        (COMPLETION, '"lost_before": 1e999'),
        (COMPLETION, '"prompt_characters": ' + "9" * 400),
        (COMPLETION, '"prompt_characters": ' + "9" * 300),
        (COMPLETION, '"milliseconds": ' + "9" * 400),
        (COMPLETION, '"milliseconds": 1e999'),
        (COMPLETION, '"milliseconds": NaN'),
        (COMPLETION, r'"finish_reason": "\ud800"'),
        (FEEDBACK, r'"correction": "\ud800"'),
    ],
)
def test_a_damaged_line_is_skipped_and_named_by_file_and_line(tmp_path, line, changed):
    log = tmp_path / "requests.jsonl"
    plain, damaged = json.dumps(COMPLETION | {"lost_before": 2}), f"{json.dumps(line)[:-1]}, {changed}}}"
    log.write_text(f"{plain}\n{damaged}\n{plain}\n")
    traffic = read_traffic(log)
    [problem] = traffic.problems
    assert problem.startswith(f"{log}:2: ")
    assert len(problem) < len(str(log)) + 200
    assert (len(traffic.completions), traffic.feedback, traffic.lost) == (2, [], 4)
