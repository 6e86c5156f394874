"""Pretraining of a base: a BPE tokenizer and a GPT-2 on a text. For gpt2-nano, the text is the demo's prose."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tiktoken
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from gpt2core.checkpoint import save_pretrained
from gpt2core.config import GenerationConfig, GPT2Config, PretrainConfig
from gpt2core.demo.prose import cloze_questions, write_prose
from gpt2core.demo.world import make_world
from gpt2core.files import directory_sha256, write_files
from gpt2core.generate import generate
from gpt2core.model import GPT2
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2core.train import Log, TrainResult, pretrain


def make_base(
    preset: str,
    pretrain_config: PretrainConfig | None,
    seed: int,
    n_facts: int | None,
    directory: Path,
    log: Log | None,
    checkpoint_dir: Path | None = None,
) -> dict[str, str | int | float]:
    """Pretrain a base, write it as a Hugging Face checkpoint directory with tokenizer, and return a description of it.

    Args:
        pretrain_config: None: keep the random weights, for an ablation.
        n_facts: number of facts in the prose; None: the whole world.
        checkpoint_dir: directory of the pretraining checkpoint, from which an interrupted run resumes.
    """
    world = make_world(seed, n_facts)
    documents = write_prose(world, seed)
    base = pretrain_text(documents, GPT2Config.preset(preset), pretrain_config, seed, directory, log, checkpoint_dir)
    description: dict[str, str | int | float] = {
        "name": preset,
        "revision": "",
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "corpus_tokens": base.n_tokens,
    }
    if base.result is not None:
        description |= {
            "train_loss": base.result.history[-1]["train/loss"],
            "tokens_seen": int(base.result.history[-1]["train/tokens_seen"]),
            "tokens_per_second": round(base.result.tokens_per_second),
        }
    questions = cloze_questions(world, seed, 200)
    description["cloze_accuracy"] = cloze_accuracy(base.model, base.tokenizer, questions)
    save_pretrained(base.model, directory)
    return description | {"sha256": directory_sha256(directory)}


@dataclass(frozen=True)
class Pretrained:
    """The result of `pretrain_text`."""

    model: GPT2  # in eval mode
    tokenizer: tiktoken.Encoding
    result: TrainResult | None  # None: not trained
    n_tokens: int  # number of tokens of the text, including the held-out part


def pretrain_text(
    documents: Sequence[str],
    config: GPT2Config,
    pretrain_config: PretrainConfig | None,
    seed: int,
    directory: Path,
    log: Log | None = None,
    checkpoint_dir: Path | None = None,
    val_fraction: float = 0.0,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """Train a tokenizer of at most `config.vocab_size` tokens and a GPT-2 of this config on the documents.

    Args:
        pretrain_config: None: keep the random weights.
        seed: seed of the weights and of training; replaces the seed of `pretrain_config`.
        directory: directory to write the tokenizer's files to.
        val_fraction: see `split_tokens`. The tokenizer is trained on the whole text.

    Raises:
        ValueError, FloatingPointError: as `gpt2core.train.pretrain`.
    """
    tokenizer = train_tokenizer(documents, config.vocab_size, directory)
    # A small text may give fewer tokens than vocab_size; the model's vocabulary then has the same size.
    end = tokenizer.eot_token
    config = replace(config, vocab_size=tokenizer.n_vocab, bos_token_id=end, eos_token_id=end)
    model = GPT2(config, torch.Generator().manual_seed(seed)).to(device)
    tokens = encode_documents(documents, tokenizer)
    result = None
    if pretrain_config is not None:
        train, _ = split_tokens(tokens, val_fraction)
        result = pretrain(model, train, replace(pretrain_config, seed=seed), log, checkpoint_dir)
    return Pretrained(model.eval(), tokenizer, result, len(tokens))


def split_tokens(tokens: torch.Tensor, val_fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a text (N,) into a training part and a held-out part at its end."""
    n_train = int(len(tokens) * (1 - val_fraction))
    return tokens[:n_train], tokens[n_train:]


def make_tokenizer(preset: str, seed: int, n_facts: int | None, directory: Path) -> tiktoken.Encoding:
    """Train and write the same tokenizer as `make_base`, without the base."""
    documents = write_prose(make_world(seed, n_facts), seed)
    return train_tokenizer(documents, GPT2Config.preset(preset).vocab_size, directory)


def train_tokenizer(texts: Sequence[str], vocab_size: int, directory: Path) -> tiktoken.Encoding:
    """Train a byte-level BPE of at most `vocab_size` tokens, and write vocab.json and merges.txt to the directory.

    The training text includes the prompt template; without it, the template would take twice as many tokens in every
    record. End of text has the last id, as in GPT-2.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(ByteLevel.alphabet()), special_tokens=[], show_progress=False
    )
    fixed_text = format_prompt("", " ")
    tokenizer.train_from_iterator([*texts, *[fixed_text] * max(1, len(texts) // 10)], trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    vocab = bpe["vocab"] | {END_OF_TEXT: len(bpe["vocab"])}
    merges = "".join(f"{left} {right}\n" for left, right in bpe["merges"])
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": f"#version: 0.2\n{merges}"}
    write_files(directory, {name: text.encode() for name, text in files.items()})
    return load_tokenizer(directory)


def encode_documents(documents: Sequence[str], tokenizer: tiktoken.Encoding) -> torch.Tensor:
    """Return the tokens (N,) of all documents, with end of text after each of them."""
    ids = [token for text in documents for token in (*tokenizer.encode_ordinary(text), tokenizer.eot_token)]
    return torch.tensor(ids)


def cloze_accuracy(
    model: GPT2, tokenizer: tiktoken.Encoding, questions: Sequence[tuple[str, str]], batch_size: int = 64
) -> float:
    """Return the share of questions that greedy decoding answers word for word.

    A low loss does not prove that a base knows its facts; this share does.

    Args:
        questions: (start of a sentence, expected continuation) each.
    """
    correct = 0
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        prompts = [tokenizer.encode_ordinary(start_of_sentence) for start_of_sentence, _ in part]
        longest = max(len(tokenizer.encode_ordinary(answer)) for _, answer in part)
        completions = generate(model, prompts, GenerationConfig(max_new_tokens=longest + 1))
        correct += sum(
            tokenizer.decode(completion).startswith(answer)
            for completion, (_, answer) in zip(completions, part, strict=True)
        )
    return correct / len(questions)
