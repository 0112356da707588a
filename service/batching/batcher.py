"""Runs what waits in batches on the device, one queue for all requests.

A batch leaves when the device is free, or about to be where it can queue one behind another; what arrives meanwhile
makes up the next, so there is no delay to tune. Which inputs go is the choice of `scheduling`. Knows nothing of HTTP,
text, tensors or torch: rows are things with a length in tokens and a key that equal rows share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from service.batching.cost_model import CostModel
from service.batching.memory_budget import MemoryBudget
from service.batching.room import has_room
from service.batching.scheduling import LANES, BatchLimits, Lane, Queue, take_batch
from service.batching.stuck import stuck_after
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


class Batchable(Protocol):
    """A row to compute."""

    @property
    def key(self) -> bytes:
        """The same for rows that get the same vector."""

    def __len__(self) -> int:
        """Its tokens."""


Row = TypeVar("Row", bound=Batchable)
RowIn = TypeVar("RowIn", contravariant=True)
Vector = TypeVar("Vector")

# What a batch gives for each row, in order: its vector, or the error of that row alone.
RunBatch = Callable[[list[Row]], Awaitable[Sequence[Vector | EncodingError]]]

# Share of the newest batch in running averages.
_NEWEST = 0.2

# Rows between two turns of the event loop: a millisecond's work.
_ROWS_AT_ONCE = 128

# What a client that finds too much queued is told to wait, at least and at most.
_RETRY_SECONDS = (1.0, 60.0)


@dataclass(frozen=True)
class DevicePlan:
    """What warm-up found out about the device.

    `lead_seconds` is how long before the device is free the next batch must be composed so that it never waits; 0 where
    batches can't be queued behind each other.
    """

    cost: CostModel
    limits: BatchLimits
    lead_seconds: float = 0.0


@dataclass(frozen=True)
class Computed(Generic[Vector]):
    """One input's vector, how long it waited for its batch and how long the batch took; no time if it was there."""

    vector: Vector
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0


@dataclass(eq=False)
class _Request(Generic[Vector]):
    """A request's answers, and the future that has them all once none is missing."""

    answers: list[Computed[Vector] | None]
    missing: int
    done: asyncio.Future[None]
    since: float

    def set(self, index: int, computed: Computed[Vector]) -> None:
        self.answers[index] = computed
        self.missing -= 1
        if not self.missing and not self.done.done():
            self.done.set_result(None)

    def fail(self, index: int, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error.at(index) if isinstance(error, EncodingError) else error)


@dataclass(eq=False)
class _Input(Generic[Row, Vector]):
    """One distinct row, and the places in requests that wait for its vector."""

    row: Row
    lane: Lane
    waiting: list[tuple[_Request[Vector], int]]
    tokens: int
    since: float
    callers: tuple[int, ...]  # in whose turns it is
    queued: bool = True

    @property
    def wanted(self) -> bool:
        """Whether it is still to be computed."""
        return self.queued and self.awaited

    @property
    def awaited(self) -> bool:
        return any(not request.done.done() for request, _ in self.waiting)

    def set(self, vector: Vector, given: float, ended: float) -> None:
        """Answer all that wait, each with its own times: some may have come long after the first, or after `given`."""
        for request, index in self.waiting:
            begun = max(given, request.since)
            request.set(index, Computed(vector, begun - request.since, ended - begun))

    def fail(self, error: Exception) -> None:
        for request, index in self.waiting:
            request.fail(index, error)


class Recent(Protocol[Vector]):
    """A memory of vectors, such as `service.batching.vector_cache.VectorCache`."""

    def get(self, key: bytes) -> Vector | None:
        """The vector, if it is remembered."""

    def put(self, key: bytes, vector: Vector) -> None:
        """Remember a vector."""


