"""Answers of a model to test records, and their scores."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tiktoken

from gpt2core.config import GenerationConfig
from gpt2core.data import Record, encode_records
from gpt2core.generate import generate
from gpt2core.metrics import RecordScores, Scores, aggregate, mean, score_record
from gpt2core.model import GPT2
from gpt2core.prompt import parse_reply
from gpt2core.train import token_losses
from gpt2core.types import Evaluation, FamilyScores, Sample, TrainSummary


@dataclass(frozen=True)
class Answers:
    """One model's answers, in the order of the records, and their scores."""

    texts: list[str]  # clean answers
    finished: list[bool]  # ended by end of text, not by max_new_tokens or a full context
    record_scores: list[RecordScores]
    scores: Scores
    device: str  # type of the device that generated them


def evaluate(
    model: GPT2,
    tokenizer: tiktoken.Encoding,
    records: Sequence[Record],
    max_new_tokens: int,
    batch_size: int,
    rouge_l: Callable[[str, str], float],
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Greedy answers to the records' instructions, and the likelihood of their outputs.

    Args:
        rouge_l: as `gpt2core.metrics.score_record` takes it.
        progress: called with the number of records done, after each batch.

    Raises:
        ValueError: there are no records, or one has more tokens than the model's context.
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
    texts = [answer_text(completion, tokenizer) for completion in completions]
    finished = [completion[-1] == tokenizer.eot_token for completion in completions]
    record_scores = [
        score_record(record["output"], text, loss, rouge_l)
        for record, text, loss in zip(records, texts, losses, strict=True)
    ]
    scores = aggregate(record_scores, losses, finished)
    return Answers(texts, finished, record_scores, scores, model.wte.weight.device.type)


def answer_text(completion: Sequence[int], tokenizer: tiktoken.Encoding) -> str:
    """The clean answer in a completion's tokens: cut at the end-of-text token, not at its spelling."""
    tokens = list(completion)
    if tokenizer.eot_token in tokens:
        tokens = tokens[: tokens.index(tokenizer.eot_token)]
    return parse_reply(tokenizer.decode(tokens))


def compare_answers(
    records: Sequence[Record], base: Answers, tuned: Answers, train: TrainSummary
) -> tuple[list[Sample], Evaluation]:
    """Both models' answers and scores, one sample per record, and the evaluation of all of them."""
    samples = [
        Sample(
            instruction=record["instruction"],
            input=record["input"],
            output=record["output"],
            base=base.texts[i],
            tuned=tuned.texts[i],
            finished=tuned.finished[i],
            family=record.get("family", ""),
            base_scores=base.record_scores[i],
            tuned_scores=tuned.record_scores[i],
        )
        for i, record in enumerate(records)
    ]
    return samples, Evaluation(base.scores, tuned.scores, _by_family(samples), train, tuned.device)


def _by_family(samples: Sequence[Sample]) -> dict[str, FamilyScores]:
    """By family name, sorted; samples without a family are left out."""
    families: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.family:
            families[sample.family].append(sample)
    return {
        family: FamilyScores(
            len(members),
            mean([sample.base_scores.exact_match for sample in members]),
            mean([sample.tuned_scores.exact_match for sample in members]),
        )
        for family, members in sorted(families.items())
    }
