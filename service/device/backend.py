"""The backend of one process: a worker with its device, and the batcher that feeds it. No HTTP, no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from model_store.manifest import Manifest
from service.batching.batcher import MicroBatcher
from service.batching.contract import DevicePlan
from service.batching.limits import Limits
from service.batching.vector_cache import VectorCache
from service.embedding.rows import EmbedRow, Vector
from service.errors import DeviceLost, EncodingError
from service.metrics import Metrics
from service.settings import Settings
from service.version import VERSION


class Worker(Protocol):
    """The methods of `service.device.worker.EncoderWorker`, which documents them; a fake needs no model."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    async def start(self, limits: Limits) -> DevicePlan: ...
    async def run_batch(self, rows: list[EmbedRow]) -> Sequence[Vector | EncodingError]: ...
    def stop(self) -> None: ...


class LocalBackend:
    """A worker and its batcher in this process."""

    def __init__(
        self, worker: Worker, settings: Settings, manifest: Manifest, limits: Limits, metrics: Metrics
    ) -> None:
        self._worker = worker
        self._limits = limits
        self._metrics = metrics
        self._model = (settings.served_name or manifest.name, manifest.pooling)
        self._plan: DevicePlan
        recent = VectorCache(settings.cache_bytes) if settings.cache_bytes else None
        self.batcher: MicroBatcher[EmbedRow, Vector] = MicroBatcher(
            worker.run_batch, metrics, recent, settings.max_queued_tokens, settings.stuck_batch_seconds
        )
        metrics.max_queued_tokens.set(settings.max_queued_tokens)
        self._start_seconds = settings.start_seconds
        self.busy = False  # whether a thread of the worker does something that may never end

    async def start(self) -> dict[str, object]:
        """Load and warm up.

        Raises:
            DeviceLost: if the start takes too long.
            Exception: any error of the worker's start.
        """
        worker = self._worker
        self.busy = True
        try:
            async with asyncio.timeout(self._start_seconds) as watch:
                self._plan = await worker.start(self._limits)
        except Exception as error:
            if isinstance(error, TimeoutError) and watch.expired():
                raise DeviceLost(f"loading and warm-up took over {self._start_seconds} s") from error
            self.busy = False
            raise
        self.busy = False  # it stays True after a cancellation: the thread goes on
        model, pooling = self._model
        info = self._metrics.build_info
        info.labels(VERSION, model, worker.device, worker.dtype, pooling).set(1)
        return {"device": worker.device, "dtype": worker.dtype, "attention": worker.kernel}

    async def run(self) -> None:
        """Form and run batches, for ever.

        Raises:
            DeviceLost: if the device hangs, or can't compute any more.
        """
        try:
            await self.batcher.run(self._plan)
        except DeviceLost:
            self.busy = True
            raise

    def stop(self) -> None:
        """End the worker's threads, unless one still loads or waits for a device that hangs.

        Such a thread ends with the process. The process must not wait for it: see `busy`.
        """
        if not self.busy:
            self._worker.stop()

    async def metrics_page(self) -> bytes:
        return self._metrics.page()
