"""Packing of examples into a row, and attention within it."""

import pytest
import torch
import torch.nn.functional as F

from gpt2core import sequences
from gpt2core.batching import pack
from gpt2core.data import Example
from gpt2core.losses import batch_losses
from gpt2core.model import GPT2

LONG, SHORT = Example([1, 2, 3, 4, 5], 3), Example([1, 2, 8], 2)


def test_examples_follow_each_other_and_labels_are_the_next_tokens_of_the_response():
    batch = pack([SHORT, LONG], "response", share_prefix=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.labels.tolist() == [4, 5, 8]
    assert batch.labeled.tolist() == [2, 3, 5]
    assert batch.owners.tolist() == [1, 1, 0]
    assert batch.n_tokens == 6


def test_a_shared_prefix_is_stored_once_and_counted_for_each_example():
    batch = pack([SHORT, LONG], "response")  # they share 1 and 2, but the token after 2 is a label
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 1]]
    assert batch.labels.tolist() == [4, 5, 8]
    assert batch.labeled.tolist() == [2, 3, 4]
    assert batch.n_tokens == 6


def test_with_loss_on_all_tokens_nothing_is_shared():
    batch = pack([SHORT, LONG], "all")
    assert batch.labels.tolist() == [2, 3, 4, 5, 2, 8]
    assert batch.labeled.tolist() == [*range(6)]


def test_texts_of_very_different_lengths_are_not_padded_to_the_longest():
    lengths = [40, 39, 21, 20, 9, 8, 1, 1]
    groups = sequences.PaddedSequences.make(3, lengths).groups
    assert sum(map(len, groups)) == len(lengths)
    assert sum(index.numel() for index in groups) < 2 * sum(lengths)


def attention_by_sequence(q, k, v, ends_q, ends_k, max_q, max_k, scale):
    """`varlen_attention` in plain torch: the last query of a sequence attends to all of its keys."""
    parts = []
    assert (ends_q.diff() > 0).all()
    for i in range(len(ends_q) - 1):
        own = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1]), slice(ends_k[i], ends_k[i + 1])
        a, b, c = (x[at].transpose(0, 1) for x, at in zip((q, k, v), own, strict=True))
        assert a.shape[1] <= max_q
        assert b.shape[1] <= max_k
        mask = torch.ones(a.shape[1], b.shape[1], dtype=torch.bool).tril(b.shape[1] - a.shape[1])
        parts.append(F.scaled_dot_product_attention(a, b, c, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def test_padding_rounds_sizes_up_to_few_values():
    shapes = set[tuple[int, ...]]()
    for n in (*range(300, 1500, 9), *range(4200, 5700, 11)):
        examples = [Example([*range(200)], 30), Example([*range(n - 198)], 5)]
        batch = pack(examples, "response", share_prefix=False, use_varlen=True, padded=True)
        n_tokens, n_labels = batch.input_ids.numel(), batch.labels.numel()
        assert n < n_tokens <= max(n + 2 * 256, 1.07 * n)
        assert n - 33 <= n_labels <= max(n - 33 + 512, 1.5 * (n - 33))
        assert batch.n_labels == n - 33
        assert batch.n_tokens == n
        assert int(batch.sequences.ends_q[-1]) == n_tokens
        shapes.add((n_tokens, n_labels))
    assert len(shapes) < 20


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_padding_changes_neither_losses_nor_gradients(monkeypatch, tiny_config, loss_on):
    monkeypatch.setattr(sequences, "varlen_attention", attention_by_sequence)
    examples = [Example([7, 7, 7, *range(n)], 3) for n in (2, 20, 9, 8, 3, 30)]
    model, found = GPT2(tiny_config, torch.Generator().manual_seed(0)), []
    for padded in (False, True):
        model.zero_grad()
        batch = pack(examples, loss_on, use_varlen=True, padded=padded)
        losses = batch_losses(model, batch)
        losses.sum().backward()
        found.append([losses[: batch.n_labels], *(weight.grad for weight in model.parameters())])
        assert not losses[batch.n_labels :].any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("loss_on", ["response", "all"])  # with and without a shared prefix
@pytest.mark.parametrize(("dense", "use_varlen"), [(256, False), (0, False), (256, True)])
def test_hidden_states_and_gradients_are_those_of_each_example_alone(
    monkeypatch, tiny_config, loss_on, dense, use_varlen
):
    monkeypatch.setattr(sequences, "DENSE", dense)
    monkeypatch.setattr(sequences, "varlen_attention", attention_by_sequence)
    examples = [Example([7, 7, 7, *range(n)], 3) for n in (2, 20, 9, 8, 3, 30)]
    model, found = GPT2(tiny_config, torch.Generator().manual_seed(0)), []

    def add(hidden):
        model.zero_grad()
        hidden.pow(3).sum().backward()
        found.append([hidden, *(weight.grad for weight in model.parameters())])

    batch = pack(examples, loss_on, use_varlen=use_varlen)
    add(model.hidden(batch.input_ids, batch.sequences, positions=batch.positions, keep=batch.labeled))
    order = [examples[i] for i in dict.fromkeys(batch.owners.tolist())]
    first = [example.prompt_length - 1 if loss_on == "response" else 0 for example in order]
    add(torch.cat([model.hidden(torch.tensor([e.input_ids[:-1]]))[0, n:] for e, n in zip(order, first, strict=True)]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max()))
