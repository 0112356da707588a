"""Token vectors → one vector a text, in float32, for a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from model_store.packing import PackedBatch

# T packed tokens, B texts, D width


def pool(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """(T, D) of any dtype → (B, D) float32: Σ w·h / Σ w over each text's tokens, not normalised.

    Every pooling mode is a choice of w. Each text is summed on its own and in token order, so its vector does
    not depend on its batch mates.
    """
    weights = batch.pooling_weights
    lengths = batch.cu_seqlens.diff().long()
    sums = torch.segment_reduce(hidden.float() * weights[:, None], "sum", lengths=lengths, axis=0)
    totals = torch.segment_reduce(weights, "sum", lengths=lengths, axis=0)
    return sums / totals[:, None]
