"""Evaluation of a pretrained base by its loss, since it cannot answer questions."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from zenml import step

from gpt2core.checkpoint import load_pretrained
from gpt2core.demo.base import encode_documents, split_tokens
from gpt2core.evaluate import complete, text_loss
from gpt2core.model import best_device
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import JsonDataclass, TrainSummary
from steps.cache import code_of
from steps.config import TextConfig
from steps.metadata import attach_metadata


@dataclass(frozen=True)
class TextScores(JsonDataclass):
    """The scores of a pretrained base on the held-out text. `to_json` is the content of metrics.json."""

    val_loss: float  # nats per token
    perplexity: float
    held_out_tokens: int
    samples: list[str]  # each prompt with its greedy continuation
    train: TrainSummary


@step(cache_policy=code_of(__name__))
def evaluate_text(
    documents: list[str], base: Path, train_summary: TrainSummary, text: TextConfig
) -> Annotated[TextScores, "metrics"]:
    """Compute the loss of the base on the held-out text, and its continuations of the prompts."""
    tokenizer, model = load_tokenizer(base), load_pretrained(base, device=best_device())
    _, held_out = split_tokens(encode_documents(documents, tokenizer), text.val_fraction)
    loss = text_loss(model, held_out)
    samples = complete(model, tokenizer, text.prompts)
    scores = TextScores(loss, math.exp(loss), len(held_out), samples, train_summary)
    attach_metadata("metrics", {key: value for key, value in scores.to_json().items() if key != "samples"})
    return scores
