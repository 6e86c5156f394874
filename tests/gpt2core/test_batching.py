"""Packing of examples into rows."""

import pytest
import torch
import torch.nn.functional as F

from gpt2core import batching
from gpt2core import model as model_module
from gpt2core.batching import IGNORED, PADDING, SHARED, pack
from gpt2core.data import Example
from gpt2core.model import GPT2

LONG, SHORT = Example([1, 2, 3, 4, 5], 3), Example([1, 2, 8], 2)


def test_examples_follow_each_other_and_labels_are_the_next_tokens_of_the_response():
    batch = pack([SHORT, LONG], "response", share_prefix=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 4, 5, IGNORED, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.example.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert batch.n_tokens == 6


def test_a_shared_prefix_is_stored_once_and_counted_for_each_example():
    batch = pack([SHORT, LONG], "response")  # they share 1 and 2, but the token after 2 is a label
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 2]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 4, 5, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 1]]
    assert batch.example.tolist() == [[SHARED, 1, 1, 1, 0]]
    assert batch.n_tokens == 6


def test_with_loss_on_all_tokens_nothing_is_shared():
    batch = pack([SHORT, LONG], "all")
    assert batch.labels.tolist() == [[2, 3, 4, 5, 2, 8]]
    assert SHARED not in batch.example


def test_many_examples_fill_several_rows_evenly(monkeypatch):
    monkeypatch.setattr(batching, "ROW_TOKENS", 20)
    examples = [Example([7, 7, *range(n)], 2) for n in range(1, 12)]
    batch = pack(examples, "response")
    assert sorted(set(batch.example[batch.example >= 0].tolist())) == list(range(11))
    assert len(batch.input_ids) > 3
    filled = (batch.example != PADDING).float().mean()
    assert filled > 0.85
    for i, example in enumerate(examples):  # complete, in one row, in order
        row = int(torch.where(batch.example == i)[0][0])
        own = batch.example[row] == i
        own[: int((batch.example[row] == SHARED).sum())] = True
        assert batch.input_ids[row][own].tolist() == example.input_ids[:-1]
        assert batch.positions[row][own].tolist() == list(range(len(example.input_ids) - 1))


def test_one_example_per_row_needs_no_mask(monkeypatch):
    monkeypatch.setattr(batching, "ROW_TOKENS", 3)
    batch = pack([LONG, SHORT], "response")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 4, 5], [IGNORED, 8, IGNORED, IGNORED]]
    assert batch.positions is None


def attention_by_sequence(q, k, v, ends_q, ends_k, max_q, max_k, scale):
    """`varlen_attention` in plain torch: the last query of a sequence attends to all of its keys."""
    parts = []
    for i in range(len(ends_q) - 1):
        own = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1]), slice(ends_k[i], ends_k[i + 1])
        a, b, c = (x[at].transpose(0, 1) for x, at in zip((q, k, v), own, strict=True))
        assert a.shape[1] <= max_q
        assert b.shape[1] <= max_k
        mask = torch.ones(a.shape[1], b.shape[1], dtype=torch.bool).tril(b.shape[1] - a.shape[1])
        parts.append(F.scaled_dot_product_attention(a, b, c, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("loss_on", ["response", "all"])  # with and without a shared prefix
@pytest.mark.parametrize("row_tokens", [16, 512])
def test_sequences_give_the_hidden_states_and_gradients_of_the_mask(monkeypatch, tiny_config, loss_on, row_tokens):
    monkeypatch.setattr(batching, "ROW_TOKENS", row_tokens)
    monkeypatch.setattr(model_module, "varlen_attention", attention_by_sequence)
    examples = [Example([7, 7, 7, *range(n)], 3) for n in range(2, 9)]
    batch = pack(examples, loss_on, as_sequences=True)
    assert (batch.sequences.ends_q.diff() > 0).all()
    model, found = GPT2(tiny_config, torch.Generator().manual_seed(0)), []
    for mask in (batch.sequences, batching.attention_mask(batch.example)):
        model.zero_grad()
        hidden = model.hidden(batch.input_ids, mask, positions=batch.positions).flatten(0, 1)[batch.labelled]
        hidden.pow(3).sum().backward()
        found.append([hidden, *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
