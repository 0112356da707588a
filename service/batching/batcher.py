"""Computes the inputs that wait, in batches on the device, from one queue for all requests.

A batch leaves as soon as the device is free, or is about to be free where batches can queue behind each other. The
inputs that arrive meanwhile make up the next batch, so there is no delay to tune. `scheduling` chooses the inputs of a
batch. This module knows nothing of HTTP, text, tensors or torch: a row has a length in tokens and a key that equal rows
share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Generic

from service.batching.contract import Computed, DevicePlan, Recent, Row, RunBatch, Vector
from service.batching.inputs import Input, Request
from service.batching.memory_budget import MemoryBudget
from service.batching.pace import Pace, stuck_after
from service.batching.room import has_room
from service.batching.scheduling import LANES, BatchLimits, Lane, Queue, take_batch
from service.errors import (
    DeadlineExceeded,
    DeviceLost,
    EncodingError,
    NonFiniteEmbedding,
    OutOfMemory,
    Overloaded,
    Unavailable,
)
from service.logs import log
from service.metrics import Metrics

# Rows handled between two turns of the event loop: a millisecond's work.
_ROWS_AT_ONCE = 128

# The shortest and the longest wait that a refused client is told.
_RETRY_SECONDS = (1.0, 60.0)


class MicroBatcher(Generic[Row, Vector]):
    """The queue and the one task that empties it."""

    def __init__(
        self,
        run_batch: RunBatch[Row, Vector],
        metrics: Metrics,
        recent: Recent[Vector] | None = None,
        max_queued_tokens: int | None = None,
        stuck_batch_seconds: float | None = None,
    ) -> None:
        self._run_batch = run_batch
        self._stuck_batch_seconds = stuck_batch_seconds
        self._metrics = metrics
        self._recent = recent
        self._max_queued_tokens = max_queued_tokens
        self._queue: Queue[Input[Row, Vector]] = Queue()
        self._known: dict[tuple[Lane, bytes], Input[Row, Vector]] = {}
        self._arrival = asyncio.Event()
        self._ended = False
        self._plan: DevicePlan | None = None
        self._memory = MemoryBudget(0)
        self._pace = Pace()
        self._queued = {lane: [0, 0] for lane in LANES}  # inputs and tokens that wait
        self._arriving = dict.fromkeys(LANES, 0)  # tokens of requests that are just being queued
        self._queue_waits = {lane: metrics.queue_wait_seconds.labels(lane) for lane in LANES}
        self.last_batch_failed = False
        self.on_room: Callable[[], None] = lambda: None
        for lane in LANES:
            self._expose(lane)

    async def submit(
        self,
        rows: Sequence[Row],
        lane: Lane = "interactive",
        timeout_seconds: float | None = None,
        caller: int = 0,
        admitted: bool = False,
    ) -> list[Computed[Vector]]:
        """As `Batcher.submit`. The rows may be computed in different batches.

        A row that already waits in the same lane is computed once for both requests. Cancelling this call, or reaching
        its timeout while any of its rows is queued, drops the queued rows that no other request waits for. With
        `admitted`, the rows are queued even if the lane is full.
        """
        if self._ended:
            raise Unavailable("the server can't compute any more")
        if not admitted:
            self.admit(sum(map(len, rows)), lane)
        request: Request[Vector] = Request(len(rows))
        awaited: list[Input[Row, Vector]] = []
        cancelled = False

        def give_up() -> None:
            if any(item.queued for item in awaited):
                request.fail(DeadlineExceeded())

        deadline = asyncio.get_running_loop().call_later(timeout_seconds, give_up) if timeout_seconds else None
        try:
            await self._enqueue(request, rows, lane, caller, awaited)
            if self._ended and not request.done.done():  # it ended meanwhile, and nothing empties the queue any more
                raise Unavailable("the server can't compute any more")
            await request.done
            return request.answers
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            if deadline:
                deadline.cancel()
            request.done.cancel()
            dropped = [item for item in awaited if item.queued and not item.awaited]
            for item in dropped:
                self._unqueue(item)
                self._end(item)
            if dropped:
                self._queue.drop(sum(len(item.callers) for item in dropped))
                self.on_room()
            if cancelled:
                self._metrics.cancelled.labels("queued").inc(len(dropped))

    async def _enqueue(
        self, request: Request[Vector], rows: Sequence[Row], lane: Lane, caller: int, awaited: list[Input[Row, Vector]]
    ) -> None:
        """Queue a request's rows together, and add the inputs that it waits for to `awaited`."""
        now = time.perf_counter()
        new: list[Input[Row, Vector]] = []
        left = sum(map(len, rows))
        self._arriving[lane] += left
        try:
            for index, row in enumerate(rows):
                self._arriving[lane] -= len(row)
                left -= len(row)
                if index % _ROWS_AT_ONCE == _ROWS_AT_ONCE - 1:
                    await asyncio.sleep(0)
                if self._recent is not None and (vector := self._recent.get(row.key)) is not None:
                    self._metrics.cache_hits.inc()
                    request.set(index, Computed(vector))
                    continue
                item = self._known.get((lane, row.key))
                if item is not None and item.awaited:
                    self._metrics.dedup_hits.inc()
                    item.waiting.append((request, index))
                    if lane == "interactive" and item.queued and caller not in item.callers:
                        item.callers += (caller,)
                        new.append(item)  # it is computed at the turn of whichever of its callers comes first
                else:
                    item = Input(row, lane, [(request, index)], len(row), now, (caller,))
                    self._known[lane, row.key] = item
                    self._count(item, 1)
                    new.append(item)
                awaited.append(item)
        finally:  # even after an error: another request may already wait for one of these inputs
            self._arriving[lane] -= left
            self._queue.add(new, lane, caller)
            self._arrival.set()
            self.on_room()  # rows that were already known take no room

    async def probe(self, row: Row) -> None:
        """Compute a row, even if the lane is full: see `Batcher.probe`."""
        await self.submit([row], admitted=True)

    def admit(self, tokens: int, lane: Lane, ahead: int = 0) -> None:
        """As `Batcher.admit`. Each lane has a queue of its own, so that bulk can't keep queries out."""
        if self._ended:
            raise Unavailable("the server can't compute any more")
        if not has_room(tokens, self.queued_in(lane) + ahead, self._max_queued_tokens):
            raise self.overloaded(lane)

    def overloaded(self, lane: Lane) -> Overloaded:
        return Overloaded(self.queued_in(lane), self.retry_seconds())

    def retry_seconds(self) -> float:
        least, most = _RETRY_SECONDS
        return min(max(self.backlog_seconds(), least), most)

    @property
    def batch_tokens(self) -> int:
        """Tokens at which a batch is full; 0 before `run`."""
        return self._plan.limits.batch_tokens if self._plan else 0

    @property
    def queued_tokens(self) -> int:
        return sum(map(self.queued_in, LANES))

    def queued_in(self, lane: Lane) -> int:
        return self._queued[lane][1] + self._arriving[lane]

    def backlog_seconds(self) -> float:
        """Seconds that the device needs, at its present speed, for its current batches and the tokens that wait."""
        return self._pace.backlog_seconds(self._plan.cost, self.queued_tokens) if self._plan else 0.0

    async def run(self, plan: DevicePlan) -> None:
        """Form and run batches for ever. When this ends, for any reason, every input that waits gets an error.

        Raises:
            DeviceLost: if the device hangs, or can't compute any more.
        """
        self._plan = plan
        self._memory = MemoryBudget(plan.limits.token_budget)
        self._metrics.token_budget.set(self._memory.tokens)
        at_once = 2 if plan.lead_seconds else 1
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                _raise_failure(running)
                while not self._queue:
                    self._arrival.clear()
                    await self._arrival.wait()
                    _raise_failure(running)
                await self._wait_for_device(running, at_once, plan.lead_seconds)
                budget = self._memory.tokens
                limits = BatchLimits(min(plan.limits.batch_tokens, budget), budget)
                batch = list(dict.fromkeys(take_batch(self._queue, limits)))
                for item in batch:
                    self._unqueue(item)
                if elsewhere := sum(len(item.callers) - 1 for item in batch):  # in other callers' turns
                    self._queue.drop(elsewhere)
                self.on_room()
                if batch:
                    running.add(task := asyncio.create_task(self._compute(batch, plan)))
                    task.add_done_callback(self._note_failure)
        finally:
            self._ended = True
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
            error = Unavailable("the server stopped before this input was computed")
            for item in self._known.values():
                item.fail(error)
            self._queue = Queue()
            self.on_room()  # those who wait for room learn that there will be none

    async def _wait_for_device(self, running: set[asyncio.Task[None]], at_once: int, lead_seconds: float) -> None:
        """Wait for the moment to compose the next batch: just before the device is free.

        A query that arrives after the composing misses the batch, so the batch is composed no earlier than needed.
        """
        while running:
            spare = self._pace.seconds_to_free() - lead_seconds if len(running) < at_once else None
            if spare is not None and spare <= 0:
                return
            await asyncio.wait(running, timeout=spare, return_when=asyncio.FIRST_COMPLETED)
            _raise_failure(running)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._arrival.set()  # `run` may wait for it

    async def _compute(
        self, batch: list[Input[Row, Vector]], plan: DevicePlan, whole: bool = True, again: bool = True
    ) -> None:
        """Run a batch and answer its inputs. A failed batch is run again in halves, down to the input that is to blame.

        With `again`, an input that gets no finite vector is run once more, alone. Only a `whole` batch, as it was
        composed, tells anything about the token budget.
        """
        tokens = sum(item.tokens for item in batch)
        given = self._pace.give(plan.cost, tokens)
        try:
            results = await self._in_time([item.row for item in batch], plan.cost.seconds(tokens))
        except DeviceLost as lost:
            for item in batch:
                self._end(item)
                item.fail(lost)
            raise
        except Exception as error:
            failure = error.with_traceback(None)  # the traceback could hold the tensors that fill the device's memory
        except BaseException:
            for item in batch:
                self._end(item)
                item.fail(Unavailable("the server stopped while this input was computed"))
            raise
        else:
            if whole:
                self._budget(self._memory.went_well)
            self.last_batch_failed = False
            ended, seconds = self._pace.end(given)
            self._observe(batch, given.at, seconds, plan.limits)
            await self._answer(batch, results, plan, given.at, ended, again)
            return
        self._pace.fail()
        self.last_batch_failed = True
        self._metrics.batch_failures.inc()
        log.warning("a batch of %d inputs failed: %r", len(batch), failure)
        if whole and isinstance(failure, OutOfMemory):
            self._budget(lambda: self._memory.ran_out(tokens, len(batch)))
        await self._after_failure(batch, plan, failure, again)

    async def _in_time(self, rows: list[Row], expected_seconds: float) -> Sequence[Vector | EncodingError]:
        """The device's results for a batch. DeviceLost if it takes so long that the device must hang."""
        limit = stuck_after(expected_seconds, self._stuck_batch_seconds)
        try:
            async with asyncio.timeout(limit) as watch:
                return await self._run_batch(rows)
        except TimeoutError as error:
            if not watch.expired():
                raise
            raise DeviceLost(f"the device hangs: a batch of {len(rows)} inputs took over {limit:.0f} s") from error

    def _budget(self, change: Callable[[], None]) -> None:
        """Change the token budget by its policy, and report a change in the metrics and the log."""
        before = self._memory.tokens
        change()
        if self._memory.tokens != before:
            self._metrics.token_budget.set(self._memory.tokens)
            log.warning("the token budget is %d now, it was %d", self._memory.tokens, before)

    async def _answer(
        self,
        batch: list[Input[Row, Vector]],
        results: Sequence[Vector | EncodingError],
        plan: DevicePlan,
        given: float,
        ended: float,
        again: bool,
    ) -> None:
        alone: list[Input[Row, Vector]] = []
        for index, (item, result) in enumerate(zip(batch, results, strict=True)):
            if index % _ROWS_AT_ONCE == _ROWS_AT_ONCE - 1:
                await asyncio.sleep(0)
            if again and isinstance(result, NonFiniteEmbedding) and item.awaited:
                alone.append(item)
                continue
            self._end(item)
            if isinstance(result, EncodingError):
                item.fail(result)
            else:
                if self._recent is not None:
                    self._recent.put(item.row.key, result)
                item.set(result, given, ended)
        for item in alone:
            await self._compute([item], plan, whole=False, again=False)

    async def _after_failure(
        self, batch: list[Input[Row, Vector]], plan: DevicePlan, error: Exception, again: bool
    ) -> None:
        if len(batch) == 1:
            self._end(batch[0])
            known = error if isinstance(error, EncodingError) else EncodingError("the device failed on this input")
            batch[0].fail(known)
            return
        self._metrics.oom_splits.inc(isinstance(error, OutOfMemory))
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            awaited = [item for item in part if item.awaited]
            for item in part:
                if not item.awaited:
                    self._end(item)
            if awaited:
                await self._compute(awaited, plan, False, again)

    def _observe(self, batch: list[Input[Row, Vector]], given: float, seconds: float, limits: BatchLimits) -> None:
        tokens = sum(item.tokens for item in batch)
        metrics = self._metrics
        metrics.inference_seconds.observe(seconds)
        metrics.batch_inputs.observe(len(batch))
        metrics.batch_tokens.observe(tokens)
        metrics.batch_fill_ratio.observe(tokens / limits.batch_tokens)
        for item in batch:
            self._queue_waits[item.lane].observe(given - item.since)

    def _count(self, item: Input[Row, Vector], sign: int) -> None:
        inputs_tokens = self._queued[item.lane]
        inputs_tokens[0] += sign
        inputs_tokens[1] += sign * item.tokens

    def _unqueue(self, item: Input[Row, Vector]) -> None:
        """Note that the input has left the queue: it goes into a batch, or no request wants it any more."""
        if item.queued:
            item.queued = False
            self._count(item, -1)

    def _end(self, item: Input[Row, Vector]) -> None:
        """Forget the input: no later request can share its vector."""
        if self._known.get((item.lane, item.row.key)) is item:
            del self._known[item.lane, item.row.key]

    def _expose(self, lane: Lane) -> None:
        def oldest_seconds() -> float:
            now, heads = time.perf_counter(), self._queue.heads(lane)
            return max((now - item.since for item in heads if item.queued), default=0.0)

        self._metrics.read_queue(lane, lambda: self._queued[lane][0], lambda: self.queued_in(lane), oldest_seconds)


def _raise_failure(running: set[asyncio.Task[None]]) -> None:
    """Forget the batches that have ended, and raise the error of a batch that must end the batcher."""
    for task in [task for task in running if task.done()]:
        running.discard(task)
        task.result()
