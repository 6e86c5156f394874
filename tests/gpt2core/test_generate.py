"""Decoding against transformers, and against itself without cache, without batch and without filters."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import GPT2LMHeadModel
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig
from gpt2core.engine import Engine
from gpt2core.generate import generate, stream
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
from gpt2core.sampling import Sampler, choose, distribution, draw, ended
from tests.gpt2core.decoding import random_prompts

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2], [50, 51]]


def sampling(**values) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 12, "temperature": 1.0, "seed": 3} | values)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eos_id", [None, 11])
def test_greedy_decoding_of_a_padded_batch_is_that_of_transformers(seed, eos_id, tmp_path):
    config = GPT2Config(vocab_size=23, n_positions=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    save_pretrained(GPT2(config, torch.Generator().manual_seed(seed)), tmp_path)
    prompts = [[token % 23 for token in prompt] for prompt in PROMPTS]
    completions = generate(load_pretrained(tmp_path), prompts, GenerationConfig(max_new_tokens=20, eos_id=eos_id))
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=0,
        )
        assert completion == whole[0, len(prompt) :].tolist()


def test_cached_decoding_equals_uncached_decoding(model):
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(30):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert generate(model, [prompt], GenerationConfig(max_new_tokens=30)) == [tokens[len(prompt) :]]


@pytest.mark.parametrize("config", [GenerationConfig(max_new_tokens=20), sampling(top_k=20), sampling(top_p=0.8)])
def test_a_completion_does_not_depend_on_the_rest_of_the_batch(model, config):
    assert generate(model, PROMPTS, config) == [generate(model, [prompt], config)[0] for prompt in PROMPTS]


class OpenAIPenalties(LogitsProcessor):
    """As in OpenAI's API reference; transformers has none."""

    def __init__(self, presence: float, frequency: float, n_prompt: int) -> None:
        self.presence, self.frequency, self.n_prompt = presence, frequency, n_prompt

    def __call__(self, input_ids, scores):
        counts = input_ids[0, self.n_prompt :].bincount(minlength=scores.shape[1])
        return scores - counts * self.frequency - (counts > 0) * self.presence


def processors(config: GenerationConfig, n_prompt: int) -> LogitsProcessorList:
    """transformers' equivalent of the controls, in the order in which its `generate` applies them."""
    ending = [config.eos_id, *config.stop_token_ids]
    biases = [[[id], float(bias)] for id, bias in config.logit_bias or ((0, 0.0),)]
    return LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor(biases),
            RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
            OpenAIPenalties(config.presence_penalty, config.frequency_penalty, n_prompt),
            MinNewTokensLengthLogitsProcessor(n_prompt, config.min_tokens, ending),
        ]
    )


CONTROLS = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8, "presence_penalty": -0.3},
    {"logit_bias": {7: 5.0, 11: -100.0, 30: -2.5}},
    {"stop_token_ids": (3, 72, 92)},
    {"min_tokens": 9, "stop_token_ids": (3, 72, 92), "logit_bias": {3: 3.0, 11: 2.0}},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {11: 3.0}, "min_tokens": 4},
]


@pytest.mark.parametrize("controls", CONTROLS, ids=lambda controls: ",".join(controls))
def test_controls_give_the_tokens_of_transformers_in_generate_and_engine(model, hf, controls):
    config = GenerationConfig(max_new_tokens=16, eos_id=11, **controls)
    prompts = random_prompts(6, longest=40)
    expected = []
    for prompt in prompts:
        whole = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=[11, *config.stop_token_ids],
            pad_token_id=0,
            logits_processor=processors(config, len(prompt)),
        )
        expected.append(whole[0, len(prompt) :].tolist())
    assert generate(model, prompts, config) == expected
    with Engine(model, 4, "fp32") as engine:
        plain = [engine.submit(prompt, GenerationConfig(max_new_tokens=16, eos_id=11)) for prompt in prompts]
        controlled = [engine.submit(prompt, config) for prompt in prompts]
        assert [request.result(60) for request in controlled] == expected
        assert [request.result(60) for request in plain] != expected  # the controls have an effect


