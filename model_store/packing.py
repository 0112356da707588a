"""Several texts as one row of tokens, with no padding: what the encoder computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model_store.pooling_modes import PoolingMode, token_weights
from model_store.tokenizer import TokenizedText

# T packed tokens, B texts


@dataclass(frozen=True)
class PooledSpans:
    """What is pooled where not every text gets one vector: tokens of V spans, which may overlap, end to end."""

    tokens: Tensor  # (P,) int64, places in the row of T
    weights: Tensor  # (P,) float32
    lengths: Tensor  # (V,) int64


@dataclass(frozen=True)
class PackedBatch:
    """B texts end to end. `cu_seqlens` are the T-offsets where texts begin, and T itself at the end."""

    token_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, from 0 again for each text
    cu_seqlens: Tensor  # (B + 1,) int32
    pooling_weights: Tensor  # (T,) float32
    longest: int  # tokens of the longest text
    spans: PooledSpans | None = None  # unless each text's `pooling_weights` say it all

    @classmethod
    def pack(cls, rows: Sequence[TokenizedText], pooling: PoolingMode) -> PackedBatch:
        """Pack rows in their order, on the CPU.

        Raises:
            ValueError: if there are no rows; a batch of nothing is a bug of the caller.
        """
        if not rows:
            raise ValueError("a batch needs at least one text")
        lengths = [len(row) for row in rows]
        return cls(
            token_ids=torch.from_numpy(np.concatenate([np.asarray(row.token_ids, dtype=np.int64) for row in rows])),
            position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            pooling_weights=torch.from_numpy(
                np.concatenate([token_weights(pooling, len(row), row.span_start) for row in rows])
            ),
            longest=max(lengths),
            spans=_spans(rows, pooling) if any(row.spans for row in rows) else None,
        )

    def filled_up_to(self, tokens: int, texts: int = 0) -> PackedBatch:
        """The same batch, made at least so large: by one more text of filler, and then by texts of no tokens.

        Texts of no tokens have no vector: theirs is NaN.
        """
        missing = max(tokens - len(self.token_ids), 0)
        ends = [tokens] * (missing > 0)
        ends += [max(tokens, len(self.token_ids))] * (texts + 1 - len(self.cu_seqlens) - len(ends))
        if not ends:
            return self
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, torch.zeros(missing, dtype=torch.int64)]),
            position_ids=torch.cat([self.position_ids, torch.arange(missing)]),
            cu_seqlens=torch.cat([self.cu_seqlens, torch.tensor(ends, dtype=torch.int32)]),
            pooling_weights=torch.cat([self.pooling_weights, torch.ones(missing)]),
            longest=max(self.longest, missing),
        )

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device; copies from pinned memory do not wait for it."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        spans = self.spans
        return PackedBatch(
            move(self.token_ids),
            move(self.position_ids),
            move(self.cu_seqlens),
            move(self.pooling_weights),
            self.longest,
            PooledSpans(move(spans.tokens), move(spans.weights), move(spans.lengths)) if spans else None,
        )


def _spans(rows: Sequence[TokenizedText], pooling: PoolingMode) -> PooledSpans:
    """Every span of every row, a row without any being one; each is weighed as if it were a text's pooled part."""
    tokens, weights, lengths = [], [], []
    begin = 0
    for row in rows:
        for start, end in row.spans or ((0, len(row)),):
            span_start = 0 if row.spans else row.span_start
            tokens.append(np.arange(begin + start, begin + end, dtype=np.int64))
            weights.append(token_weights(pooling, end - start, span_start))
            lengths.append(end - start)
        begin += len(row)
    return PooledSpans(
        torch.from_numpy(np.concatenate(tokens)),
        torch.from_numpy(np.concatenate(weights)),
        torch.tensor(lengths),
    )
