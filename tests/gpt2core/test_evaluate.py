"""Answers to test records and their scores, against transformers and by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.evaluate import answer_text, compare_answers, evaluate
from gpt2core.generate import generate
from gpt2core.model import GPT2
from gpt2core.prompt import format_prompt
from gpt2core.types import Evaluation, FamilyScores, Sample, TrainSummary

RECORDS = [
    {"instruction": "Say a word.", "input": "", "output": "word", "family": "words"},
    {"instruction": "Say this.", "input": "the words", "output": "the words"},
    {"instruction": "And now?", "input": "", "output": "no more words"},
]


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


def test_answers_are_cleaned_greedy_completions(answers, model, tokenizer):
    for record, answer in zip(RECORDS, answers.answers, strict=True):
        prompt = tokenizer.encode_ordinary(format_prompt(record["instruction"], record["input"]))
        [completion] = generate(model, [prompt], GenerationConfig(max_new_tokens=6, eos_id=tokenizer.eot_token))
        assert answer.text == answer_text(completion, tokenizer)


def test_the_likelihood_of_references_is_that_of_transformers(answers, directory, tokenizer):
    reference = GPT2LMHeadModel.from_pretrained(directory).eval()
    losses = []
    for record, scores in zip(RECORDS, [each.scores for each in answers.answers], strict=True):
        prompt = tokenizer.encode_ordinary(format_prompt(record["instruction"], record["input"]))
        ids = [*prompt, *tokenizer.encode_ordinary(record["output"]), tokenizer.eot_token]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = float(reference(torch.tensor([ids]), labels=labels).loss)
        assert scores.nll == pytest.approx(loss, rel=1e-4)
        losses.append((loss * (len(ids) - len(prompt)), len(ids) - len(prompt)))
    mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert answers.scores.perplexity == pytest.approx(math.exp(mean), rel=1e-3)


def test_scores_are_means_over_records(answers):
    assert [answer.scores.rouge_l for answer in answers.answers] == [0.04, 0.09, 0.13]
    assert answers.scores.rouge_l == pytest.approx(0.26 / 3)


def test_the_batch_size_changes_no_result(answers, model, tokenizer):
    reported: list[int] = []
    alone = evaluate(model, tokenizer, RECORDS, 6, 1, score, reported.append)
    for one, other in zip(alone.answers, answers.answers, strict=True):
        assert one.text == other.text
        assert one.scores.nll == pytest.approx(other.scores.nll, rel=1e-5)
        assert one.confidence == pytest.approx(other.confidence, rel=1e-4)
    assert reported == [1, 2, 3]


def test_a_completion_that_ends_with_end_of_text_counts_as_finished(model, tokenizer, monkeypatch):
    words = tokenizer.encode_ordinary("the words")
    completions = [[*words, tokenizer.eot_token], words, [tokenizer.eot_token]]
    monkeypatch.setattr("gpt2core.evaluate.generate", lambda *_: completions)
    answers = evaluate(model, tokenizer, RECORDS, 6, 3, score)
    assert [answer.text for answer in answers.answers] == ["the words", "the words", ""]
    assert [answer.finished for answer in answers.answers] == [True, False, True]
    assert answers.scores.finished == pytest.approx(2 / 3)
    assert [answer.scores.exact_match for answer in answers.answers] == [0.0, 1.0, 0.0]


def test_an_answer_is_cut_at_the_end_of_text_token(tokenizer):
    before, after = tokenizer.encode_ordinary("one"), tokenizer.encode_ordinary("two")
    assert answer_text([*before, tokenizer.eot_token, *after], tokenizer) == "one"
    assert answer_text([], tokenizer) == ""


def test_an_empty_list_of_records_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no records"):
        evaluate(model, tokenizer, [], 6, 2, score)


TRAIN = TrainSummary(loss=1.0, val_loss=None, tokens_seen=10.0, tokens_per_second=5.0)


def test_samples_have_both_answers_with_their_scores(answers):
    samples, evaluation = compare_answers(RECORDS, replace(answers, device="cuda"), answers, TRAIN)
    match = answers.answers[0].scores.exact_match
    assert [sample.tuned for sample in samples] == answers.answers
    assert [sample.family for sample in samples] == ["words", "", ""]
    assert [sample.base for sample in samples] == answers.answers
    assert evaluation == Evaluation(
        base=answers.scores,
        tuned=answers.scores,
        by_family={"words": FamilyScores(1, match, match)},
        train=TRAIN,
        device="cpu",  # of the model that is served
    )


def test_samples_and_evaluation_survive_json(answers):
    samples, evaluation = compare_answers(RECORDS, answers, answers, TRAIN)
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation
    assert [Sample.from_json(json.loads(json.dumps(sample.to_json()))) for sample in samples] == samples
    more = ("exact_match", "token_f1", "rouge_l", "nll", "tokens", "confidence")
    keys = {"instruction", "input", "output", "base", "tuned", "finished", "family", "group", "base_finished"}
    assert samples[0].to_json().keys() == keys | {f"{side}_{name}" for side in ("base", "tuned") for name in more}
    beside = replace(samples[0], champion=answers.answers[1])
    assert beside.without_champion() == samples[0]
    assert Sample.from_json(json.loads(json.dumps(beside.to_json()))) == beside


def test_families_are_sorted_by_name_and_scored_separately(answers):
    records = [record | {"family": family} for record, family in zip(RECORDS, "bab", strict=True)]
    first = answers.answers[0]
    right, wrong = (replace(first, scores=replace(first.scores, exact_match=value)) for value in (1.0, 0.0))
    base = replace(answers, answers=[wrong, right, wrong])
    tuned = replace(answers, answers=[right, right, wrong])
    _, evaluation = compare_answers(records, base, tuned, TRAIN)
    assert list(evaluation.by_family) == ["a", "b"]
    assert evaluation.by_family == {"a": FamilyScores(1, 1.0, 1.0), "b": FamilyScores(2, 0.0, 0.5)}
