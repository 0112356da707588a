"""The serving path through an encoder: rows in, finished vectors on the host a little later.

`launch` queues all the work on the device at once: the copy to it, the forward pass, pooling, cutting, normalising and
the copy back. On CUDA it returns while the device still works, so that the next batch can be queued behind this one.
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

from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch, in_one_piece, pieces_of, to_device
from model_store.encoder.pooling import Wanted, shorten_and_normalize
from model_store.text.tokenizer import TokenizedText

# T packed tokens, B texts, V vectors, D width

# The forward pass is captured for token counts at least _GRAPH_STEP apart, and at least 1/_GRAPH_SHARE of the next
# power of two apart. So filler is at most 1/16 of a batch's tokens, or seven tokens where tokens cost no time.
_LEAST_GRAPH = 16
_GRAPH_STEP = 8
_GRAPH_SHARE = 32

# A graph has room for texts of this many tokens on average, up to _MOST_TEXTS texts: the attention kernel starts thread
# blocks for each place, whether it holds a text or not.
_TOKENS_PER_TEXT = 8
_MOST_TEXTS = 64


def graph_sizes(most: int) -> list[int]:
    """The token counts up to `most` for which the forward pass is captured, the smallest first."""
    sizes = [_LEAST_GRAPH]
    while sizes[-1] < most:
        octave = 1 << (sizes[-1].bit_length())  # the power of two above
        sizes.append(sizes[-1] + max(octave // _GRAPH_SHARE, _GRAPH_STEP))
    return [size for size in sizes if size <= most]


@dataclass(frozen=True)
class Pending:
    """Finished vectors on their way to the host: (V, D) float32."""

    vectors: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> NDArray[np.float32]:
        """The vectors, once they have arrived. Raises any error that the device reports for the batch."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.vectors.numpy()


class CapturedForward:
    """One CUDA graph: the forward pass for a fixed number of tokens, replayed without any of its host work."""

    def __init__(self, encoder: Encoder, tokens: int, memory: Any) -> None:
        self.tokens = tokens
        self.texts = min(max(tokens // _TOKENS_PER_TEXT, 4), _MOST_TEXTS)
        example = PackedBatch.pack([TokenizedText([0] * tokens, 0)], encoder.manifest.pooling)
        inputs = self._inputs(example, finish_of([Wanted(encoder.manifest.width)], [1]))
        # The graph's inputs lie in one piece of memory, so that a batch arrives by one copy.
        self._piece = in_one_piece(inputs, pinned=True).to(encoder.device)
        placed = pieces_of(self._piece, inputs)
        finish = {name: placed.pop(name) for name in ("widths", "normalize")}
        batch = replace(example, longest=tokens, **placed)
        # Before the capture all of it must have run once, on another stream than the one in use.
        aside = torch.cuda.Stream(encoder.device)
        aside.wait_stream(torch.cuda.current_stream(encoder.device))
        with torch.cuda.stream(aside):
            forward(encoder, batch, **finish)
            with _refusing_to_wait():
                forward(encoder, batch, **finish)
        torch.cuda.current_stream(encoder.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._vectors = forward(encoder, batch, **finish)

    def holds(self, batch: PackedBatch) -> bool:
        """Whether the batch fits, with a text of filler if it has fewer tokens."""
        missing = self.tokens - len(batch.token_ids)
        texts = len(batch.cu_seqlens) - 1 + (missing > 0)
        return batch.pooled_tokens is None and missing >= 0 and texts <= self.texts

    def replay(self, batch: PackedBatch, finish: dict[str, Tensor]) -> Tensor:
        """(V, D) for a batch on the host and its `finish_of`. The next replay overwrites it: queue its copy before."""
        self._piece.copy_(in_one_piece(self._inputs(batch, finish), pinned=True), non_blocking=True)
        self._graph.replay()
        return self._vectors[: len(finish["widths"])]

    def _inputs(self, batch: PackedBatch, finish: dict[str, Tensor]) -> dict[str, Tensor]:
        filled = batch.filled_up_to(self.tokens, self.texts)
        unused = self.texts - len(finish["widths"])
        return filled.tensors | {name: torch.cat([values, values.new_ones(unused)]) for name, values in finish.items()}


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Operations that wait for the device raise RuntimeError within the block.

    They can't be captured, and a capture that fails leaves the allocator of torch 2.11 unusable (pytorch #180395).
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
        """Whether replaying is possible for a batch and saves time."""
        return len(batch.token_ids) >= self.least_tokens and self.graph.holds(batch)


@dataclass(frozen=True)
class Pipeline:
    """An encoder and its replays, the smallest first."""

    encoder: Encoder
    replays: tuple[Replay, ...] = ()

    @torch.inference_mode()
    def with_graphs(self, token_counts: Sequence[int]) -> Pipeline:
        """The same encoder, with the forward pass captured for these token counts.

        Raises:
            RuntimeError: if an operation of the model or its attention kernel can't be captured.
        """
        memory = torch.cuda.graph_pool_handle()
        # From the largest down, so that the smaller graphs reuse the memory of the larger ones.
        captured = [CapturedForward(self.encoder, tokens, memory) for tokens in sorted(token_counts, reverse=True)]
        return Pipeline(self.encoder, tuple(map(Replay, reversed(captured))))

    @torch.inference_mode()
    def launch(self, rows: Sequence[TokenizedText], wanted: Sequence[Wanted]) -> Pending:
        """Queue a batch; the vectors of `rows[i]`, one for each span or one in all, are finished as `wanted[i]` says.

        Vectors keep their full width: zeros stand behind a vector that is cut.
        """
        encoder = self.encoder
        batch = PackedBatch.pack(rows, encoder.manifest.pooling)
        finish = finish_of(wanted, [row.vectors for row in rows])
        replay = next((replay for replay in self.replays if replay.serves(batch)), None)
        if replay is not None:
            vectors = replay.graph.replay(batch, finish)
        else:
            vectors = forward(encoder, encoder.place(batch), **to_device(finish, encoder.device))
        if encoder.device.type == "cpu":
            return Pending(vectors, None)
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # else the thread that waits would keep a core busy
        copied.record(torch.cuda.current_stream(encoder.device))
        return Pending(host, copied)

    def probe(self) -> None:
        """Check that the device computes anything at all.

        Raises:
            RuntimeError: if it does not. After some errors CUDA refuses all work until the process ends.
        """
        torch.zeros(1, device=self.encoder.device).item()


def finish_of(wanted: Sequence[Wanted], counts: Sequence[int]) -> dict[str, Tensor]:
    """`widths` (V,) int64 and `normalize` (V,) bool, for rows that have `counts` vectors each."""
    widths, normalize = (torch.from_numpy(np.repeat(values, counts)) for values in zip(*wanted, strict=True))
    return {"widths": widths, "normalize": normalize}


def forward(encoder: Encoder, batch: PackedBatch, widths: Tensor, normalize: Tensor) -> Tensor:
    """(V, D): the first V vectors of a batch, finished; V is the number of widths. All tensors are on the device."""
    return shorten_and_normalize(encoder.vectors(batch)[: len(widths)], widths, normalize)
