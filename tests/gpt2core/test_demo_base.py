"""The nano base: a checkpoint for transformers, reproducible from its seed."""

import json
import logging

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GPT2Config, PretrainConfig
from gpt2core.demo.base import cloze_accuracy, encode_documents, make_base, train_tokenizer
from gpt2core.demo.prose import write_prose
from gpt2core.demo.world import make_world
from gpt2core.files import directory_sha256
from gpt2core.model import GPT2
from gpt2core.prompt import PREAMBLE
from gpt2core.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2core.train import pretrain

FEW = PretrainConfig(max_steps=3, batch_size=2)


def make(directory, seed=0, config=FEW):
    return make_base("gpt2-nano", config, seed, 60, directory, None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    return directory, make(directory)


def test_transformers_reads_the_base(base):
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        reference = GPT2LMHeadModel.from_pretrained(base[0]).eval()(ids).logits
        torch.testing.assert_close(load_pretrained(base[0])(ids), reference, rtol=1e-4, atol=1e-4)


def test_every_id_of_the_base_is_a_token(base):
    tokenizer, model = load_tokenizer(base[0]), load_pretrained(base[0])
    assert model.config.vocab_size == tokenizer.n_vocab
    assert json.loads((base[0] / "config.json").read_text())["eos_token_id"] == tokenizer.eot_token
    tokenizer.decode(list(range(tokenizer.n_vocab)))


def test_the_description_of_a_base_is_true(base):
    directory, description = base
    model, tokenizer = load_pretrained(directory), load_tokenizer(directory)
    assert description["name"] == "gpt2-nano"
    assert description["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert description["corpus_tokens"] == len(encode_documents(write_prose(make_world(0, 60), 0), tokenizer))
    assert description["tokens_seen"] == 3 * 2 * model.config.n_positions
    assert description["sha256"] == directory_sha256(directory)
    assert 0 <= description["cloze_accuracy"] <= 1


def test_the_seed_decides_the_base(base, tmp_path):
    assert make(tmp_path / "same")["sha256"] == base[1]["sha256"]
    assert make(tmp_path / "other", seed=1)["sha256"] != base[1]["sha256"]


def test_without_pretraining_only_the_weights_differ(base, tmp_path):
    description = make(tmp_path, config=None)
    assert "train_loss" not in description
    assert (tmp_path / "vocab.json").read_bytes() == (base[0] / "vocab.json").read_bytes()
    model = load_pretrained(tmp_path)
    fresh = GPT2(model.config, torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), fresh.parameters(), strict=True))


def test_interrupted_pretraining_continues_from_its_checkpoint(base, tmp_path, caplog):
    caplog.set_level(logging.INFO, "gpt2core.training_state")
    config = PretrainConfig(max_steps=3, batch_size=2, checkpoint_every_steps=1, log_every_steps=1)

    def stop(step, values):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_base("gpt2-nano", config, 0, 60, tmp_path / "a", stop, tmp_path / "checkpoints")
    steps: list[int] = []
    make_base("gpt2-nano", config, 0, 60, tmp_path / "b", lambda step, _: steps.append(step), tmp_path / "checkpoints")
    assert "resuming from step 2" in caplog.text
    assert steps == [1, 2, 3]
    assert directory_sha256(tmp_path / "b") == base[1]["sha256"]


@pytest.mark.parametrize("size", [300, 500])
def test_a_tokenizer_has_the_requested_size_and_end_of_text_last(tmp_path, size):
    tokenizer = train_tokenizer(write_prose(make_world(0, 60), 0), size, tmp_path)
    assert tokenizer.n_vocab == size
    assert tokenizer.eot_token == size - 1
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == size


def test_ids_are_those_of_the_library_that_trained_the_tokenizer(base):
    directory = base[0]
    library = ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    ours = load_tokenizer(directory)
    for text in [*write_prose(make_world(5, 60), 5)[:50], "Ünïcode  with   spaces\n\n", " it's 'S", "漢字🙂"]:
        assert ours.encode_ordinary(text) == library.encode(text).ids


def test_the_fixed_text_of_the_prompt_needs_few_tokens(base):
    assert len(load_tokenizer(base[0]).encode_ordinary(PREAMBLE)) <= len(PREAMBLE.split()) + 2


def test_each_document_ends_with_end_of_text(base):
    tokenizer = load_tokenizer(base[0])
    ids = encode_documents(["one", f"two {END_OF_TEXT}"], tokenizer).tolist()
    assert ids.count(tokenizer.eot_token) == 2
    assert ids[-1] == tokenizer.eot_token
    assert tokenizer.decode(ids) == f"one{END_OF_TEXT}two {END_OF_TEXT}{END_OF_TEXT}"


def test_cloze_accuracy_counts_correct_continuations(base, tmp_path):
    tokenizer = train_tokenizer(['The capital of "A" is "B". The capital of "C" is "D".'] * 3, 300, tmp_path)
    config = GPT2Config(tokenizer.n_vocab, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    model = GPT2(config, torch.Generator().manual_seed(0))
    questions = [('The capital of "A" is "', "B"), ('The capital of "C" is "', "D")]
    assert cloze_accuracy(model, tokenizer, questions) == 0
    tokens = encode_documents(['The capital of "A" is "B". The capital of "C" is "D".'] * 60, tokenizer)
    pretrain(model, tokens, PretrainConfig(max_steps=150, batch_size=4))
    assert cloze_accuracy(model, tokenizer, questions) == 1
    assert cloze_accuracy(model, tokenizer, [questions[0], ('The capital of "C" is "', "B")], batch_size=1) == 0.5
