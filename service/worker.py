"""The only thread that touches the device: loading, warm-up and packed batches.

If `run_batch` raises, the whole batch failed. Knows nothing of HTTP, text or queues.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.encoder import Encoder
from model_store.packing import PackedBatch
from model_store.tokenizer import TokenizedText
from service.errors import EncodingError, NonFiniteEmbedding, OutOfMemory
from service.metrics import Metrics
from service.settings import Limits, Settings

Vector = NDArray[np.float32]

# Lengths tried before the server is ready, so that no request pays for the first use of a kernel.
_WARM_UP_TOKENS = (16, 128, 512)


class EncoderWorker:
    """An encoder behind one thread of its own."""

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self._folder = folder
        self._settings = settings
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "device")
        self._encoder: Encoder

    async def start(self, limits: Limits) -> None:
        """Load the encoder and run the first batches; on CUDA one of the whole token budget, to see it fit.

        Raises:
            ValueError: a DeviceError, AttentionError or StoreError that says what to change.
            OutOfMemory: if the token budget does not fit beside the weights.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._start, limits)

    async def run_batch(self, rows: list[TokenizedText]) -> Sequence[Vector | EncodingError]:
        """One float32 vector of shape (D,) for each row, or the row's own error.

        Raises:
            OutOfMemory: if the batch needs more device memory than there is.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, rows)

    def stop(self) -> None:
        """Let the thread end after the batch it is in."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, limits: Limits) -> None:
        settings = self._settings
        began = time.perf_counter()
        encoder = Encoder.load(self._folder, settings.device, settings.dtype, settings.attention)
        self._encoder = encoder
        loaded = time.perf_counter()
        self._metrics.model_load_seconds.set(loaded - began)
        lengths = [length for length in _WARM_UP_TOKENS if length <= limits.max_input_tokens]
        if encoder.device.type == "cuda":
            lengths.append(limits.token_budget)
        for tokens in lengths:
            each = min(tokens, limits.max_input_tokens)
            count = -(-tokens // each)
            self._run([TokenizedText([0] * each, 0)] * count)
        self._metrics.warmup_seconds.set(time.perf_counter() - loaded)
        self._watch_memory()

    def _run(self, rows: list[TokenizedText]) -> list[Vector | EncodingError]:
        try:
            batch = PackedBatch.pack(rows, self._encoder.manifest.pooling)
            vectors: NDArray[np.float32] = self._encoder.encode(batch).numpy()
        except torch.OutOfMemoryError as error:
            self._metrics.oom.inc()
            torch.cuda.empty_cache()
            raise OutOfMemory("the device has too little memory for this input") from error
        finite = [bool(np.isfinite(vector).all()) for vector in vectors]
        self._metrics.nonfinite.inc(len(rows) - sum(finite))
        return [
            vector if good else NonFiniteEmbedding("the model gave no finite vector for this input")
            for vector, good in zip(vectors, finite, strict=True)
        ]

    def _watch_memory(self) -> None:
        device = self._encoder.device
        if device.type != "cuda":
            return
        for kind, read in (
            ("allocated", lambda: torch.cuda.memory_allocated(device)),
            ("reserved", lambda: torch.cuda.memory_reserved(device)),
            ("total", lambda: torch.cuda.get_device_properties(device).total_memory),
        ):
            self._metrics.gpu_memory_bytes.labels(kind).set_function(read)

    @property
    def device(self) -> str:
        """The device in use, such as cuda:0."""
        return str(self._encoder.device)

    @property
    def dtype(self) -> str:
        """The arithmetic in use, such as bfloat16."""
        return str(self._encoder.dtype).removeprefix("torch.")

    @property
    def kernel(self) -> str:
        """The attention kernel in use."""
        return self._encoder.kernel
