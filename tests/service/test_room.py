"""The line of those who wait for room: its order, how often they try, and what ends a wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from service.batching.batcher import MicroBatcher
from service.batching.limits import Limits
from service.batching.room import Line, has_room
from service.batching.scheduling import Lane
from service.embedding.embedder import Embedder
from service.embedding.requests import EmbedInput, EmbedRequest
from service.embedding.rows import EmbedRow, Vector
from service.errors import DeadlineExceeded, Overloaded, Unavailable
from service.metrics import Metrics
from service.settings import Settings
from tests.service.fakes import FakeTokenizer, FakeWorker, fake_manifest, until
from tests.service.test_batcher import plan

FOR_EVER = 1e6


@dataclass
class Room:
    """So much room, and a line before it."""

    room: int = 0
    attempts: int = 0
    line: Line = field(default_factory=Line)
    entered: list[int] = field(default_factory=list)

    def enter(self, size: int) -> Callable[[], int]:
        def attempt() -> int:
            self.attempts += 1
            if size > self.room:
                raise Overloaded(0, 1.0)
            self.room -= size
            self.entered.append(size)
            return size

        return attempt

    def wait(self, size: int, since: float, seconds: float = FOR_EVER) -> asyncio.Task[int]:
        return asyncio.create_task(self.line.wait(since, self.enter(size), seconds))

    async def grow(self, by: int) -> None:
        self.room += by
        self.line.call()
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("tokens", "waiting", "most", "room"),
    [(5, 0, 3, True), (5, 1, 5, False), (4, 1, 5, True), (10**9, 10**9, None, True)],
)
def test_has_room(tokens: int, waiting: int, most: int | None, room: bool) -> None:
    assert has_room(tokens, waiting, most) is room


async def test_a_small_one_does_not_overtake_a_large_one() -> None:
    room = Room()
    tasks = [room.wait(size, since) for since, size in enumerate([5, 1, 2])]
    await room.grow(3)
    assert room.entered == []
    await room.grow(3)
    assert room.entered == [5, 1]
    await room.grow(9)
    assert await asyncio.gather(*tasks) == [5, 1, 2]


async def test_who_joins_again_stands_where_it_stood() -> None:
    room = Room()
    tasks = [room.wait(size, since) for size, since in ((3, 3.0), (1, 1.0), (2, 2.0))]
    await asyncio.sleep(0)
    assert room.line.is_before(1.5)
    assert not room.line.is_before(0.5)
    await room.grow(6)
    await asyncio.gather(*tasks)
    assert room.entered == [1, 2, 3]
    assert not room.line.is_before(FOR_EVER)


@pytest.mark.parametrize("how", ["cancelled", "time"])
async def test_when_a_large_first_one_leaves_the_next_tries(how: str) -> None:
    room = Room(room=2)
    large = room.wait(5, 0.0, 0.01 if how == "time" else FOR_EVER)
    small = room.wait(1, 1.0)
    await asyncio.sleep(0)
    if how == "cancelled":
        large.cancel()
    assert await small == 1
    assert room.attempts == 1
    with pytest.raises(TimeoutError if how == "time" else asyncio.CancelledError):
        await large


async def test_one_that_is_called_and_cancelled_passes_the_call_on() -> None:
    room = Room()
    first, second = room.wait(1, 0.0), room.wait(1, 1.0)
    await asyncio.sleep(0)
    room.room = 1
    room.line.call()
    first.cancel()
    assert await second == 1
    assert room.entered == [1]


async def test_a_thousand_try_about_once_for_each_change_of_the_room() -> None:
    room = Room()
    tasks = [room.wait(1, since) for since in range(1000)]
    await asyncio.sleep(0)
    for _ in range(300):
        await room.grow(0)
    assert room.attempts == 300
    for _ in range(250):
        await room.grow(4)
    assert [task.done() for task in tasks] == [True] * 1000
    assert room.attempts <= 300 + 1000 + 250


class Counting(MicroBatcher[EmbedRow, Vector]):
    """Counts what is asked of it, and its calls that there may be room."""

    attempts = 0
    events = 0

    def admit(self, tokens: int, lane: Lane, ahead: int = 0) -> None:
        self.attempts += 1
        super().admit(tokens, lane, ahead)


@asynccontextmanager
async def embedder(max_queued_tokens: int) -> AsyncIterator[tuple[Embedder, Counting, FakeWorker]]:
    """An embedder whose device waits for the worker's gate, and is at one input."""
    metrics, manifest, worker = Metrics(), fake_manifest(), FakeWorker()
    settings = Settings(max_queued_tokens=max_queued_tokens)
    batcher = Counting(worker.run_batch, metrics, None, max_queued_tokens)
    one = Embedder(manifest, FakeTokenizer(), batcher, settings, Limits(settings, manifest, "cpu"), metrics)
    call_lines = batcher.on_room

    def count_and_call() -> None:
        batcher.events += 1
        call_lines()

    batcher.on_room = count_and_call
    worker.gate.clear()
    run = asyncio.create_task(batcher.run(plan()))
    first = asyncio.create_task(one.embed(asked("first")))
    await until(lambda: worker.batches)
    yield one, batcher, worker
    worker.gate.set()
    await asyncio.wait({first})
    run.cancel()
    await asyncio.wait({run})
    one.close()


