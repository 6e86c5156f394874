import dataclasses

import pytest

from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig, PretrainConfig, TrainConfig

NAN, INF = float("nan"), float("inf")
BOTH = [
    ("batch_size", 0),
    ("gradient_accumulation_steps", 0),
    ("log_every_steps", 0),
    ("learning_rate", 0.0),
    ("learning_rate", NAN),
    ("learning_rate", INF),
    ("weight_decay", -0.1),
    ("warmup_steps", -1),
    ("decay_fraction", 1.1),
    ("final_lr_ratio", -0.1),
    ("max_grad_norm", 0.0),
    ("precision", "fp16"),
]
WRONG = [
    *((TrainConfig, *pair) for pair in BOTH),
    *((PretrainConfig, *pair) for pair in BOTH),
    *((GPT2Config, name, 0) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")),
    (GPT2Config, "activation_function", "swish"),
    (LoraConfig, "rank", 0),
    (LoraConfig, "alpha", NAN),
    (LoraConfig, "dropout", 1.0),
    (LoraConfig, "dropout", -0.1),
    (LoraConfig, "targets", ()),
    (LoraConfig, "targets", ("q", "q")),
    (LoraConfig, "targets", ("q", "w")),
    *((TrainConfig, name, 0) for name in ("epochs", "max_steps", "validate_every_epochs", "checkpoint_every_epochs")),
    *((TrainConfig, name, 0) for name in ("limit_train_batches", "limit_val_batches")),
    (TrainConfig, "loss_on", "prompt"),
    (PretrainConfig, "max_steps", 0),
    (PretrainConfig, "checkpoint_every_steps", 0),
    (GenerationConfig, "max_new_tokens", 0),
    (GenerationConfig, "temperature", -0.1),
    (GenerationConfig, "temperature", INF),
    (GenerationConfig, "top_k", 0),
    (GenerationConfig, "top_p", 0.0),
    (GenerationConfig, "top_p", 1.1),
    (GenerationConfig, "stop", [[]]),
]


@pytest.mark.parametrize(("make", "name", "value"), WRONG)
def test_a_wrong_value_is_refused_by_name_with_what_is_allowed(make, name, value):
    with pytest.raises(ValueError, match=rf"{make.__name__}\.{name} is .*it must be"):
        make(**{name: value})


@pytest.mark.parametrize("make", [GPT2Config, LoraConfig, TrainConfig, PretrainConfig, GenerationConfig])
def test_a_config_has_defaults_and_cannot_be_changed(make):
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)


def test_lists_as_yaml_gives_them_become_tuples():
    assert LoraConfig(targets=["k", "o"]).targets == ("k", "o")
    assert TrainConfig(betas=[0.8, 0.9]).betas == (0.8, 0.9)
    assert GenerationConfig(stop=[[1, 2], [3]]).stop == ((1, 2), (3,))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd=10 cannot be divided into n_head=4"):
        GPT2Config(n_embd=10, n_head=4)


def test_what_follows_from_other_fields_follows():
    assert LoraConfig(rank=4, alpha=6.0).scaling == 1.5
    assert GPT2Config(n_embd=48, n_head=4).mlp_width == 192
    assert GPT2Config(n_embd=48, n_head=4, n_inner=7).mlp_width == 7


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'gpt3'; there are gpt2, .*gpt2-nano"):
        GPT2Config.preset("gpt3")
