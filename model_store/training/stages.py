"""The trained modules, in a form that a data-parallel wrapper can hold: packed batches in, the input of a loss out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_store.encoder.packing import PackedBatch
from model_store.encoder.pooling import pool
from model_store.training.decoder import TrainableDecoder
from model_store.training.examples import NO_LABEL, as_inputs
from model_store.training.losses import token_losses

# T packed tokens, N hidden ones, B texts, D width

# The attention kernels would take a longest text of 1 token for decoding.
_LEAST_LONGEST = 8


class _Stage(nn.Module):
    def __init__(self, decoder: TrainableDecoder) -> None:
        super().__init__()
        self.adapted = decoder.adapted

    def _hidden(self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        output = self.adapted.base_model.model(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            cu_seqlens=cu_seqlens,
            longest=max(longest, _LEAST_LONGEST),
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


class MaskedNextToken(_Stage):
    """MNTP: the hidden token at i is predicted from the hidden state at i − 1, as the head was trained to do."""

    head: Tensor | None

    def __init__(self, decoder: TrainableDecoder) -> None:
        super().__init__(decoder)
        self.register_buffer("head", decoder.head, persistent=False)
        self._softcap = getattr(decoder.config, "final_logit_softcapping", None)

    def forward(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """(N,) float32 losses of the hidden tokens, and (N,) bool: whether each was found. `labels` is (T,)."""
        hidden = self._hidden(**inputs)
        places = (labels != NO_LABEL).nonzero()[:, 0]
        head = self.adapted.base_model.model.embed_tokens.weight if self.head is None else self.head
        return token_losses(hidden[places - 1], head, labels[places], self._softcap)


class ContrastiveEncoder(_Stage):
    """Texts' vectors, pooled as the stored encoder pools them.

    With several chunks it does gradient caching (GradCache, Gao et al. 2021): each chunk is computed without keeping
    activations, and computed again, with the same dropout, when the gradient of its vectors is known. So a batch takes
    the memory of one chunk, but has the gradient of the whole batch. torch's activation checkpointing does this for
    each chunk.
    """

    def forward(self, chunks: list[dict[str, Any]]) -> Tensor:
        """(B, D) float32 vectors of all chunks' texts, in order. A chunk has the fields of a `PackedBatch`."""
        if len(chunks) > 1 and torch.is_grad_enabled():
            return torch.cat([checkpoint(self._vectors, *chunk.values(), use_reentrant=False) for chunk in chunks])
        return torch.cat([self._vectors(*chunk.values()) for chunk in chunks])

    def _vectors(self, *fields: Any) -> Tensor:
        batch = PackedBatch(*fields)
        return pool(self._hidden(**as_inputs(batch)), batch)
