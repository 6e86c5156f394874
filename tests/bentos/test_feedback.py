"""Feedback on answers, in the request log of a running service."""

import json
from types import SimpleNamespace

import pytest
import requests
from starlette.applications import Starlette
from starlette.testclient import TestClient

from bentos.app import app
from bentos.dependencies import Served
from commands.records import collect
from gpt2core.data import read_records
from tests.bentos.client import error_of, predict, served
from tests.helpers import make_lineage, wait_until


def send(url: str, token: str = "", **body) -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.post(f"{url}/feedback", data=json.dumps(body), headers=headers, timeout=20)


def feedback_lines(file) -> list[dict]:
    lines = [json.loads(line) for line in file.read_bytes().split(b"\n") if line] if file.exists() else []
    return [line for line in lines if "rating" in line]


def test_a_rating_is_logged_and_texts_are_refused_where_the_log_keeps_none(url, request_log):
    request_id = predict(url, instruction="Hi.").headers["X-Request-Id"]
    assert send(url, request_id=request_id, rating="good").json() == {"request_id": request_id, "rating": "good"}
    wait_until(lambda: feedback_lines(request_log), 20, "a line in the request log")
    for field in ("correction", "comment"):
        refused = send(url, request_id=request_id, rating="bad", **{field: "a secret"})
        assert refused.status_code == 403
        assert error_of(refused)["param"] == field
        assert "GPT2_REQUEST_LOG_TEXT" in error_of(refused)["message"]
    (line,) = feedback_lines(request_log)
    assert (line["request_id"], line["rating"]) == (request_id, "good")
    assert "secret" not in request_log.read_text()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": "good"}, "request_id"),
        ({"request_id": "a", "rating": "fine"}, "rating"),
        ({"request_id": "a\nb", "rating": "good"}, "request_id"),
        ({"request_id": "a" * 81, "rating": "good"}, "request_id"),
        ({"request_id": "a", "rating": "bad", "correction": " "}, "correction"),
        ({"request_id": "a", "rating": "bad", "correction": "x" * 20_001}, "correction"),
        ({"request_id": "a", "rating": "bad", "comment": "x" * 2_001}, "comment"),
        ({"request_id": "a", "rating": "bad", "stars": 5}, "stars"),
    ],
)
def test_the_wrong_field_is_named(url, body, param):
    response = send(url, **body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_a_correction_needs_the_token_and_becomes_a_record(bento_tag, tmp_path):
    log, out = tmp_path / "requests.jsonl", tmp_path / "new.jsonl"
    headers = {"X-Api-Key": "s3cret"}
    with served(bento_tag, GPT2_REQUEST_LOG=log, GPT2_REQUEST_LOG_TEXT="keep", GPT2_API_TOKEN="s3cret") as url:
        body = {"instruction": "Name the colour.", "input": "snow\n", "max_new_tokens": 2}
        answer = requests.post(f"{url}/predict", json=body, headers=headers, timeout=60)
        request_id = answer.headers["X-Request-Id"]
        sent = {"request_id": request_id, "rating": "bad", "correction": "É\u2028white", "comment": "no accent"}
        assert send(url, **sent).status_code == 401
        assert send(url, "s3cret", **sent).status_code == 200
        assert send(url, "s3cret", request_id="of-another-replica", rating="bad", correction=None).status_code == 200
        document = requests.get(f"{url}/docs.json", headers=headers, timeout=20).json()
        wait_until(lambda: len(feedback_lines(log)) == 2, 20, "two lines in the request log")
    operation = document["paths"]["/feedback"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["rating"]["enum"] == ["good", "bad"]
    assert "403" in operation["responses"]
    assert sent.items() <= feedback_lines(log)[0].items()
    collect(log, out)
    assert read_records(out) == [{"instruction": "Name the colour.", "input": "snow\n", "output": "É\u2028white"}]


def test_without_a_request_log_feedback_is_refused():
    outer = Starlette()
    outer.mount("/", app)
    app.state.served = Served(SimpleNamespace(), make_lineage(), 0, "last")
    response = TestClient(outer).post("/feedback", json={"request_id": "a", "rating": "good"})
    assert response.status_code == 403
    assert "GPT2_REQUEST_LOG" in error_of(response)["message"]
