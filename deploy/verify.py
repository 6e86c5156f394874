"""The one definition of "the service answers as the model did when it was evaluated".

Used by `package` (a Bento served by a child process), and by every deploy target.
"""

from collections.abc import Callable, Sequence

from gpt2core.types import Sample

# Required share of equal answers where the service computes with other weights or on another device than `evaluate`
# did: int8, bf16 or a GPU may decide a near tie differently. Another model or adapter agrees on hardly any.
MIN_AGREEMENT = 0.5


class VerificationError(RuntimeError):
    """A service whose answers differ from those of the evaluated model."""


def verify_answers(
    name: str, generate: Callable[[str, str], str], samples: Sequence[Sample], exact: bool = False
) -> list[str]:
    """Request each sample's answer and compare it with `tuned`; return the answers.

    Args:
        name: of the service, for the error.
        generate: (instruction, input) -> greedy answer of the service.
        exact: the service has the weights format and the device type of `evaluate`, so every answer must be equal.

    Raises:
        VerificationError: naming the first difference, the share of equal answers and the required share.
    """
    answers = [generate(sample.instruction, sample.input) for sample in samples]
    pairs = zip(samples, answers, strict=True)
    different = [(sample, answer) for sample, answer in pairs if answer != sample.tuned]
    required = 1.0 if exact else MIN_AGREEMENT
    if len(different) > (1 - required) * len(samples):
        sample, answer = different[0]
        raise VerificationError(
            f"{name} answers {answer!r} to {sample.instruction!r} with input {sample.input!r}, but the evaluated model "
            f"answered {sample.tuned!r}; {len(samples) - len(different)} of {len(samples)} answers are equal, required "
            f"are {required:.0%}"
        )
    return answers
