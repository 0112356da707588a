"""Token vectors → one float32 vector for each text of a packed batch, cut and normalised as its caller wants it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model_store.encoder.packing import PackedBatch

# T packed tokens, P pooled tokens, V vectors, D width

# A vector of zeros is divided by this, and so stays zeros.
_LEAST_NORM = torch.finfo(torch.float32).tiny


class Wanted(NamedTuple):
    """How the vectors of one row are finished: cut to `width` numbers, and then brought to length 1 if `normalize`."""

    width: int
    normalize: bool = True


def pool(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """(T, D) of any dtype → (V, D) float32: Σ w·h / Σ w over the tokens of each text or span, not normalised.

    Every pooling mode is a choice of w. Each text is summed apart from the others, in token order and in blocks counted
    from its beginning. So a text's sum has the same bits in every batch, and a GPU adds up all blocks at once.
    """
    if batch.pooled_tokens is not None:
        hidden = hidden[batch.pooled_tokens]
    weights = batch.pooling_weights[:, None]
    return _sums(hidden.float() * weights, batch) / _sums(weights, batch)


def _sums(values: Tensor, batch: PackedBatch) -> Tensor:
    """(P, …) → (V, …)."""
    # unsafe leaves out a check of the lengths, for which the host would have to wait.
    blocks = torch.segment_reduce(values, "sum", lengths=batch.block_lengths, axis=0, unsafe=True)
    return torch.segment_reduce(blocks, "sum", lengths=batch.block_counts, axis=0, unsafe=True)


def shorten_and_normalize(vectors: Tensor, widths: Tensor, normalize: Tensor) -> Tensor:
    """(V, D) float32 → the same vectors with zeros behind their width, and of length 1 where `normalize`.

    `widths` is (V,) integers, `normalize` (V,) bool. Vectors are cut first, so that a shortened vector has length 1
    too. A vector with NaN stays NaN: normalising does not hide it.
    """
    kept = torch.arange(vectors.shape[1], device=vectors.device) < widths[:, None]
    shortened = vectors.where(kept, 0)
    norms: Tensor = torch.linalg.vector_norm(shortened, dim=1, keepdim=True)
    return shortened / norms.clamp_min(_LEAST_NORM).where(normalize[:, None], 1)
