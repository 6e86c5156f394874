"""Configuration classes: defaults, limits and messages."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2core.config import (
    AttentionConfig,
    GenerationConfig,
    GPT2Config,
    LoraConfig,
    PretrainConfig,
    TrainConfig,
    check_types,
)

NAN, INF = float("nan"), float("inf")
CONFIGS = [GPT2Config, LoraConfig, TrainConfig, PretrainConfig, GenerationConfig, AttentionConfig]
OUT_OF_RANGE = {
    GPT2Config: {"vocab_size": 0, "n_positions": 0, "n_embd": 0, "n_layer": 0, "n_head": 0, "n_inner": 0}
    | {
        "norm_position": "middle",
        "layer_init": "zero",
        "activation_function": "swish",
        "layer_norm_epsilon": -1.0,
        "initializer_range": -0.1,
    },
    LoraConfig: {"rank": 0, "alpha": 0, "dropout": 1.0, "targets": (), "b_lr_ratio": 0.0},
    TrainConfig: {"epochs": 0, "max_steps": 0, "batch_size": 0, "gradient_accumulation_steps": 0, "learning_rate": 0.0}
    | {"weight_decay": -0.1, "warmup_steps": -1, "decay_fraction": 1.1, "final_lr_ratio": -0.1, "max_grad_norm": 0.0}
    | {"precision": "fp16", "devices": 0, "loss_on": "prompt", "seed": -1, "log_every_steps": 0, "betas": [2, 3]}
    | {"validate_every_epochs": 0, "checkpoint_every_epochs": 0, "limit_train_batches": 0, "limit_val_batches": 0}
    | {"patience": 0, "schedule": "step"},
    PretrainConfig: {"max_steps": 0, "checkpoint_every_steps": 0, "adamw_learning_rate": 0.0, "momentum": 1.0}
    | {"optimizer": "sgd"},
    GenerationConfig: {"max_new_tokens": 0, "temperature": -0.1, "top_k": 0, "top_p": 0.0, "stop": [[]], "seed": 2**63},
    AttentionConfig: {"attention": "flash", "length": 0, "batch_size": 0, "n_head": 0, "n_embd": 7},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_value_out_of_range_is_refused_with_its_name_and_the_rule(config):
    for name, value in OUT_OF_RANGE[config].items():
        with pytest.raises(ValueError, match=rf"^{config.__name__}\.{name} is .*; it must be "):
            config(**{name: value})


@pytest.mark.parametrize("targets", [("q", "q"), ("q", "w"), "qv", ["q", 1]])
def test_targets_are_distinct_known_names(targets):
    with pytest.raises(ValueError, match=r"LoraConfig.targets is .*q, k, v, o, fc(,| or) proj"):
        LoraConfig(targets=targets)


WRONG_TYPE = st.one_of(
    st.text(max_size=3).filter(lambda text: not text.isalpha()),
    st.booleans(),
    st.binary(max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([NAN, INF, -INF, 2**64, -(2**70), 3.5, 10**400]),
)


@given(st.sampled_from(CONFIGS), st.data())
def test_a_value_of_another_type_is_refused_with_its_name_never_with_a_type_error(config, data):
    fields = [field for field in dataclasses.fields(config) if field.type is not bool]
    field = data.draw(st.sampled_from(fields))
    value = data.draw(WRONG_TYPE)
    if isinstance(value, float) and value == 3.5 and "float" in str(field.type):
        return
    with pytest.raises(ValueError, match=rf"^{config.__name__}\.{field.name} is "):
        config(**{field.name: value})


def test_the_message_names_the_type():
    with pytest.raises(ValueError, match=r"LoraConfig.rank is '8'; it must be an integer"):
        LoraConfig(rank="8")
    with pytest.raises(ValueError, match=r"TrainConfig.betas is \(0.9,\); it must be a list of 2 elements, each a fin"):
        TrainConfig(betas=[0.9])
    with pytest.raises(ValueError, match=r"GPT2Config.scale_attn_weights is 1; it must be true or false"):
        GPT2Config(scale_attn_weights=1)


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(ValueError, match=r"\.\.\.; it must be") as error:
        LoraConfig(rank="x" * 10**6)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_has_defaults_and_cannot_be_changed(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, 1)


def test_lists_from_yaml_become_tuples():
    assert LoraConfig(targets=["k", "o"]).targets == ("k", "o")
    assert TrainConfig(betas=[0.8, 0.9]).betas == (0.8, 0.9)
    assert GenerationConfig(stop=[[1, 2], [3]]).stop == ((1, 2), (3,))


def test_an_integer_is_accepted_for_a_float():
    assert LoraConfig(alpha=8).alpha == 8


def test_integers_in_a_pair_of_floats_become_floats():
    for config in (TrainConfig, PretrainConfig):  # torch refuses betas of different types
        assert [type(beta) for beta in config(betas=(0, 0.95)).betas] == [float, float]


def test_numbers_of_numpy_become_those_of_python():
    lora, train = LoraConfig(rank=np.int64(4), alpha=np.float32(8)), TrainConfig(learning_rate=np.float32(0.5))
    generation = GenerationConfig(max_new_tokens=np.int32(3), stop=[[np.int64(1)]], temperature=np.float16(0.5))
    assert (lora, train) == (LoraConfig(rank=4, alpha=8.0), TrainConfig(learning_rate=0.5))
    assert generation == GenerationConfig(max_new_tokens=3, stop=((1,),), temperature=0.5)
    values = [lora.rank, lora.alpha, train.learning_rate, generation.max_new_tokens, generation.stop[0][0]]
    assert [type(value) for value in values] == [int, float, float, int, int]
    with pytest.raises(ValueError, match=r"LoraConfig.rank is 4\.0; it must be an integer"):
        LoraConfig(rank=np.float32(4))


def test_choices_are_those_of_the_literal():
    @dataclasses.dataclass
    class Config:
        stage: Literal["", "production"]

    check_types(Config("production"))
    with pytest.raises(ValueError, match=r"Config.stage is 'x'; it must be empty or production"):
        check_types(Config("x"))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd=10 is not divisible by n_head=4"):
        GPT2Config(n_embd=10, n_head=4)


def test_derived_values_follow_their_fields():
    assert LoraConfig(rank=4, alpha=6.0).scaling == 1.5
    assert LoraConfig(rank=4, alpha=6.0, rslora=True).scaling == 3.0
    assert LoraConfig(rank=4, alpha=None).alpha == 8.0
    assert GPT2Config(n_embd=48, n_head=4).mlp_width == 192
    assert GPT2Config(n_embd=48, n_head=4, n_inner=7).mlp_width == 7


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt3'; choose from gpt2, .*gpt2-nano"):
        GPT2Config.preset("gpt3")
