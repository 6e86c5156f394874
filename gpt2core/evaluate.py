"""A model's answers to records, scored: what the test split says of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tiktoken

from gpt2core.config import GenerationConfig
from gpt2core.data import Record, encode_records
from gpt2core.generate import generate
from gpt2core.metrics import exact_match, exact_match_by_family, mean, perplexity, token_f1
from gpt2core.model import GPT2
from gpt2core.prompt import parse_reply
from gpt2core.train import token_losses


@dataclass(frozen=True)
class Answers:
    """Lists over the records, in their order, and what they come to."""

    texts: list[str]  # clean answers
    finished: list[bool]  # ended by end of text, not by max_new_tokens or a full context
    scores: dict[str, list[float]]  # exact_match, token_f1, rouge_l, nll (nats a token of the reference)
    metrics: dict[str, float]  # means of the scores and of finished; perplexity over all reference tokens


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
    pairs = [(record["output"], text) for record, text in zip(records, texts, strict=True)]
    scores = {
        "exact_match": [exact_match(*pair) for pair in pairs],
        "token_f1": [token_f1(*pair) for pair in pairs],
        "rouge_l": [rouge_l(*pair) for pair in pairs],
        "nll": [loss / count for loss, count in losses],
    }
    metrics = {name: mean(values) for name, values in scores.items() if name != "nll"}
    metrics |= {"perplexity": perplexity(losses), "finished": mean([float(value) for value in finished])}
    return Answers(texts, finished, scores, metrics)


def answer_text(reply: Sequence[int], tokenizer: tiktoken.Encoding) -> str:
    """The clean answer in a reply's tokens: cut at end of text by token, not by looking for its characters."""
    tokens = list(reply)
    if tokenizer.eot_token in tokens:
        tokens = tokens[: tokens.index(tokenizer.eot_token)]
    return parse_reply(tokenizer.decode(tokens))


def side_by_side(
    records: Sequence[Record], base: Answers, tuned: Answers
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a record with both models' answers and scores, and the metrics of both, also by family."""
    rows = []
    for i, record in enumerate(records):
        scores = {
            f"{side}_{name}": values[i]
            for side, answers in (("base", base), ("tuned", tuned))
            for name, values in answers.scores.items()
        }
        rows.append(
            {key: record[key] for key in ("instruction", "input", "output")}
            | {"base": base.texts[i], "tuned": tuned.texts[i], "finished": tuned.finished[i]}
            | {"family": record.get("family", "")}
            | scores
        )
    return rows, {"base": base.metrics, "tuned": tuned.metrics, "by_family": exact_match_by_family(rows)}
