"""The serving path through an encoder: rows in, finished vectors on the host a little later.

Everything between is queued on the device at once: the copy there, the forward pass, pooling, cutting, normalising and
the copy back. On CUDA `launch` returns while the device still works, so that the next batch can be queued behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store.encoder import LEAST_TOKENS, Encoder
from model_store.packing import PackedBatch
from model_store.pooling import pool, shorten_and_normalize
from model_store.tokenizer import TokenizedText

# T packed tokens, B texts, D width

# Token counts for which the forward pass is captured; a batch takes the smallest that holds it.
GRAPH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Pending:
    """Vectors on their way: (B, D) float32, normalised."""

    vectors: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> NDArray[np.float32]:
        """The vectors, once they are there. Raises what the device reports of the batch."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.vectors.numpy()


class CapturedForward:
    """One CUDA graph: the forward pass for so many tokens, replayed without any of its host work."""

    def __init__(self, encoder: Encoder, tokens: int, memory: Any) -> None:
        self.tokens = tokens
        # Each text costs the attention kernel thread blocks, there or not: room for texts of eight tokens and more.
        self.texts = min(max(tokens // 8, 4), 64)
        example = PackedBatch.pack([TokenizedText([0] * tokens, 0)], encoder.manifest.pooling)
        on_device = example.filled_up_to(tokens, self.texts).to(encoder.device)
        self._batch = replace(on_device, longest=tokens)
        self._widths = torch.full((self.texts,), encoder.manifest.width, device=encoder.device)
        # Before capture everything must have run once, aside from the stream that others use.
        aside = torch.cuda.Stream(encoder.device)
        aside.wait_stream(torch.cuda.current_stream(encoder.device))
        with torch.cuda.stream(aside):
            for _ in range(2):
                forward(encoder, self._batch, self._widths)
        torch.cuda.current_stream(encoder.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._vectors = forward(encoder, self._batch, self._widths)

    def holds(self, batch: PackedBatch) -> bool:
        """Whether the batch fits, with a text of filler if it has fewer tokens."""
        missing = self.tokens - len(batch.token_ids)
        return batch.spans is None and missing >= 0 and len(batch.cu_seqlens) - 1 + (missing > 0) <= self.texts

    def replay(self, batch: PackedBatch, widths: Tensor) -> Tensor:
        """(B, D) for a batch and widths on the host. The next replay overwrites it, so queue its copy before."""
        filled = batch.filled_up_to(self.tokens, self.texts)
        for name in ("token_ids", "position_ids", "cu_seqlens", "pooling_weights"):
            getattr(self._batch, name).copy_(getattr(filled, name).pin_memory(), non_blocking=True)
        self._widths[: len(widths)].copy_(widths.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._vectors[: len(widths)]


@dataclass(frozen=True)
class Pipeline:
    """An encoder and the graphs captured of it, smallest first."""

    encoder: Encoder
    graphs: tuple[CapturedForward, ...] = ()

    @torch.inference_mode()
    def with_graphs(self, token_counts: Sequence[int] = GRAPH_TOKENS) -> Pipeline:
        """The same with the forward pass captured for these token counts.

        Raises:
            RuntimeError: if the model or its attention kernel does what can't be captured.
        """
        memory = torch.cuda.graph_pool_handle()
        # From the largest down, so that the smaller ones find their memory in what is there.
        captured = [CapturedForward(self.encoder, tokens, memory) for tokens in sorted(token_counts, reverse=True)]
        return Pipeline(self.encoder, tuple(reversed(captured)))

    @torch.inference_mode()
    def launch(self, rows: Sequence[TokenizedText], widths: Sequence[int]) -> Pending:
        """Queue a batch; each vector is cut to its row's width and has length 1 then, with zeros behind.

        A row with spans has as many vectors. Where a width is below 0 that many dimensions stay as they are.
        """
        encoder = self.encoder
        batch = PackedBatch.pack(rows, encoder.manifest.pooling)
        counts = torch.tensor([row.vectors for row in rows])
        cut_to = torch.tensor(widths).repeat_interleave(counts)
        graph = next((graph for graph in self.graphs if graph.holds(batch)), None)
        if graph is not None:
            vectors = graph.replay(batch, cut_to)
        else:
            on_device = batch.filled_up_to(LEAST_TOKENS).to(encoder.device)
            if encoder.device.type == "cpu":
                return Pending(forward(encoder, on_device, cut_to), None)
            # From pinned memory, or the host would wait here for the batch before.
            vectors = forward(encoder, on_device, cut_to.pin_memory().to(encoder.device, non_blocking=True))
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(encoder.device))
        return Pending(host, copied)

    def probe(self) -> None:
        """See that the device computes anything at all.

        Raises:
            RuntimeError: if not. After some errors CUDA refuses everything until the process ends.
        """
        torch.zeros(1, device=self.encoder.device).item()


def forward(encoder: Encoder, batch: PackedBatch, widths: Tensor) -> Tensor:
    """(B, D) finished vectors, the first of a batch, B being the number of widths; all on the device."""
    return shorten_and_normalize(pool(encoder.hidden(batch), batch)[: len(widths)], widths)
