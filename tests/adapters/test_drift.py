"""The signals of drift, each alone."""

from collections import Counter
from dataclasses import replace

import pytest

from gpt2core.prompt import format_prompt
from gpt2core.types import LoggedCompletion
from steps.adapters.drift import Drift, measure, write_drift
from steps.config import MonitorConfig
from tests.helpers import make_sample

CONFIG = MonitorConfig()
TRAIN = [{"instruction": f"Name the colour of item {i}.", "input": "box", "output": "red"} for i in range(40)]
SAMPLES = [make_sample(f"Name the colour of item {i}.", "crate", "red", tuned="red") for i in range(40, 60)]


def completion(question: str = "Name the colour of item 41.", input: str = "crate", **changes) -> LoggedCompletion:
    prompt = format_prompt(question, input)
    plain = LoggedCompletion(
        time="2026-01-01T00:00:00+00:00",
        milliseconds=100.0,
        temperature=0.0,
        request_id="r",
        model="gpt2-instruct",
        adapter_sha256="a",
        finish_reason="stop",
        prompt_tokens=1,
        completion_tokens=1,
        first_token_milliseconds=1.0,
        prompt_characters=len(prompt),
        answer_characters=3,
        prompt=prompt,
    )
    return replace(plain, **changes)


def signals(completions, ratings=()):
    found, page = measure(completions, Counter(ratings), TRAIN, SAMPLES, CONFIG)
    return {signal.name: signal for signal in found}, page


@pytest.mark.parametrize(
    ("completions", "ratings", "expected"),
    [
        ([completion()] * 20, {}, set()),
        ([completion(input="box")] * 20, {}, set()),  # asked in training: more familiar is no drift
        ([completion(answer_characters=4)] * 20, {}, set()),  # the lengths of the reference do not vary
        ([completion(answer_characters=9)] * 20, {}, {"answer length"}),
        ([completion(finish_reason="length")] * 4 + [completion()] * 16, {}, {"unfinished answers"}),
        ([completion(milliseconds=11_000.0)] * 2 + [completion()] * 18, {}, {"latency"}),
        ([completion()] * 20, {"bad": 4, "good": 6}, {"ratings"}),
        ([completion()] * 20, {"bad": 4}, set()),
        (
            [completion("Solve the equation quickly, please, my good friend of old, x plus y.", "")] * 20,
            {},
            {"prompt length", "unknown words", "similarity"},
        ),
    ],
)
def test_each_signal_has_its_own_cause(completions, ratings, expected):
    found, _ = signals(completions, ratings)
    assert {name for name, signal in found.items() if signal.drifted} == expected


def test_without_texts_the_words_are_not_compared_and_the_report_says_so():
    found, page = signals([replace(completion(), prompt=None)] * 20)
    assert found["similarity"].change is None
    assert "GPT2_REQUEST_LOG_TEXT" in found["unknown words"].note
    assert not any(signal.drifted for signal in found.values())
    drift = Drift(False, "No drift.", "<run>", "a" * 64, 20, "", "", [*found.values()], {"stop": 20}, {}, 0, 0)
    html = write_drift(drift, page)
    assert "&lt;run&gt;" in html
    assert len(html) < 10_000_000
    assert Drift.from_json(drift.to_json()) == drift
