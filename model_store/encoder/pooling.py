"""Token vectors → one vector a text, in float32, for a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from model_store.encoder.packing import PackedBatch

# T packed tokens, P pooled tokens, V vectors, D width

# A vector of zeros stays one.
_LEAST_NORM = torch.finfo(torch.float32).tiny


def pool(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """(T, D) of any dtype → (V, D) float32: Σ w·h / Σ w over each text's tokens or each span's, not normalised.

    Every pooling mode is a choice of w. Each text is summed on its own, in token order, in blocks that begin with it:
    pooling gives it the same bits in every batch, and a GPU adds up all blocks at once.
    """
    if batch.pooled_tokens is not None:
        hidden = hidden[batch.pooled_tokens]
    weights = batch.pooling_weights[:, None]
    return _sums(hidden.float() * weights, batch) / _sums(weights, batch)


def _sums(values: Tensor, batch: PackedBatch) -> Tensor:
    """(P, …) → (V, …)."""
    # unsafe leaves out a check of the lengths, for which a GPU would have to wait.
    blocks = torch.segment_reduce(values, "sum", lengths=batch.block_lengths, axis=0, unsafe=True)
    return torch.segment_reduce(blocks, "sum", lengths=batch.block_counts, axis=0, unsafe=True)


def shorten_and_normalize(vectors: Tensor, widths: Tensor) -> Tensor:
    """(V, D) float32 → rows of length 1, with zeros from each row's width on; `widths` is (V,) integers.

    Vectors are cut first, so that a shortened vector has length 1 too. A row with NaN stays NaN: normalising does not
    hide it. A width below 0 asks for its amount without any change of length.
    """
    kept = torch.arange(vectors.shape[1], device=vectors.device) < widths.abs()[:, None]
    shortened = vectors.where(kept, 0)
    norms: Tensor = torch.linalg.vector_norm(shortened, dim=1, keepdim=True)
    return shortened / norms.clamp_min(_LEAST_NORM).where(widths[:, None] > 0, 1)
