"""Properties for any value: undoing, writing and reading, or decoding in another way gives the same result."""

from typing import get_args

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import LORA_TARGETS, Activation, GenerationConfig, GPT2Config, LoraConfig
from gpt2core.engine import Engine
from gpt2core.lora import add_lora, merge_lora, remove_lora, unmerge_lora
from gpt2core.model import GPT2
from gpt2core.prompt import format_prompt, split_prompt
from tests.gpt2core.test_prompt import MESSY
from tests.helpers import randomize_lora, same_state, snapshot

FEW = settings(max_examples=15)
SMALL = GPT2Config(vocab_size=17, n_positions=24, n_embd=8, n_layer=2, n_head=2)
CONFIGS = st.builds(
    GPT2Config,
    vocab_size=st.integers(1, 20),
    n_positions=st.integers(1, 9),
    n_layer=st.integers(1, 3),
    n_head=st.sampled_from([1, 2, 4]),
    n_embd=st.sampled_from([4, 8]),
    n_inner=st.none() | st.integers(1, 40),
    activation_function=st.sampled_from(get_args(Activation)),
    layer_norm_epsilon=st.floats(0, 1, allow_subnormal=False),
    scale_attn_weights=st.booleans(),
    scale_attn_by_inverse_layer_idx=st.booleans(),
    norm_position=st.sampled_from(["pre", "post"]),
)


def make_model(config: GPT2Config, dtype: torch.dtype = torch.float32) -> GPT2:
    return GPT2(config, torch.Generator().manual_seed(0)).eval().to(dtype)


@FEW
@given(
    st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True),
    st.integers(1, 4),
    st.floats(-1e3, 1e3).filter(bool),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
)
def test_unmerging_is_the_inverse_of_merging_bit_for_bit(targets, rank, alpha, rslora, dora, dtype, times):
    model = make_model(SMALL, dtype)
    base = snapshot(model)
    randomize_lora(add_lora(model, LoraConfig(rank, alpha, tuple(targets), rslora=rslora, dora=dora)))
    adapted = snapshot(model)
    for _ in range(times):
        unmerge_lora(merge_lora(merge_lora(model)))
    assert same_state(snapshot(model), adapted)
    assert same_state(snapshot(remove_lora(merge_lora(model))), base)


@FEW
@given(CONFIGS)
def test_reading_is_the_inverse_of_writing_a_checkpoint(tmp_path_factory, config):
    directory = tmp_path_factory.mktemp("checkpoint")
    model = make_model(config)
    read = load_pretrained(save_pretrained(model, directory))
    assert same_state(snapshot(read), snapshot(model))
    assert read.config == config


@settings(max_examples=200)
@given(MESSY, MESSY)
@example("a\n\n### Input:\n", "")
@example("", "\n\n### Input:\n")
def test_a_prompt_is_split_into_what_gives_the_same_prompt(instruction, input):
    prompt = format_prompt(instruction, input)
    parts = split_prompt(prompt)
    assert parts is not None
    assert format_prompt(*parts) == prompt
    assert split_prompt(prompt[1:]) is split_prompt(prompt[:-1]) is None
    if "### Input:" not in instruction + input:
        assert parts == (instruction, input)


@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(0, 16), min_size=1, max_size=16), min_size=1, max_size=6), st.integers(1, 4))
def test_the_engine_generates_what_whole_forward_passes_do_whatever_the_batch(prompts, max_batch):
    model = make_model(SMALL)
    for parameter in model.parameters():  # fresh weights give logits that are nearly equal
        parameter.data.mul_(20.0)
    with Engine(model, max_batch, "fp32") as engine:
        config = GenerationConfig(max_new_tokens=6)
        completions = [request.result(60) for request in [engine.submit(prompt, config) for prompt in prompts]]
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert completion == tokens[len(prompt) :]