class Batcher(Protocol[RowIn, Vector]):
    """Computes rows, from many requests at once."""

    @property
    def batch_tokens(self) -> int:
        """Tokens at which a batch is full; 0 before the start."""

    @property
    def last_batch_failed(self) -> bool:
        """Whether a device's last batch failed."""

    on_room: Callable[[], None]
    """Called whenever a lane may have more room than before, and when there will never be any again."""

    def admit(self, tokens: int, lane: Lane, ahead: int = 0) -> None:
        """See whether a lane has room for so many tokens, behind those that wait and `ahead` that are to come.

        Raises:
            Overloaded: if it has not.
            Unavailable: if nothing computes any more.
        """

    def overloaded(self, lane: Lane) -> Overloaded:
        """The refusal of a request that a lane has no room for."""

    async def submit(
        self,
        rows: Sequence[RowIn],
        lane: Lane = "interactive",
        timeout_seconds: float | None = None,
        caller: int = 0,
    ) -> list[Computed[Vector]]:
        """The rows' vectors, in order. Cancelling it drops what is still queued. Interactive callers take turns.

        Raises:
            Overloaded: if too much is queued; nothing is computed.
            DeadlineExceeded: if some was still queued when the time was over.
            EncodingError: the first of the rows' own errors, with its index.
            Unavailable: if nothing computes any more.
        """

    async def probe(self, row: RowIn) -> None:
        """Compute a row wherever the last batch failed, whatever waits there.

        Raises:
            EncodingError, Unavailable: if that fails too.
        """


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
        self._queue: Queue[_Input[Row, Vector]] = Queue()
        self._known: dict[tuple[Lane, bytes], _Input[Row, Vector]] = {}
        self._arrival = asyncio.Event()
        self._ended = False
        self._plan: DevicePlan | None = None
        self._memory = MemoryBudget(0)
        self._slowness = 1.0  # seconds that batches take for each second of the cost model
        self._free_at = 0.0  # when the device will have done what was given to it, by the cost model
        self._last_ended = 0.0
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
        """The rows' vectors, in order, each from whatever batch it fitted into.

        A row that waits already in the same lane is computed once for both. Cancelling this drops the rows that are
        still queued and that nobody else waits for; so does its time running out while any of them is. Interactive
        callers take turns. What is `admitted` is queued whatever waits.

        Raises:
            Overloaded: if the lane would hold more than `max_queued_tokens` with them, and holds some; none is queued.
            DeadlineExceeded: if its time ran out.
            EncodingError: the first of the rows' own errors, with its index; the other rows are dropped.
            Unavailable: if the batcher has ended.
        """
        if self._ended:
            raise Unavailable("the server can't compute any more")
        if not admitted:
            self.admit(sum(map(len, rows)), lane)
        done = asyncio.get_running_loop().create_future()
        request: _Request[Vector] = _Request([None] * len(rows), len(rows), done, time.perf_counter())
        awaited: list[_Input[Row, Vector]] = []
        cancelled = False

        def give_up() -> None:
            if any(item.queued for item in awaited) and not request.done.done():
                request.done.set_exception(DeadlineExceeded())

        deadline = asyncio.get_running_loop().call_later(timeout_seconds, give_up) if timeout_seconds else None
        try:
            await self._enqueue(request, rows, lane, caller, awaited)
            if self._ended and not request.done.done():  # meanwhile, and nobody will see what was queued after that
                raise Unavailable("the server can't compute any more")
            await request.done
            return [answer for answer in request.answers if answer is not None]
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
        self,
        request: _Request[Vector],
        rows: Sequence[Row],
        lane: Lane,
        caller: int,
        awaited: list[_Input[Row, Vector]],
    ) -> None:
        """Queue a request's rows as one, and add to `awaited` what it waits for."""
        now = time.perf_counter()
        new: list[_Input[Row, Vector]] = []
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
                        new.append(item)  # it goes at the turn of whichever caller comes first
                else:
                    item = _Input(row, lane, [(request, index)], len(row), now, (caller,))
                    self._known[lane, row.key] = item
                    self._count(item, 1)
                    new.append(item)
                awaited.append(item)
        finally:  # whatever ends this, another request may wait for one of these by now
            self._arriving[lane] -= left
            self._queue.add(new, lane, caller)
            self._arrival.set()
            self.on_room()  # rows that were known already take none

    async def probe(self, row: Row) -> None:
        """Compute a row, whatever waits, to see that the device still does.

        Raises:
            EncodingError, Unavailable: if it does not.
        """
        await self.submit([row], admitted=True)

    def admit(self, tokens: int, lane: Lane, ahead: int = 0) -> None:
        """See whether a lane has room for so many tokens more, behind those that wait and `ahead` that are to come.

        Each lane has a queue of its own, so that bulk can't keep queries out.

        Raises:
            Overloaded: if it has not.
            Unavailable: if the batcher has ended.
        """
        if self._ended:
            raise Unavailable("the server can't compute any more")
        if not has_room(tokens, self.queued_in(lane) + ahead, self._max_queued_tokens):
            raise self.overloaded(lane)

    def overloaded(self, lane: Lane) -> Overloaded:
        """The refusal of a request that a lane has no room for."""
        return Overloaded(self.queued_in(lane), self.retry_seconds())

    def retry_seconds(self) -> float:
        """What a client that finds no room is told to wait."""
        least, most = _RETRY_SECONDS
        return min(max(self.backlog_seconds(), least), most)

    @property
    def batch_tokens(self) -> int:
        """Tokens at which a batch is full; 0 before `run`."""
        return self._plan.limits.batch_tokens if self._plan else 0

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a batch."""
        return sum(map(self.queued_in, LANES))

    def queued_in(self, lane: Lane) -> int:
        """Tokens that wait in one lane."""
        return self._queued[lane][1] + self._arriving[lane]

    def backlog_seconds(self) -> float:
        """How long the device needs for what waits and what it is at, at its present speed."""
        if self._plan is None:
            return 0.0
        at_it = max(self._free_at - time.perf_counter(), 0.0)
        return at_it + self.queued_tokens * self._plan.cost.per_token * self._slowness

    async def run(self, plan: DevicePlan) -> None:
        """Batch and run, for ever. When this ends, whatever the reason, everything that waits is told.

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
                batch = list(dict.fromkeys(take_batch(self._queue, self._limits(plan))))
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
            self.on_room()  # to learn that there will be none

    async def _wait_for_device(self, running: set[asyncio.Task[None]], at_once: int, lead_seconds: float) -> None:
        """Until a batch composed now would not wait for the device long, nor the device for the batch.

        Composing any earlier would let a query that arrives meanwhile miss it.
        """
        while running:
            if len(running) < at_once:
                spare = self._free_at - time.perf_counter() - lead_seconds
                if spare <= 0:
                    return
                await asyncio.wait(running, timeout=spare, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            _raise_failure(running)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._arrival.set()  # `run` may wait for it

    def _limits(self, plan: DevicePlan) -> BatchLimits:
        tokens = self._memory.tokens
        return BatchLimits(min(plan.limits.batch_tokens, tokens), tokens)

    async def _compute(
        self, batch: list[_Input[Row, Vector]], plan: DevicePlan, whole: bool = True, again: bool = True
    ) -> None:
        """Run a batch and answer it; one that fails is run again in halves, down to the input that is to blame.

        So is, alone and once, an input that gets no finite vector, if `again`. What is not the `whole` batch that was
        composed says nothing about the token budget.
        """
        given = time.perf_counter()
        tokens = sum(item.tokens for item in batch)
        expected = plan.cost.seconds(tokens) * self._slowness
        self._free_at = due = max(given, self._free_at) + expected
        try:
            results = await self._in_time([item.row for item in batch], plan.cost.seconds(tokens))
        except DeviceLost as lost:
            for item in batch:
                self._end(item)
                item.fail(lost)
            raise
        except Exception as error:
            failure = error.with_traceback(None)  # which could hold what fills the device's memory
        except BaseException:
            for item in batch:
                self._end(item)
                item.fail(Unavailable("the server stopped while this input was computed"))
            raise
        else:
            if whole:
                self._budget(self._memory.went_well)
            self.last_batch_failed = False
            ended = self._measure(batch, plan, given, due, expected)
            await self._answer(batch, results, plan, given, ended, again)
            return
        self._free_at = time.perf_counter()
        self.last_batch_failed = True
        self._metrics.batch_failures.inc()
        log.warning("a batch of %d inputs failed: %r", len(batch), failure)
        if whole and isinstance(failure, OutOfMemory):
            self._budget(lambda: self._memory.ran_out(tokens, len(batch)))
        await self._after_failure(batch, plan, failure, again)

    async def _in_time(self, rows: list[Row], expected_seconds: float) -> Sequence[Vector | EncodingError]:
        """What the device gives for a batch.

        Raises:
            DeviceLost: if it takes so long that it must hang.
        """
        limit = stuck_after(expected_seconds, self._stuck_batch_seconds)
        try:
            async with asyncio.timeout(limit) as watch:
                return await self._run_batch(rows)
        except TimeoutError as error:
            if not watch.expired():
                raise
            raise DeviceLost(f"the device hangs: a batch of {len(rows)} inputs took over {limit:.0f} s") from error

    def _budget(self, change: Callable[[], None]) -> None:
        """Change the token budget in use by its policy, and tell of it."""
        before = self._memory.tokens
        change()
        if self._memory.tokens != before:
            self._metrics.token_budget.set(self._memory.tokens)
            log.warning("the token budget is %d now, it was %d", self._memory.tokens, before)

    def _measure(
        self, batch: list[_Input[Row, Vector]], plan: DevicePlan, given: float, due: float, expected: float
    ) -> float:
        """Note how long a batch took that has just ended; returns when that was."""
        ended = time.perf_counter()
        seconds = ended - max(given, self._last_ended)  # on the device, without the time behind another batch
        self._last_ended = ended
        self._free_at += ended - due  # what is queued behind this one moves with it
        self._slowness *= 1 + _NEWEST * (min(max(seconds / expected, 0.1), 10.0) - 1)
        self._observe(batch, given, seconds, plan.limits)
        return ended

    async def _answer(
        self,
        batch: list[_Input[Row, Vector]],
        results: Sequence[Vector | EncodingError],
        plan: DevicePlan,
        given: float,
        ended: float,
        again: bool,
    ) -> None:
        alone: list[_Input[Row, Vector]] = []
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
        self, batch: list[_Input[Row, Vector]], plan: DevicePlan, error: Exception, again: bool
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

    def _observe(self, batch: list[_Input[Row, Vector]], given: float, seconds: float, limits: BatchLimits) -> None:
        tokens = sum(item.tokens for item in batch)
        metrics = self._metrics
        metrics.inference_seconds.observe(seconds)
        metrics.batch_inputs.observe(len(batch))
        metrics.batch_tokens.observe(tokens)
        metrics.batch_fill_ratio.observe(tokens / limits.batch_tokens)
        for item in batch:
            self._queue_waits[item.lane].observe(given - item.since)

    def _count(self, item: _Input[Row, Vector], sign: int) -> None:
        inputs_tokens = self._queued[item.lane]
        inputs_tokens[0] += sign
        inputs_tokens[1] += sign * item.tokens

    def _unqueue(self, item: _Input[Row, Vector]) -> None:
        """The input goes into a batch, or nobody wants it any more."""
        if item.queued:
            item.queued = False
            self._count(item, -1)

    def _end(self, item: _Input[Row, Vector]) -> None:
        """No later request can share this input's vector."""
        if self._known.get((item.lane, item.row.key)) is item:
            del self._known[item.lane, item.row.key]

    def _expose(self, lane: Lane) -> None:
        def oldest_seconds() -> float:
            now, heads = time.perf_counter(), self._queue.heads(lane)
            return max((now - item.since for item in heads if item.queued), default=0.0)

        self._metrics.read_queue(lane, lambda: self._queued[lane][0], lambda: self.queued_in(lane), oldest_seconds)


def _raise_failure(running: set[asyncio.Task[None]]) -> None:
    """Forget the batches that have ended. One that fails answers its inputs itself; anything else ends the batcher."""
    for task in [task for task in running if task.done()]:
        running.discard(task)
        task.result()
