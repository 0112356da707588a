from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from model_store.encoder.packing import PackedBatch, in_one_piece, pieces_of
from model_store.encoder.pooling import pool, shorten_and_normalize
from model_store.pooling_modes import PoolingMode, token_weights
from model_store.text.tokenizer import TokenizedText


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mean", [0, 0, 1, 1, 1]),
        ("weighted_mean", [0, 0, 1, 2, 3]),
        ("last_token", [0, 0, 0, 0, 1]),
        ("eos_token", [0, 0, 0, 0, 1]),
        ("bos_token", [1, 0, 0, 0, 0]),
    ],
)
def test_token_weights(mode: PoolingMode, expected: list[int]) -> None:
    assert token_weights(mode, 5, 2).tolist() == expected


@pytest.mark.parametrize("mode", get_args(PoolingMode))
def test_pool_is_the_weighted_mean_of_each_text(mode: PoolingMode) -> None:
    rows = [TokenizedText([3, 4, 5], 1), TokenizedText([6], 0), TokenizedText([7, 8, 9, 10], 2)]
    hidden = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    pooled = pool(hidden.bfloat16(), PackedBatch.pack(rows, mode))
    assert pooled.dtype == torch.float32
    start = 0
    for row, vector in zip(rows, pooled, strict=True):
        own = hidden.bfloat16().float()[start : start + len(row)].numpy()
        weights = token_weights(mode, len(row), row.span_start)
        np.testing.assert_allclose(vector, np.average(own, axis=0, weights=weights), rtol=1e-5, atol=1e-6)
        start += len(row)


def test_packing_restarts_positions_and_counts_texts() -> None:
    batch = PackedBatch.pack([TokenizedText([3, 4, 5], 1), TokenizedText([6, 7], 0)], "mean")
    assert batch.token_ids.tolist() == [3, 4, 5, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.pooling_weights.tolist() == [0, 1, 1, 1, 1]
    assert batch.longest == 3


def test_filling_up_adds_a_text_of_filler_and_texts_of_no_tokens() -> None:
    batch = PackedBatch.pack([TokenizedText([3, 4, 5], 1), TokenizedText([6, 7], 0)], "mean")
    filled = batch.filled_up_to(9, texts=5)
    assert filled.token_ids.tolist() == [3, 4, 5, 6, 7, 0, 0, 0, 0]
    assert filled.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert filled.cu_seqlens.tolist() == [0, 3, 5, 9, 9, 9]
    assert filled.longest == 4
    assert batch.filled_up_to(5) is batch
    assert batch.filled_up_to(5, texts=3).cu_seqlens.tolist() == [0, 3, 5, 5]
    hidden = torch.randn(9, 6)
    assert torch.equal(pool(hidden, filled)[:2], pool(hidden[:5], batch))


def test_vectors_are_cut_first_and_have_length_1_then() -> None:
    vectors = torch.tensor([[3.0, 4.0, 12.0], [3.0, 4.0, 12.0], [0.0, 0.0, 0.0]])
    finished = shorten_and_normalize(vectors, torch.tensor([2, 3, 3]), torch.tensor([True, True, True]))
    expected = [[0.6, 0.8, 0.0], [3 / 13, 4 / 13, 12 / 13], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(finished, torch.tensor(expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_that_is_not_finite_does_not_become_so(bad: float) -> None:
    vectors = torch.tensor([[1.0, bad, 2.0], [1.0, 1.0, 2.0]])
    finished = shorten_and_normalize(vectors, torch.tensor([3, 3]), torch.tensor([True, True]))
    assert finished.sum(1).isfinite().tolist() == [False, True]


def test_packing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PackedBatch.pack([], "mean")


def test_spans_get_vectors_of_their_own_beside_texts_that_have_one() -> None:
    spans = ((0, 2), (1, 4), (3, 4))
    rows = [TokenizedText([3, 4], 1), TokenizedText([5, 6, 7, 8], 1, spans=spans), TokenizedText([9, 10, 11], 2)]
    hidden = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    batch = PackedBatch.pack(rows, "mean").filled_up_to(16)
    wanted = [hidden[1:2], hidden[2:4], hidden[3:6], hidden[5:6], hidden[8:9]]
    torch.testing.assert_close(pool(hidden, batch), torch.stack([part.mean(0) for part in wanted]))
    assert [row.vectors for row in rows] == [1, 3, 1]


def test_a_vector_that_is_not_normalised_keeps_its_length() -> None:
    vectors = torch.tensor([[3.0, 4.0, 12.0]]).repeat(3, 1)
    finished = shorten_and_normalize(vectors, torch.tensor([3, 2, 2]), torch.tensor([False, True, False]))
    torch.testing.assert_close(finished, torch.tensor([[3.0, 4.0, 12.0], [0.6, 0.8, 0.0], [3.0, 4.0, 0.0]]))


@pytest.mark.parametrize("mode", get_args(PoolingMode))
def test_long_texts_are_summed_in_blocks_of_their_own(mode: PoolingMode) -> None:
    lengths = [1, 63, 64, 65, 128, 200, 7]
    rows = [TokenizedText(list(range(3, 3 + length)), min(2, length - 1)) for length in lengths]
    hidden = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(0))
    batch = PackedBatch.pack(rows, mode)
    assert batch.block_lengths.tolist() == [1, 63, 64, 64, 1, 64, 64, 64, 64, 64, 8, 7]
    assert batch.block_counts.tolist() == [1, 1, 1, 2, 2, 4, 1]
    pooled, start = pool(hidden, batch), 0
    for row, vector in zip(rows, pooled, strict=True):
        own = hidden[start : start + len(row)]
        np.testing.assert_allclose(
            vector, np.average(own.numpy(), axis=0, weights=token_weights(mode, len(row), row.span_start)), atol=1e-5
        )
        assert torch.equal(vector, pool(own, PackedBatch.pack([row], mode))[0])  # alone: the same bits
        start += len(row)


@pytest.mark.parametrize("lengths", [[30], [5, 3, 2], [64], [100, 20, 1], [100, 20, 4, 2, 1, 1]])
def test_batches_filled_up_to_one_size_have_the_same_shapes(lengths: list[int]) -> None:
    rows = [TokenizedText([3] * length, 0) for length in lengths]
    filled = PackedBatch.pack(rows, "mean").filled_up_to(128, texts=6)
    like = PackedBatch.pack([TokenizedText([0] * 128, 0)], "mean").filled_up_to(128, texts=6)
    assert {name: tensor.shape for name, tensor in filled.tensors.items()} == {
        name: tensor.shape for name, tensor in like.tensors.items()
    }
    hidden = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool(hidden, filled)[: len(rows)], pool(hidden[: sum(lengths)], PackedBatch.pack(rows, "mean")))


def test_tensors_of_several_kinds_travel_in_one_piece() -> None:
    tensors = {
        "bytes": torch.tensor([True, False, True]),
        "longs": torch.arange(5),
        "floats": torch.randn(7),
        "ints": torch.arange(3, dtype=torch.int32),
    }
    back = pieces_of(in_one_piece(tensors, pinned=False), tensors)
    assert back.keys() == tensors.keys()
    assert next(iter(back)) == "longs", "tensors with narrower numbers before these would leave them unaligned"
    for name, given in tensors.items():
        assert back[name].dtype == given.dtype
        assert torch.equal(back[name], given)
