"""A model's answers to records, scored: what the test split says of it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tiktoken

from gpt2core.config import GenerationConfig
from gpt2core.data import Record, encode_records
from gpt2core.generate import generate
from gpt2core.metrics import RecordScores, Scores, exact_match, mean, perplexity, token_f1
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
        rouge_l: scores (reference, answer); a library's, so not this package's to import.
        progress: told the number of records answered, after each batch.

    Raises:
        ValueError: a record has more tokens than the model's context, or there are none.
    """
    if not records:
        raise ValueError("there are no records to evaluate on")
    examples = encode_records(records, tokenizer, model.config.n_positions)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_id=tokenizer.eot_token)
    replies: list[list[int]] = []
    for start in range(0, len(examples), batch_size):
        prompts = [example.input_ids[: example.prompt_length] for example in examples[start : start + batch_size]]
        replies += generate(model, prompts, config)
        progress(len(replies))
    losses = token_losses(model, examples, batch_size, "response")
    texts = [answer_text(reply, tokenizer) for reply in replies]
    finished = [reply[-1] == tokenizer.eot_token for reply in replies]
    record_scores = [
        RecordScores(
            exact_match(record["output"], text),
            token_f1(record["output"], text),
            rouge_l(record["output"], text),
            loss / count,
        )
        for record, text, (loss, count) in zip(records, texts, losses, strict=True)
    ]
    scores = Scores(
        exact_match=mean([score.exact_match for score in record_scores]),
        token_f1=mean([score.token_f1 for score in record_scores]),
        rouge_l=mean([score.rouge_l for score in record_scores]),
        perplexity=perplexity(losses),
        finished=mean([float(value) for value in finished]),
    )
    return Answers(texts, finished, record_scores, scores)


def answer_text(reply: Sequence[int], tokenizer: tiktoken.Encoding) -> str:
    """The clean answer in a reply's tokens: cut at end of text by token, not by looking for its characters."""
    tokens = list(reply)
    if tokenizer.eot_token in tokens:
        tokens = tokens[: tokens.index(tokenizer.eot_token)]
    return parse_reply(tokenizer.decode(tokens))


def compare_answers(
    records: Sequence[Record], base: Answers, tuned: Answers, train: TrainSummary
) -> tuple[list[Sample], Evaluation]:
    """Both models' answers and scores, one sample per record, and the evaluation of all of them."""
    samples = [
        Sample(
            record["instruction"],
            record["input"],
            record["output"],
            base.texts[i],
            tuned.texts[i],
            tuned.finished[i],
            record.get("family", ""),
            base.record_scores[i],
            tuned.record_scores[i],
        )
        for i, record in enumerate(records)
    ]
    return samples, Evaluation(base.scores, tuned.scores, _by_family(samples), train)


def _by_family(samples: Sequence[Sample]) -> dict[str, FamilyScores]:
    """By name; samples without a family are left out."""
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
