"""Comparison of a service's answers with those of the evaluated model."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from deploy.target import DeployError
from deploy.verify import VerificationError, api_key_header, is_ready, request_answer, verify_answers
from tests.helpers import free_port, make_sample

SAMPLES = [make_sample(text, tuned=text) for text in "abcd"]


def repeat_first(count: int):
    """A service that answers correctly to the first `count` samples."""
    return lambda instruction, input: instruction if "abcd".index(instruction) < count else "other"


@pytest.mark.parametrize(("exact", "equal"), [(True, 4), (False, 2)])
def test_enough_equal_answers_are_returned(exact, equal):
    expected = ["a", "b", "c", "d"][:equal] + ["other"] * (4 - equal)
    assert verify_answers("service", repeat_first(equal), SAMPLES, exact) == expected


@pytest.mark.parametrize(("exact", "equal", "required"), [(True, 3, "100%"), (False, 1, "50%")])
def test_too_few_equal_answers_are_an_error_with_the_shares(exact, equal, required):
    message = (
        f"{equal} of 4 answers of service equal .* but {required} must; .*'{'abcd'[equal]}' and .*: expected .* 'other'"
    )
    with pytest.raises(VerificationError, match=message):
        verify_answers("service", repeat_first(equal), SAMPLES, exact)


def test_the_input_of_a_sample_is_sent():
    sample = make_sample("a", "with input", tuned="a with input")
    assert verify_answers("service", lambda instruction, input: f"{instruction} {input}", [sample], exact=True)


def test_a_service_that_does_not_respond_is_a_deploy_error():
    with pytest.raises(DeployError, match="gave no answer"):
        request_answer(f"http://127.0.0.1:{free_port()}", "Hello.", "", 1)


def test_a_service_of_this_machine_is_reached_without_the_environments_proxy(monkeypatch):
    class Service(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"answer": "a"}')

        do_POST = do_GET

    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert is_ready(url)
        assert request_answer(url, "Hello.", "", 1) == "a"
        server.shutdown()


def test_the_token_of_the_environment_is_sent_as_a_header(monkeypatch):
    monkeypatch.setenv("GPT2_API_TOKEN", "s3cret\n")  # as in a file
    assert api_key_header() == {"X-Api-Key": "s3cret"}
    monkeypatch.delenv("GPT2_API_TOKEN")
    assert api_key_header() == {}
