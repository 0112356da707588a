from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from model_store.tokenizer import TokenizedText
from service.batcher import MicroBatcher, Waiting, take_batch
from service.embedder import Vector
from service.errors import EncodingError, OutOfMemory, Unavailable
from service.metrics import Metrics
from tests.service.fakes import (
    BREAKS_THE_BATCH,
    NOT_FINITE,
    OUT_OF_MEMORY,
    FakeTokenizer,
    FakeWorker,
    fake_vector,
)

Batcher = MicroBatcher[TokenizedText, Vector]


def rows_of(*texts: str) -> list[TokenizedText]:
    return FakeTokenizer().encode_batch(texts, [""] * len(texts))


class Item:
    """A queued input of so many tokens; gone: its client hung up."""

    def __init__(self, tokens: int, gone: bool = False) -> None:
        self.tokens = tokens
        self.answer = self
        self._gone = gone

    def done(self) -> bool:
        return self._gone


@pytest.mark.parametrize(
    ("queue", "batch_tokens", "taken", "left"),
    [
        ([], 10, [], []),
        ([3], 10, [3], []),
        ([3, 4, 3], 10, [3, 4, 3], []),
        ([3, 4, 4], 10, [3, 4], [4]),
        ([3, 8, 1], 10, [3], [8, 1]),  # oldest first: a later one that would fit does not overtake
        ([50], 10, [50], []),  # longer than a batch: alone
        ([50, 1], 10, [50], [1]),
        ([1, 50], 10, [1], [50]),
        ([10, 1], 10, [10], [1]),
    ],
)
def test_take_batch(queue: list[int], batch_tokens: int, taken: list[int], left: list[int]) -> None:
    waiting = deque(Item(tokens) for tokens in queue)
    assert [item.tokens for item in take_batch(waiting, batch_tokens)] == taken
    assert [item.tokens for item in waiting] == left


def test_take_batch_drops_those_nobody_waits_for() -> None:
    waiting = deque([Item(9, gone=True), Item(3), Item(9, gone=True), Item(4), Item(9)])
    assert [item.tokens for item in take_batch(waiting, 10)] == [3, 4]
    assert [item.tokens for item in waiting] == [9]


@asynccontextmanager
async def running(worker: FakeWorker, batch_tokens: int = 100) -> AsyncIterator[Batcher]:
    batcher: Batcher = MicroBatcher(worker.run_batch, batch_tokens, Metrics())
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


async def test_every_row_gets_its_own_vector() -> None:
    worker = FakeWorker()
    async with running(worker, batch_tokens=20) as batcher:
        requests = [rows_of(*(f"text {i}-{j}" for j in range(7))) for i in range(5)]
        answers = await asyncio.gather(*(batcher.submit(rows) for rows in requests))
    for rows, computed in zip(requests, answers, strict=True):
        for row, item in zip(rows, computed, strict=True):
            assert (item.vector == fake_vector(row)).all()
    assert batcher.queued_tokens == 0
    assert all(sum(len(text) + 1 for text in batch) <= 20 for batch in worker.batches)


async def test_leaves_at_once_when_idle_and_gathers_while_busy() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("a")))
        await until(lambda: worker.batches == [["a"]])
        others = [asyncio.create_task(batcher.submit(rows_of(text))) for text in "bcd"]
        await until(lambda: batcher.queued_tokens == 6)
        assert worker.batches == [["a"]]
        worker.gate.set()
        await asyncio.gather(first, *others)
    assert worker.batches == [["a"], ["b", "c", "d"]]


@pytest.mark.parametrize(
    ("bad", "kind"), [(BREAKS_THE_BATCH, EncodingError), (OUT_OF_MEMORY, OutOfMemory), (NOT_FINITE, EncodingError)]
)
async def test_a_bad_input_fails_alone(bad: str, kind: type[Exception]) -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker, batch_tokens=1000) as batcher:
        blocker = asyncio.create_task(batcher.submit(rows_of("blocker")))
        await until(lambda: worker.batches)
        tasks = [asyncio.create_task(batcher.submit(rows_of(text))) for text in ("a", "b", bad, "c", "d", "e")]
        await until(lambda: batcher.queued_tokens > 10)
        worker.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await blocker
    assert len(worker.batches[1]) == 6  # they did share a batch
    for text, outcome in zip(("a", "b", bad, "c", "d", "e"), outcomes, strict=True):
        if text == bad:
            assert isinstance(outcome, kind)
        else:
            assert not isinstance(outcome, BaseException)
            assert (outcome[0].vector == fake_vector(rows_of(text)[0])).all()


async def test_the_error_says_which_of_the_inputs_it_was() -> None:
    async with running(FakeWorker()) as batcher:
        with pytest.raises(EncodingError) as caught:
            await batcher.submit(rows_of("a", "b", NOT_FINITE, "c"))
    assert caught.value.index == 2


async def test_a_client_that_hung_up_costs_no_compute() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches)
        gone = asyncio.create_task(batcher.submit(rows_of("gone", "gone too")))
        stays = asyncio.create_task(batcher.submit(rows_of("stays")))
        await until(lambda: batcher.queued_tokens > 15)
        gone.cancel()
        await asyncio.wait({gone})
        assert batcher.queued_tokens == len("stays") + 1
        worker.gate.set()
        await asyncio.gather(first, stays)
    assert worker.batches == [["first"], ["stays"]]


async def test_when_it_ends_everything_that_waits_is_told() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    batcher: Batcher = MicroBatcher(worker.run_batch, 3, Metrics())
    run = asyncio.create_task(batcher.run())
    computing = asyncio.create_task(batcher.submit(rows_of("a")))
    await until(lambda: worker.batches)
    queued = asyncio.create_task(batcher.submit(rows_of("b")))
    await until(lambda: batcher.queued_tokens)
    run.cancel()
    for task in (computing, queued):
        with pytest.raises(Unavailable):
            await task
    with pytest.raises(Unavailable):
        await batcher.submit(rows_of("c"))


def test_waiting_counts_tokens() -> None:
    loop = asyncio.new_event_loop()
    try:
        assert Waiting(rows_of("abc")[0], loop.create_future()).tokens == 4
    finally:
        loop.close()
