"""Packing of examples into rows."""

import torch

from gpt2core import batching
from gpt2core.batching import IGNORED, PADDING, SHARED, pack
from gpt2core.data import Example

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
