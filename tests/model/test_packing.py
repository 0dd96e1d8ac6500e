"""Packing loses nothing, and the attention plan is a way there and back."""

from itertools import pairwise

import pytest
import torch

from anchorembed.model.packing import lay_out, micro_batches, pack

SEQUENCES = [[5, 6, 7], [8], [9] * 20, [1, 2], [3] * 18]


def test_offsets_mark_where_each_text_begins() -> None:
    batch = pack(SEQUENCES)
    assert len(batch) == 5
    cuts = batch.offsets.tolist()
    assert [batch.tokens[a:b].tolist() for a, b in pairwise(cuts)] == SEQUENCES
    assert batch.ends.tolist() == cuts
    assert batch.longest == 20
    assert batch.tokens[batch.anchors].tolist() == [sequence[-1] for sequence in SEQUENCES]
    assert batch.positions.tolist() == [i for sequence in SEQUENCES for i in range(len(sequence))]


def test_buckets_hold_each_token_once() -> None:
    batch = pack(SEQUENCES)
    buckets = lay_out(batch.offsets)
    tokens = torch.cat([bucket.tokens for bucket in buckets])
    assert torch.equal(tokens.sort().values, torch.arange(len(batch.tokens)))
    for bucket in buckets:
        assert torch.equal(bucket.index.flatten()[bucket.slots], bucket.tokens)
        assert int(bucket.real.sum()) == len(bucket.tokens)
    assert sum(bucket.index.numel() for bucket in buckets) <= 1.25 * len(batch.tokens)


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_nothing_to_pack_is_an_error(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(sequences)


def test_micro_batches_keep_order_and_budget() -> None:
    costs = [3, 4, 5, 1, 1, 7]
    runs = list(micro_batches(costs, 8))
    assert [i for run in runs for i in run] == list(range(6))
    assert all(sum(costs[i] for i in run) <= 8 for run in runs)
    assert len(runs) == 3


def test_what_is_above_the_budget_is_alone() -> None:
    assert list(micro_batches([7, 3, 7, 1, 2], 6)) == [range(1), range(1, 2), range(2, 3), range(3, 5)]
    assert list(micro_batches([7], 6)) == [range(1)]
