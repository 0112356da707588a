"""Token vectors → one vector a text, in float32, for a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from model_store.packing import PackedBatch

# T packed tokens, B texts, D width

# A vector of zeros stays one.
_LEAST_NORM = torch.finfo(torch.float32).tiny


def pool(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """(T, D) of any dtype → (B, D) float32: Σ w·h / Σ w over each text's tokens, not normalised.

    Where a batch has spans it is (V, D), a vector for each of them.

    Every pooling mode is a choice of w. Each text is summed on its own and in token order, so its vector does
    not depend on its batch mates.
    """
    if (spans := batch.spans) is not None:
        hidden, weights, lengths = hidden[spans.tokens], spans.weights, spans.lengths
    else:
        weights, lengths = batch.pooling_weights, batch.cu_seqlens.diff().long()
    # unsafe leaves out a check of the lengths, for which a GPU would have to wait.
    sums = torch.segment_reduce(hidden.float() * weights[:, None], "sum", lengths=lengths, axis=0, unsafe=True)
    totals = torch.segment_reduce(weights, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums / totals[:, None]


def shorten_and_normalize(vectors: Tensor, widths: Tensor) -> Tensor:
    """(B, D) float32 → rows of length 1, with zeros from each row's width on; `widths` is (B,) integers.

    Cut first, so that a shortened vector has length 1 too. A row that is not finite does not become so. A width below 0
    asks for its amount without any change of length.
    """
    kept = torch.arange(vectors.shape[1], device=vectors.device) < widths.abs()[:, None]
    shortened = vectors.where(kept, 0)
    norms: Tensor = torch.linalg.vector_norm(shortened, dim=1, keepdim=True)
    return shortened / norms.clamp_min(_LEAST_NORM).where(widths[:, None] > 0, 1)