def test_controls_of_sampled_requests_are_those_of_generate_in_the_engine(model):
    configs = [sampling(seed=seed, min_p=0.05, top_k=40, **controls) for seed, controls in enumerate(CONTROLS)]
    with Engine(model, 8, "fp32") as engine:
        requests = [engine.submit(PROMPTS[0], config) for config in configs]
        assert [request.result(60) for request in requests] == [generate(model, PROMPTS[:1], c)[0] for c in configs]


def test_ignore_eos_generates_beyond_end_of_text(model):
    [free] = generate(model, [PROMPTS[0]], GenerationConfig(max_new_tokens=20))
    config = GenerationConfig(max_new_tokens=20, eos_id=free[4], ignore_eos=True)
    assert generate(model, [PROMPTS[0]], config) == [free]


@pytest.mark.parametrize("controls", [{"logit_bias": {1: 1.0, 97: 1.0}}, {"stop_token_ids": [-1, 2]}])
def test_a_control_of_a_token_that_does_not_exist_is_refused(model, controls):
    name = next(iter(controls))
    with pytest.raises(ValueError, match=rf"{name} contains the token id \S+; ids are from 0 to 96"):
        generate(model, PROMPTS, GenerationConfig(**controls))
    with Engine(model, 1, "fp32") as engine, pytest.raises(ValueError, match=name):
        engine.submit(PROMPTS[0], GenerationConfig(**controls))


def test_controls_that_exclude_every_token_are_an_error_of_that_request(model):
    config = GenerationConfig(min_tokens=1, stop_token_ids=tuple(range(97)))
    with Engine(model, 2, "fp32") as engine:
        refused, other = engine.submit(PROMPTS[0], config), engine.submit(PROMPTS[0], sampling())
        with pytest.raises(ValueError, match="exclude all"):
            refused.result(60)
        assert [other.result(60)] == generate(model, PROMPTS[:1], sampling())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *[(None, None, None), (5, None, None), (1, None, None), (None, 0.7, None), (None, 1e-6, None)],
        *[(7, 0.5, None), (500, 1.0, None), (None, None, 0.1), (None, None, 1.0), (9, 0.9, 0.2)],
    ],
)
def test_the_sampling_distribution_is_that_of_transformers(temperature, top_k, top_p, min_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 3
    expected = (logits / temperature)[None]
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(None, expected)
    config = sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    others = [sampling(temperature=0.3, top_k=3, min_p=0.01), sampling(), sampling(temperature=2.0, top_p=0.9)]
    found = probabilities(logits.expand(4, -1), [others[0], config, *others[1:]])[1]  # whatever the other rows want
    torch.testing.assert_close(found.float(), expected.softmax(-1)[0], rtol=1e-4, atol=1e-6)  # theirs is fp32


def probabilities(logits, configs):
    """(B, V), normalized."""
    found = distribution(logits, configs)
    return found / found.sum(-1, keepdim=True)


@pytest.mark.parametrize("spread", [0.1, 3.0, 8.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(None, 0.9, None), (None, 0.999, None), (40, None, None), (40, 0.9, None), (700, 0.9, 0.1), (None, 0.3, 0.5)],
)
def test_a_large_vocabulary_has_the_distribution_of_transformers(spread, top_k, top_p, min_p):
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(2)) * spread
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    expected = logits / 0.7
    for warp in warpers:
        expected = warp(None, expected)
    config = sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    for found in (
        probabilities(logits, [config] * 3),
        torch.cat([probabilities(row[None], [config]) for row in logits]),
    ):
        # a sum of thousands of fp32 numbers may put the last token of the nucleus on the other side
        differs = (found > 0) != expected.isfinite()
        assert differs.sum(-1).max() <= 1
        torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-3, atol=1e-5 + 2 * found[differs].sum().item())


