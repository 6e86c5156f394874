import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.evaluate import answer_text, evaluate, side_by_side
from gpt2core.generate import generate
from gpt2core.model import GPT2
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer

RECORDS = [
    {"instruction": "Say a word.", "input": "", "output": "word", "family": "words"},
    {"instruction": "Say this.", "input": "the words", "output": "the words"},
    {"instruction": "And now?", "input": "", "output": "no more words"},
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    config = GPT2Config(tokenizer.n_vocab, n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    return save_pretrained(GPT2(config, torch.Generator().manual_seed(0)), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory):
    return load_pretrained(directory)


def score(reference: str, answer: str) -> float:
    return len(reference) / 100


@pytest.fixture(scope="module")
def answers(model, tokenizer):
    return evaluate(model, tokenizer, RECORDS, 6, 2, score)


def test_answers_are_greedy_replies_made_clean(answers, model, tokenizer):
    for record, text in zip(RECORDS, answers.texts, strict=True):
        prompt = tokenizer.encode_ordinary(format_prompt(record["instruction"], record["input"]))
        [reply] = generate(model, [prompt], GenerationConfig(max_new_tokens=6, eos_id=tokenizer.eot_token))
        assert text == answer_text(reply, tokenizer)


def test_the_likelihood_of_references_is_that_of_transformers(answers, directory, tokenizer):
    reference = GPT2LMHeadModel.from_pretrained(directory).eval()
    losses = []
    for record, nll in zip(RECORDS, answers.scores["nll"], strict=True):
        prompt = tokenizer.encode_ordinary(format_prompt(record["instruction"], record["input"]))
        ids = [*prompt, *tokenizer.encode_ordinary(record["output"]), tokenizer.eot_token]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = float(reference(torch.tensor([ids]), labels=labels).loss)
        assert nll == pytest.approx(loss, rel=1e-4)
        losses.append((loss * (len(ids) - len(prompt)), len(ids) - len(prompt)))
    mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert answers.metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)


def test_metrics_are_means_over_records(answers):
    assert answers.scores["rouge_l"] == [0.04, 0.09, 0.13]
    assert answers.metrics["rouge_l"] == pytest.approx(0.26 / 3)
    assert answers.metrics.keys() == {"exact_match", "token_f1", "rouge_l", "perplexity", "finished"}


def test_the_batch_size_changes_nothing_but_speed(answers, model, tokenizer):
    told: list[int] = []
    alone = evaluate(model, tokenizer, RECORDS, 6, 1, score, told.append)
    assert alone.texts == answers.texts
    assert alone.scores["nll"] == pytest.approx(answers.scores["nll"], rel=1e-5)
    assert told == [1, 2, 3]


def test_an_answer_that_ended_by_itself_counts_as_finished(model, tokenizer, monkeypatch):
    words = tokenizer.encode_ordinary("the words")
    replies = [[*words, tokenizer.eot_token], words, [tokenizer.eot_token]]
    monkeypatch.setattr("gpt2core.evaluate.generate", lambda *_: replies)
    answers = evaluate(model, tokenizer, RECORDS, 6, 3, score)
    assert answers.texts == ["the words", "the words", ""]
    assert answers.finished == [True, False, True]
    assert answers.metrics["finished"] == pytest.approx(2 / 3)
    assert answers.scores["exact_match"] == [0.0, 1.0, 0.0]
    assert answers.scores["token_f1"] == [0.0, 1.0, 0.0]


def test_an_answer_is_cut_at_the_token_for_end_of_text_and_not_at_its_characters(tokenizer):
    before, after = tokenizer.encode_ordinary("one"), tokenizer.encode_ordinary("two")
    assert answer_text([*before, tokenizer.eot_token, *after], tokenizer) == "one"
    assert answer_text([], tokenizer) == ""


def test_no_records_are_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="no records"):
        evaluate(model, tokenizer, [], 6, 2, score)


def test_rows_hold_both_answers_and_their_scores(answers):
    rows, metrics = side_by_side(RECORDS, answers, answers)
    scores = {f"{side}_{name}" for side in ("base", "tuned") for name in ("exact_match", "token_f1", "rouge_l", "nll")}
    assert rows[0].keys() == {"instruction", "input", "output", "base", "tuned", "finished", "family"} | scores
    assert [row["tuned"] for row in rows] == answers.texts
    assert [row["family"] for row in rows] == ["words", "", ""]
    assert metrics["base"] == metrics["tuned"] == answers.metrics
    assert metrics["by_family"].keys() == {"words"}
