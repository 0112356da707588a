from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from model_store.packing import PackedBatch
from model_store.pooling import pool
from model_store.pooling_modes import PoolingMode, token_weights
from model_store.tokenizer import TokenizedText


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


def test_packing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PackedBatch.pack([], "mean")
