"""Several texts as one row of tokens, with no padding: the only form of a batch that the encoder takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_store.pooling_modes import PoolingMode, token_weights
from model_store.text.tokenizer import TokenizedText

# T packed tokens, B texts, V vectors, P pooled tokens, K blocks of them

# Pooled tokens are summed in blocks of this many, counted from the beginning of each text or span. A GPU sums each
# block in its own thread, and the sum still does not depend on the rest of the batch.
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class PackedBatch:
    """B texts end to end. `cu_seqlens` holds the offset in the row at which each text begins, and T at the end."""

    token_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, from 0 again for each text
    cu_seqlens: Tensor  # (B + 1,) int32
    longest: int  # tokens of the longest text
    pooling_weights: Tensor  # (P,) float32
    block_lengths: Tensor  # (K,) int64, pooled tokens of each block
    block_counts: Tensor  # (V,) int64, blocks of each vector
    # (P,) int64, places in the row, for texts with spans, which may overlap. None for all T tokens in order.
    pooled_tokens: Tensor | None = None

    @classmethod
    def pack(cls, rows: Sequence[TokenizedText], pooling: PoolingMode) -> PackedBatch:
        """Pack rows in their order, on the CPU.

        Raises:
            ValueError: if there are no rows, which is a bug of the caller.
        """
        if not rows:
            raise ValueError("a batch needs at least one text")
        lengths = [len(row) for row in rows]
        return cls(
            token_ids=torch.from_numpy(np.concatenate([np.asarray(row.token_ids, dtype=np.int64) for row in rows])),
            position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            longest=max(lengths),
            **_pooled(rows, pooling),
        )

    def filled_up_to(self, tokens: int, texts: int = 0) -> PackedBatch:
        """The same batch, with at least so many tokens and texts: one text of filler is added, then texts of no tokens.

        A text of no tokens has a vector of NaN. With `texts` given, all batches filled up to the same numbers have the
        same shapes.
        """
        have = len(self.token_ids)
        missing = max(tokens - have, 0)
        ends = [tokens] * (missing > 0)
        ends += [max(tokens, have)] * (texts + 1 - len(self.cu_seqlens) - len(ends))
        if not ends and not texts:
            return self
        filled = replace(
            self,
            token_ids=torch.cat([self.token_ids, torch.zeros(missing, dtype=torch.int64)]),
            position_ids=torch.cat([self.position_ids, torch.arange(missing)]),
            cu_seqlens=torch.cat([self.cu_seqlens, torch.tensor(ends, dtype=torch.int32)]),
            longest=max(self.longest, missing),
        )
        if self.pooled_tokens is not None:
            return filled
        lengths, counts = _blocks([missing] * (missing > 0))
        counts += [0] * (len(ends) - len(counts))
        # No batch of this many tokens and texts has more blocks than this.
        lengths += [0] * (tokens // BLOCK_TOKENS + texts - len(self.block_lengths) - len(lengths)) if texts else []
        return replace(
            filled,
            pooling_weights=torch.cat([self.pooling_weights, torch.ones(missing)]),
            block_lengths=torch.cat([self.block_lengths, torch.tensor(lengths, dtype=torch.int64)]),
            block_counts=torch.cat([self.block_counts, torch.tensor(counts, dtype=torch.int64)]),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The batch's tensors by their names."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _pooled(rows: Sequence[TokenizedText], pooling: PoolingMode) -> dict[str, Any]:
    """The pooling fields: one vector for each text, or for each of its spans, weighted like the pooled part of a text.

    Beside rows with spans, a row without spans counts as one span.
    """
    places, weights = [], []
    begin = 0
    for row in rows:
        for start, end in row.spans or ((0, len(row)),):
            places.append(np.arange(begin + start, begin + end, dtype=np.int64))
            weights.append(token_weights(pooling, end - start, 0 if row.spans else row.span_start))
        begin += len(row)
    lengths, counts = _blocks([len(each) for each in weights])
    return {
        "pooling_weights": torch.from_numpy(np.concatenate(weights)),
        "block_lengths": torch.tensor(lengths),
        "block_counts": torch.tensor(counts),
        "pooled_tokens": torch.from_numpy(np.concatenate(places)) if any(row.spans for row in rows) else None,
    }


def _blocks(pooled: Sequence[int]) -> tuple[list[int], list[int]]:
    """The lengths of all blocks, and the number of blocks of each text or span; `pooled` are their pooled tokens."""
    lengths: list[int] = []
    for tokens in pooled:
        lengths += [BLOCK_TOKENS] * (tokens // BLOCK_TOKENS)
        if left := tokens % BLOCK_TOKENS:
            lengths.append(left)
    return lengths, [-(-tokens // BLOCK_TOKENS) for tokens in pooled]


def in_one_piece(tensors: dict[str, Tensor], pinned: bool) -> Tensor:
    """The bytes of small host tensors end to end, so that one copy takes all of them to the device; see `pieces_of`.

    A copy from pinned memory does not wait for the work that is queued on the device.
    """
    out = torch.empty(sum(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8, pin_memory=pinned)
    return torch.cat([tensor.view(torch.uint8) for tensor in _widest_first(tensors).values()], out=out)


def pieces_of(piece: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of the bytes that `in_one_piece` made, with the names, dtypes and lengths of the tensors `like`."""
    ordered = _widest_first(like)
    parts = piece.split([tensor.nbytes for tensor in ordered.values()])
    return {name: part.view(ordered[name].dtype) for name, part in zip(ordered, parts, strict=True)}


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Small one-dimensional host tensors on a device, by one copy from pinned memory that waits for nothing."""
    if device.type == "cpu":
        return tensors
    return pieces_of(in_one_piece(tensors, pinned=True).to(device, non_blocking=True), tensors)


def _widest_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ordered from the widest numbers to the narrowest, so that each tensor is aligned among the bytes of all."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
