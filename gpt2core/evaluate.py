"""Evaluation: a model's answers to test records, and their scores."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tiktoken
import torch
import torch.nn.functional as F

from gpt2core.config import GenerationConfig
from gpt2core.data import Example, Record, encode_records
from gpt2core.generate import generate
from gpt2core.losses import token_losses
from gpt2core.metrics import Scores, aggregate, exact_match, mean, score_record
from gpt2core.model import GPT2
from gpt2core.prompt import parse_reply
from gpt2core.types import Answer, Evaluation, FamilyScores, Sample, TrainSummary


@dataclass(frozen=True)
class Answers:
    """One model's answers, in the order of the records, and their scores."""

    answers: list[Answer]
    scores: Scores
    device: str  # type of the device that generated the answers


def evaluate(
    model: GPT2,
    tokenizer: tiktoken.Encoding,
    records: Sequence[Record],
    max_new_tokens: int,
    batch_size: int,
    rouge_l: Callable[[str, str], float],
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Generate greedy answers to the records' instructions, and score them and the likelihood of the outputs.

    Args:
        rouge_l: see `gpt2core.metrics.score_record`.
        progress: called with the number of records done, after each batch.

    Raises:
        ValueError: there are no records, or a record has more tokens than the model's context.
    """
    if not records:
        raise ValueError("there are no records to evaluate on")
    examples = encode_records(records, tokenizer, model.config.n_positions)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_id=tokenizer.eot_token)
    completions: list[list[int]] = []
    for start in range(0, len(examples), batch_size):
        prompts = [example.input_ids[: example.prompt_length] for example in examples[start : start + batch_size]]
        completions += generate(model, prompts, config)
        progress(len(completions))
    losses = token_losses(model, examples, batch_size, "response")
    completed = [
        Example([*example.input_ids[: example.prompt_length], *completion], example.prompt_length)
        for example, completion in zip(examples, completions, strict=True)
    ]
    answers = []
    for record, completion, loss, (completion_loss, n_tokens) in zip(
        records, completions, losses, token_losses(model, completed, batch_size, "response"), strict=True
    ):
        text = answer_text(completion, tokenizer)
        answers.append(
            Answer(
                text=text,
                finished=completion[-1] == tokenizer.eot_token,
                scores=score_record(record["output"], text, loss, rouge_l),
                reference_tokens=loss[1],
                confidence=math.exp(-completion_loss / n_tokens),
            )
        )
    scores = aggregate([answer.scores for answer in answers], losses, [answer.finished for answer in answers])
    return Answers(answers, scores, model.wte.weight.device.type)


def answer_text(completion: Sequence[int], tokenizer: tiktoken.Encoding) -> str:
    """Decode a completion to the clean answer. The end-of-text token ends the completion.

    The literal text "<|endoftext|>" also ends the answer, since `parse_reply` cuts it there.
    """
    tokens = list(completion)
    if tokenizer.eot_token in tokens:
        tokens = tokens[: tokens.index(tokenizer.eot_token)]
    return parse_reply(tokenizer.decode(tokens))


def sample_answers(
    model: GPT2,
    tokenizer: tiktoken.Encoding,
    records: Sequence[Record],
    config: GenerationConfig,
    n_samples: int,
    seed: int,
) -> tuple[float, float]:
    """Sample `n_samples` answers per record; return exact match and the mean number of distinct answers per record."""
    examples = encode_records(records, tokenizer, model.config.n_positions)
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    correct, answers = 0.0, [set[str]() for _ in records]
    for sample in range(n_samples):
        sampling_config = replace(config, eos_id=tokenizer.eot_token, seed=1000 * seed + sample)
        for i, completion in enumerate(generate(model, prompts, sampling_config)):
            answer = answer_text(completion, tokenizer)
            correct += exact_match(records[i]["output"], answer)
            answers[i].add(answer)
    return correct / len(records) / n_samples, sum(map(len, answers)) / len(records)


@torch.inference_mode()
def text_loss(model: GPT2, tokens: torch.Tensor) -> float:
    """Compute the mean loss, in nats per token, of a text (N,), cut into windows of the context length.

    The last window is left out if it is not complete.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    T = min(model.config.n_positions, len(tokens) - 1)
    if T < 1:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, but a loss needs two; hold out more of the text")
    n = (len(tokens) - 1) // T
    rows = zip(tokens[: n * T].view(n, T).split(8), tokens[1 : n * T + 1].view(n, T).split(8), strict=True)
    device = model.wte.weight.device
    sums = [
        F.cross_entropy(model(ids.to(device)).flatten(0, 1).float(), labels.to(device).flatten(), reduction="sum")
        for ids, labels in rows
    ]
    return float(sum(map(float, sums))) / (n * T)


def complete(model: GPT2, tokenizer: tiktoken.Encoding, prompts: Sequence[str]) -> list[str]:
    """Return each prompt with its greedy continuation."""
    ids = [tokenizer.encode_ordinary(prompt) for prompt in prompts]
    continuations = generate(model, ids, GenerationConfig())
    return [prompt + tokenizer.decode(tokens) for prompt, tokens in zip(prompts, continuations, strict=True)]


def compare_answers(
    records: Sequence[Record], base: Answers, tuned: Answers, train: TrainSummary
) -> tuple[list[Sample], Evaluation]:
    """Combine both models' answers: return one sample per record, and the evaluation of all samples."""
    samples = [
        Sample(
            instruction=record["instruction"],
            input=record["input"],
            output=record["output"],
            base=before,
            tuned=after,
            family=record.get("family", ""),
            group=record.get("group", ""),
        )
        for record, before, after in zip(records, base.answers, tuned.answers, strict=True)
    ]
    return samples, Evaluation(base.scores, tuned.scores, _by_family(samples), train, tuned.device)


def _by_family(samples: Sequence[Sample]) -> dict[str, FamilyScores]:
    """Return the scores of each family, sorted by its name. Samples without a family are left out."""
    families: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.family:
            families[sample.family].append(sample)
    return {
        family: FamilyScores(
            len(members),
            mean([sample.base.scores.exact_match for sample in members]),
            mean([sample.tuned.scores.exact_match for sample in members]),
        )
        for family, members in sorted(families.items())
    }
