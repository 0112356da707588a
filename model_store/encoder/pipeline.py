"""The serving path through an encoder: rows in, finished vectors on the host a little later.

Everything between is queued on the device at once: the copy there, the forward pass, pooling, cutting, normalising and
the copy back. On CUDA `launch` returns while the device still works, so that the next batch can be queued behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store.encoder.encoder import LEAST_TOKENS, Encoder
from model_store.encoder.packing import PackedBatch, in_one_piece, pieces_of, to_device, widest_first
from model_store.encoder.pooling import pool, shorten_and_normalize
from model_store.text.tokenizer import TokenizedText

# T packed tokens, B texts, V vectors, D width

# The forward pass is captured for token counts this far apart at least, and apart by this share of a power of two: so a
# batch that is filled up computes at most 1/16 of its tokens for nothing, or seven where tokens cost no time.
_GRAPH_STEP = 8
_GRAPH_SHARE = 32

# Each text costs the attention kernel thread blocks, there or not: room for texts of eight tokens and more.
_TOKENS_PER_TEXT = 8
_MOST_TEXTS = 64


def graph_sizes(most: int) -> list[int]:
    """The token counts up to `most` for which the forward pass is captured, the smallest first."""
    sizes = [LEAST_TOKENS]
    while sizes[-1] < most:
        octave = 1 << (sizes[-1].bit_length())  # the power of two above
        sizes.append(sizes[-1] + max(octave // _GRAPH_SHARE, _GRAPH_STEP))
    return [size for size in sizes if size <= most]


@dataclass(frozen=True)
class Pending:
    """Vectors on their way: (V, D) float32, normalised."""

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
        self.texts = min(max(tokens // _TOKENS_PER_TEXT, 4), _MOST_TEXTS)
        example = PackedBatch.pack([TokenizedText([0] * tokens, 0)], encoder.manifest.pooling)
        inputs = self._inputs(example, torch.full((1,), encoder.manifest.width))
        # What the graph reads lies in one piece, so that a batch comes by one copy.
        self._piece = in_one_piece(list(inputs.values()), pinned=True).to(encoder.device)
        placed = dict(zip(inputs, pieces_of(self._piece, list(inputs.values())), strict=True))
        widths = placed.pop("widths")
        batch = replace(example, longest=tokens, **placed)
        # Before capture everything must have run once, aside from the stream that others use.
        aside = torch.cuda.Stream(encoder.device)
        aside.wait_stream(torch.cuda.current_stream(encoder.device))
        with torch.cuda.stream(aside):
            forward(encoder, batch, widths)
            with _refusing_to_wait():
                forward(encoder, batch, widths)
        torch.cuda.current_stream(encoder.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._vectors = forward(encoder, batch, widths)

    def holds(self, batch: PackedBatch) -> bool:
        """Whether the batch fits, with a text of filler if it has fewer tokens."""
        missing = self.tokens - len(batch.token_ids)
        texts = len(batch.cu_seqlens) - 1 + (missing > 0)
        return batch.pooled_tokens is None and missing >= 0 and texts <= self.texts

    def replay(self, batch: PackedBatch, widths: Tensor) -> Tensor:
        """(V, D) for a batch and widths on the host. The next replay overwrites it, so queue its copy before."""
        inputs = self._inputs(batch, widths)
        self._piece.copy_(in_one_piece(list(inputs.values()), pinned=True), non_blocking=True)
        self._graph.replay()
        return self._vectors[: len(widths)]

    def _inputs(self, batch: PackedBatch, widths: Tensor) -> dict[str, Tensor]:
        filled = batch.filled_up_to(self.tokens, self.texts)
        unused = torch.ones(self.texts - len(widths), dtype=widths.dtype)
        return widest_first({**filled.tensors, "widths": torch.cat([widths, unused])})


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Have whatever waits for the device raise RuntimeError.

    It can't be captured, and a capture that fails leaves the allocator of torch 2.11 unusable (pytorch #180395).
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class Replay:
    """A captured forward pass and the smallest batch, in tokens, for which replaying it saves time."""

    graph: CapturedForward
    least_tokens: int = 0

    def serves(self, batch: PackedBatch) -> bool:
        """Whether this is the way for a batch."""
        return len(batch.token_ids) >= self.least_tokens and self.graph.holds(batch)


@dataclass(frozen=True)
class Pipeline:
    """An encoder and the replays that it has, smallest first."""

    encoder: Encoder
    replays: tuple[Replay, ...] = ()

    @torch.inference_mode()
    def with_graphs(self, token_counts: Sequence[int]) -> Pipeline:
        """The same with the forward pass captured for these token counts.

        Raises:
            RuntimeError: if the model or its attention kernel does what can't be captured.
        """
        memory = torch.cuda.graph_pool_handle()
        # From the largest down, so that the smaller ones find their memory in what is there.
        captured = [CapturedForward(self.encoder, tokens, memory) for tokens in sorted(token_counts, reverse=True)]
        return Pipeline(self.encoder, tuple(map(Replay, reversed(captured))))

    @torch.inference_mode()
    def launch(self, rows: Sequence[TokenizedText], widths: Sequence[int]) -> Pending:
        """Queue a batch; each vector is cut to its row's width and has length 1 then, with zeros behind.

        A row with spans has as many vectors. Where a width is below 0 that many dimensions stay as they are.
        """
        encoder = self.encoder
        batch = PackedBatch.pack(rows, encoder.manifest.pooling)
        counts = torch.tensor([row.vectors for row in rows])
        cut_to = torch.tensor(widths).repeat_interleave(counts)
        replay = next((replay for replay in self.replays if replay.serves(batch)), None)
        if replay is not None:
            vectors = replay.graph.replay(batch, cut_to)
        else:
            vectors = forward(encoder, encoder.place(batch), to_device({"widths": cut_to}, encoder.device)["widths"])
        if encoder.device.type == "cpu":
            return Pending(vectors, None)
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # or the thread that waits would keep a core busy
        copied.record(torch.cuda.current_stream(encoder.device))
        return Pending(host, copied)

    def probe(self) -> None:
        """See that the device computes anything at all.

        Raises:
            RuntimeError: if not. After some errors CUDA refuses everything until the process ends.
        """
        torch.zeros(1, device=self.encoder.device).item()


def forward(encoder: Encoder, batch: PackedBatch, widths: Tensor) -> Tensor:
    """(V, D) finished vectors, the first of a batch, V being the number of widths; all on the device."""
    return shorten_and_normalize(pool(encoder.hidden(batch), batch)[: len(widths)], widths)