@pytest.mark.parametrize("controls", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_tokens_are_drawn_with_their_probability(controls):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 2
    expected = probabilities(logits[None], [sampling(**controls)])[0]
    numbers = torch.rand(5_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    draws = draw([logits] * len(numbers), [sampling(**controls)] * len(numbers), numbers)
    counts = draws.bincount(minlength=300)
    assert not counts[expected == 0].any()
    is_frequent = expected * len(numbers) >= 5
    observed = [*counts[is_frequent].tolist(), counts[~is_frequent].sum().item()]
    likely = [*expected[is_frequent].tolist(), expected[~is_frequent].sum().item()]
    pairs = [(o, p * len(numbers)) for o, p in zip(observed, likely, strict=True) if p > 0]
    assert chisquare(*zip(*pairs, strict=True), sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_smallest_and_the_largest_random_number_draw_possible_tokens(number):
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf], [0.0, -torch.inf, 2.0, -1e30]])
    assert draw([*logits], [sampling()] * 2, [number] * 2).tolist() == ([1, 0] if number == 0 else [2, 2])


def test_rows_that_are_not_finite_do_not_disturb_others():
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(4))
    logits[1] = -torch.nan  # a negative NaN, which processors make
    configs = [sampling(top_p=0.5), sampling(top_p=0.5), sampling(top_k=3)]
    together, alone = distribution(logits, configs), [distribution(logits[i : i + 1], [configs[i]]) for i in (0, 2)]
    torch.testing.assert_close(together[[0, 2]], torch.cat(alone))


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-9])
def test_tiny_temperatures_are_greedy(model, temperature):
    greedy = generate(model, PROMPTS, GenerationConfig(max_new_tokens=5))
    assert generate(model, PROMPTS, sampling(max_new_tokens=5, temperature=temperature)) == greedy


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_huge_temperatures_draw_every_possible_token_alike_and_no_other(temperature):
    logits = torch.tensor([3.0, -torch.inf, -2.0])  # -inf: excluded by min_tokens or a grammar
    found = probabilities(logits[None], [sampling(temperature=temperature)])[0]
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.5]))
    assert draw([logits] * 2, [sampling(temperature=temperature)] * 2, [0.4, 0.6]).tolist() == [0, 2]


def test_a_drawn_token_that_does_not_exist_is_an_error_of_its_row_alone():
    configs = [sampling(), sampling(), GenerationConfig()]
    samplers = [Sampler(config, [1], torch.device("cpu")) for config in configs]
    drawn = torch.tensor([5, 2])
    first, second, third = choose(samplers, torch.eye(3, 5), [[]] * 3, draw=lambda *_: drawn)
    assert str(first) == "token 5 was drawn, but the ids of the model are from 0 to 4"
    assert (second, third) == (2, 2)