def asked(
    text: str, wait_seconds: float = FOR_EVER, timeout_seconds: float | None = None, lane: Lane = "bulk"
) -> EmbedRequest:
    return EmbedRequest([EmbedInput(text)], lane=lane, wait_seconds=wait_seconds, timeout_seconds=timeout_seconds)


async def test_requests_are_queued_in_the_order_in_which_they_came() -> None:
    async with embedder(max_queued_tokens=100) as (one, batcher, worker):
        texts = [f"{number:02}".ljust((7, 45, 25)[number % 3], "x") for number in range(30)]
        tasks = []
        for text in texts:
            tasks.append(asyncio.create_task(one.embed(asked(text, lane="interactive"))))
            await asyncio.sleep(0)
        assert batcher.queued_tokens
        with pytest.raises(Overloaded):  # there would be room, but not for those who came later
            await one.embed(asked("y", wait_seconds=0.0, lane="interactive"))
        worker.gate.set()
        await asyncio.gather(*tasks)
    assert [text for batch in worker.batches[1:] for text in batch] == texts


async def test_a_thousand_that_wait_try_a_few_times_for_each_change_of_the_room() -> None:
    async with embedder(max_queued_tokens=300) as (one, batcher, worker):
        tasks = [asyncio.create_task(one.embed(asked(f"{number:07}"))) for number in range(300)]
        await until(lambda: batcher.queued_tokens == 296)
        before = batcher.attempts
        await asyncio.sleep(0.1)
        assert batcher.attempts == before  # nothing happens while nothing changes
        batcher.attempts = batcher.events = 0
        worker.gate.set()
        await asyncio.gather(*tasks)
        # An attempt in each of two lines and two checks of each request that goes in, and one for each event.
        assert batcher.attempts <= 2 * batcher.events + 4 * len(tasks)


async def test_the_deadline_ends_a_wait_and_so_does_patience() -> None:
    async with embedder(max_queued_tokens=10) as (one, batcher, _):
        queued = asyncio.create_task(one.embed(asked("x" * 9)))
        await until(lambda: batcher.queued_tokens)
        with pytest.raises(DeadlineExceeded):
            await one.embed(asked("a", timeout_seconds=0.01))
        with pytest.raises(Overloaded):
            await one.embed(asked("b", wait_seconds=0.01))
        gone = asyncio.create_task(one.embed(asked("c")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait({gone})
        assert gone.cancelled()
        queued.cancel()
        await asyncio.wait({queued})
        assert not batcher.queued_tokens


async def test_who_waits_is_told_when_nothing_computes_any_more() -> None:
    metrics, manifest, settings = Metrics(), fake_manifest(), Settings(max_queued_tokens=10)
    worker = FakeWorker()
    worker.gate.clear()
    batcher: MicroBatcher[EmbedRow, Vector] = MicroBatcher(worker.run_batch, metrics, None, 10)
    one = Embedder(manifest, FakeTokenizer(), batcher, settings, Limits(settings, manifest, "cpu"), metrics)
    run = asyncio.create_task(batcher.run(plan()))
    tasks = [asyncio.create_task(one.embed(asked("first")))]
    await until(lambda: worker.batches)
    tasks += [asyncio.create_task(one.embed(asked(letter * 9))) for letter in "abcdef"]
    await until(lambda: batcher.queued_tokens)
    run.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 7
    one.close()
