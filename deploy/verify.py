"""Compares a service's answers with those of the evaluated model. This is the only definition of equal answers.

`package` (a Bento served by a child process) and every deploy target use it.
"""

import os
from collections.abc import Callable, Sequence

import requests

from deploy.target import DeployError
from gpt2core.types import Sample

# Required share of equal answers if the service has another weight format or device than `evaluate` had: with int8,
# bf16 or a GPU, another token can win a near tie. Another model or adapter gives almost no equal answers.
MIN_AGREEMENT = 0.5
RESPONSE_TIMEOUT = 120  # seconds for one answer


class VerificationError(DeployError):
    """A service does not answer, or its answers differ from those of the evaluated model."""


def verify_answers(
    name: str, generate: Callable[[str, str], str], samples: Sequence[Sample], exact: bool = False
) -> list[str]:
    """Request each sample's answer and compare it with `tuned`; return the answers.

    Args:
        name: name of the service, for the error.
        generate: (instruction, input) -> greedy answer of the service.
        exact: the service has the weight format and device type of `evaluate`, so all answers must be equal.

    Raises:
        VerificationError: too few answers are equal.
    """
    answers = [generate(sample.instruction, sample.input) for sample in samples]
    pairs = zip(samples, answers, strict=True)
    different = [(sample, answer) for sample, answer in pairs if answer != sample.tuned.text]
    required = 1.0 if exact else MIN_AGREEMENT
    if len(different) > (1 - required) * len(samples):
        sample, answer = different[0]
        raise VerificationError(
            f"{len(samples) - len(different)} of {len(samples)} answers of {name} equal those of the evaluated model, "
            f"but {required:.0%} must; the first difference, for instruction {sample.instruction!r} and input "
            f"{sample.input!r}: expected {sample.tuned.text!r}, got {answer!r}"
        )
    return answers


def request_answer(url: str, instruction: str, input: str, max_new_tokens: int) -> str:
    """Request a greedy answer from a running service.

    Raises:
        VerificationError: the service responds with an error, or not at all.
    """
    body = {"instruction": instruction, "input": input, "max_new_tokens": max_new_tokens}
    try:
        with direct_session() as session:
            response = session.post(f"{url}/predict", json=body, headers=api_key_header(), timeout=RESPONSE_TIMEOUT)
        response.raise_for_status()
        return str(response.json()["answer"])
    except requests.HTTPError as error:
        status, text = error.response.status_code, error.response.text
        raise VerificationError(f"{url}/predict failed with status {status}: {text}") from None
    except (requests.RequestException, ValueError, KeyError) as error:
        raise VerificationError(f"{url}/predict gave no answer: {error}") from None


def is_ready(url: str) -> bool:
    """Whether a service on this machine responds to /readyz with a status below 400."""
    try:
        with direct_session() as session:
            return session.get(f"{url}/readyz", timeout=5).ok
    except requests.RequestException:
        return False


def direct_session() -> requests.Session:
    """Return a session that ignores HTTP_PROXY, because such a proxy cannot reach servers on this machine."""
    session = requests.Session()
    session.trust_env = False
    return session


def api_key_header() -> dict[str, str]:
    """Return the authentication header with the first token in $GPT2_API_TOKEN.

    The API server's proxy would remove Authorization.
    """
    token = first_token("GPT2_API_TOKEN")
    return {"X-Api-Key": token} if token else {}


def first_token(variable: str) -> str:
    """Return the first of the tokens in an environment variable, which commas separate; "" if there is none."""
    return os.environ.get(variable, "").split(",")[0].strip()