def test_the_seed_determines_a_sampled_completion(model):
    one, same, other = (generate(model, PROMPTS, sampling(seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_sampled_completions_differ_without_a_seed(model):
    assert generate(model, [[1]], sampling(seed=None)) != generate(model, [[1]], sampling(seed=None))


def test_a_completion_ends_with_its_end_of_text_token(model):
    [free] = generate(model, [PROMPTS[0]], GenerationConfig(max_new_tokens=20))
    eos_id = free[4]
    [completion] = generate(model, [PROMPTS[0]], GenerationConfig(max_new_tokens=20, eos_id=eos_id))
    assert completion == free[: free.index(eos_id) + 1]


def test_a_stop_sequence_ends_only_the_completion_it_occurs_in(model):
    free = generate(model, PROMPTS, sampling(max_new_tokens=20))
    others = {tuple(completion[i : i + 3]) for completion in free[1:] for i in range(18)}
    stop = next(three for i in range(18) if (three := tuple(free[0][i : i + 3])) not in others)
    config = sampling(max_new_tokens=20, stop=[stop, (96, 96, 96)])
    completions = generate(model, PROMPTS, config)
    assert tuple(completions[0][-3:]) == stop
    assert completions[0] == free[0][: len(completions[0])]
    assert completions[1:] == free[1:]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [([], False), ([1], False), ([1, 2], True), ([2, 1], False), ([9], True), ([0, 1, 2], True)],
)
def test_a_completion_ends_at_end_of_text_or_a_whole_stop(completion, expected):
    assert ended(completion, GenerationConfig(eos_id=9, stop=[(1, 2)])) is expected


def test_max_new_tokens_limits_a_completion(model):
    assert [len(completion) for completion in generate(model, PROMPTS, GenerationConfig(max_new_tokens=7))] == [7] * 4


def test_each_completion_ends_when_its_own_context_is_full(model):
    prompts = [[1] * 63, [1] * 10, [1] * 60]
    assert [len(completion) for completion in generate(model, prompts, GenerationConfig(max_new_tokens=100))] == [
        1,
        54,
        4,
    ]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "empty"),
        ([[1] * 64], "64 tokens but n_positions is 64"),
        ([[1, 97]], r"outside 0\.\.\.96"),
        ([[-1]], "outside"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, GenerationConfig())


@pytest.mark.parametrize("kind", [torch.tensor, np.array, iter, lambda rows: (torch.tensor(row) for row in rows)])
def test_prompts_may_be_tensors_arrays_or_an_iterator(model, kind):
    rows, config = [[5, 6, 7], [1, 2, 3]], GenerationConfig(max_new_tokens=4)
    expected = generate(model, rows, config)
    assert generate(model, kind(rows), config) == expected
    with Engine(model, 2, "fp32") as engine:
        assert [engine.submit(prompt, config).result(60) for prompt in kind(rows)] == expected


def test_no_prompts_give_no_completions(model):
    assert generate(model, [], GenerationConfig()) == []


def test_stream_yields_the_tokens_of_generate(model):
    assert list(stream(model, PROMPTS[0], sampling())) == generate(model, [PROMPTS[0]], sampling())[0]


@pytest.mark.parametrize("training", [True, False])
def test_decoding_changes_neither_the_model_nor_the_global_random_state(model, training):
    add_lora(model, LoraConfig(rank=2, dropout=0.5))
    model.train(training)
    model.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}, torch.get_rng_state()
    required = [parameter.requires_grad for parameter in model.parameters()]
    tokens = stream(model, PROMPTS[0], sampling())
    next(tokens)
    assert {name: module.training for name, module in model.named_modules()} == before[0]  # also between two tokens
    tokens.close()
    generate(model, PROMPTS, sampling())
    assert {name: module.training for name, module in model.named_modules()} == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [parameter.requires_grad for parameter in model.parameters()] == required


def test_dropout_is_off_in_train_mode_too(model):
    add_lora(model, LoraConfig(rank=2, dropout=0.9), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    evaluated = generate(model.eval(), PROMPTS, GenerationConfig(max_new_tokens=10))
    assert generate(model.train(), PROMPTS, GenerationConfig(max_new_tokens=10)) == evaluated


def test_a_bf16_model_decodes(tiny_gpt2_dir):
    model = load_pretrained(tiny_gpt2_dir, dtype=torch.bfloat16)
    assert [len(completion) for completion in generate(model, PROMPTS, sampling())] == [12] * 4


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [(["What"], "'What'"), ("What", "'W'"), ([1, 2], "1"), ([[1.5]], r"\[1\.5\]"), ([["a"]], "'a'")],
)
def test_a_prompt_that_is_not_a_list_of_token_ids_is_refused(model, prompts, shown):
    with pytest.raises(TypeError, match=f"a prompt is .*{shown}.*; it must be a list of token ids: encode text"):
        generate(model, prompts, GenerationConfig())
