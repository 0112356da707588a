"""Gathers inputs of many requests into batches and hands each to `run_batch`.

A batch leaves the moment the device is idle; what arrives while it is busy makes up the next one, so there is no
delay to tune. Knows nothing of HTTP, text, tensors or torch: rows are things with a length in tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from service.errors import EncodingError, Unavailable
from service.logs import log
from service.metrics import Metrics

Row = TypeVar("Row", bound=Sized)
Vector = TypeVar("Vector")

# What a batch gives for each row, in order: its vector, or the error of that row alone.
RunBatch = Callable[[list[Row]], Awaitable[Sequence[Vector | EncodingError]]]


@dataclass(frozen=True)
class Computed(Generic[Vector]):
    """One input's vector, how long it waited for its batch and how long the batch took."""

    vector: Vector
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class Waiting(Generic[Row, Vector]):
    """One input, and the future its request waits on."""

    row: Row
    answer: asyncio.Future[Computed[Vector]]
    since: float = field(default_factory=time.perf_counter)
    queued: bool = True

    @property
    def tokens(self) -> int:
        """The row's length in tokens."""
        return len(self.row)


def take_batch(queue: deque[Any], batch_tokens: int) -> list[Any]:
    """Take the next batch off the queue: the oldest first, as many as fit into `batch_tokens`.

    An input that is longer than that by itself goes alone; one whose answer nobody waits for is dropped.
    """
    batch: list[Any] = []
    tokens = 0
    while queue:
        if queue[0].answer.done():
            queue.popleft()
        elif batch and tokens + queue[0].tokens > batch_tokens:
            break
        else:
            tokens += queue[0].tokens
            batch.append(queue.popleft())
    return batch


class MicroBatcher(Generic[Row, Vector]):
    """The queue and the one task that empties it."""

    def __init__(self, run_batch: RunBatch[Row, Vector], batch_tokens: int, metrics: Metrics) -> None:
        self._run_batch = run_batch
        self._batch_tokens = batch_tokens
        self._metrics = metrics
        self._queue: deque[Waiting[Row, Vector]] = deque()
        self._arrival = asyncio.Event()
        self._ended = False
        self._tokens_per_second = 0.0
        self.queued_tokens = 0
        self.last_batch_failed = False
        metrics.read_queue(lambda: len(self._queue), lambda: self.queued_tokens, self._oldest_seconds)

    async def submit(self, rows: Sequence[Row]) -> list[Computed[Vector]]:
        """The rows' vectors, in order, each from whatever batch it fitted into.

        Cancelling this drops the rows that are still queued.

        Raises:
            EncodingError: the first of the rows' own errors, with its index; the other rows are dropped.
            Unavailable: if the batcher has ended.
        """
        if self._ended:
            raise Unavailable("the server can't compute any more")
        loop = asyncio.get_running_loop()
        waiting: list[Waiting[Row, Vector]] = [Waiting(row, loop.create_future()) for row in rows]
        self._queue.extend(waiting)
        self.queued_tokens += sum(item.tokens for item in waiting)
        self._arrival.set()
        index = 0
        try:
            computed = []
            for index, item in enumerate(waiting):  # noqa: B007
                computed.append(await item.answer)
            return computed
        except EncodingError as error:
            raise error.at(index) from error
        finally:
            self._drop(waiting)

    def backlog_seconds(self) -> float:
        """How long the queue would take at the rate of the latest batches; 0 before the first."""
        return self.queued_tokens / self._tokens_per_second if self._tokens_per_second else 0.0

    async def run(self) -> None:
        """Batch and run, for ever. When this ends, whatever the reason, everything that waits is told."""
        try:
            while True:
                while not self._queue:
                    self._arrival.clear()
                    await self._arrival.wait()
                batch = take_batch(self._queue, self._batch_tokens)
                for item in batch:
                    item.queued = False
                    self.queued_tokens -= item.tokens
                if batch:
                    await self._compute(batch)
        finally:
            self._ended = True
            for item in self._queue:
                if not item.answer.done():
                    item.answer.set_exception(Unavailable("the server stopped before this input was computed"))
            self._queue.clear()

    def _drop(self, waiting: list[Waiting[Row, Vector]]) -> None:
        """Let go of a request's inputs; those without an answer yet will not be computed."""
        for item in waiting:
            if item.answer.done() and not item.answer.cancelled():
                item.answer.exception()  # seen here, though another input's error was raised
            item.answer.cancel()
            if item.queued:  # also where cancelling the request has cancelled this answer already
                item.queued = False
                self.queued_tokens -= item.tokens
                self._metrics.cancelled.labels("queued").inc()

    async def _compute(self, batch: list[Waiting[Row, Vector]]) -> None:
        """Run a batch and answer it; one that fails is run again in halves, down to the input that is to blame."""
        started = time.perf_counter()
        try:
            results = await self._run_batch([item.row for item in batch])
        except Exception as error:
            self.last_batch_failed = True
            self._metrics.batch_failures.inc()
            log.warning("a batch of %d inputs failed: %r", len(batch), error)
            await self._after_failure(batch, error)
            return
        except BaseException:
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(Unavailable("the server stopped while this input was computed"))
            raise
        self.last_batch_failed = False
        seconds = time.perf_counter() - started
        self._observe(batch, started, seconds)
        for item, result in zip(batch, results, strict=True):
            if item.answer.done():
                continue
            if isinstance(result, EncodingError):
                item.answer.set_exception(result)
            else:
                item.answer.set_result(Computed(result, started - item.since, seconds))

    async def _after_failure(self, batch: list[Waiting[Row, Vector]], error: Exception) -> None:
        waiting = [item for item in batch if not item.answer.done()]
        if len(waiting) > 1:
            half = len(waiting) // 2
            await self._compute(waiting[:half])
            await self._compute(waiting[half:])
        elif waiting:
            known = error if isinstance(error, EncodingError) else EncodingError("the device failed on this input")
            waiting[0].answer.set_exception(known)

    def _observe(self, batch: list[Waiting[Row, Vector]], started: float, seconds: float) -> None:
        tokens = sum(item.tokens for item in batch)
        if seconds:
            latest = tokens / seconds
            self._tokens_per_second = 0.8 * (self._tokens_per_second or latest) + 0.2 * latest
        self._metrics.inference_seconds.observe(seconds)
        self._metrics.batch_inputs.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_fill_ratio.observe(tokens / self._batch_tokens)
        for item in batch:
            self._metrics.queue_wait_seconds.observe(started - item.since)

    def _oldest_seconds(self) -> float:
        return time.perf_counter() - self._queue[0].since if self._queue else 0.0
