from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from model_store.text.tokenizer import TokenizedText
from service.batching.batcher import MicroBatcher
from service.batching.contract import DevicePlan
from service.batching.cost_model import CostModel
from service.batching.memory_budget import CLEAN_BATCHES, STEPS
from service.batching.scheduling import BatchLimits, Lane
from service.batching.vector_cache import VectorCache
from service.embedding.rows import EmbedRow, Vector
from service.errors import DeadlineExceeded, DeviceLost, EncodingError, OutOfMemory, Overloaded, Unavailable
from service.metrics import Metrics
from tests.service.fakes import (
    BREAKS_THE_BATCH,
    COST,
    HANGS,
    NOT_FINITE,
    NOT_FINITE_IN_COMPANY,
    OUT_OF_MEMORY,
    OUT_OF_MEMORY_IN_COMPANY,
    WIDTH,
    FakeWorker,
    fake_vector,
    rows_of,
    until,
)

Batcher = MicroBatcher[EmbedRow, Vector]


def plan(batch_tokens: int = 100, lead_seconds: float = 0.0, cost: CostModel = COST) -> DevicePlan:
    return DevicePlan(cost, BatchLimits(batch_tokens, 10_000), lead_seconds)


@asynccontextmanager
async def running(worker: FakeWorker, batch_tokens: int = 100) -> AsyncIterator[Batcher]:
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics())
    task = asyncio.create_task(batcher.run(plan(batch_tokens)))
    try:
        yield batcher
    finally:
        task.cancel()
        await asyncio.wait({task})


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


async def test_only_what_failed_alone_is_to_blame_whoever_of_its_batch_hung_up_meanwhile() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker) as batcher:
        stays = asyncio.create_task(batcher.submit(rows_of(OUT_OF_MEMORY_IN_COMPANY)))
        gone = asyncio.create_task(batcher.submit(rows_of("gone")))
        await until(lambda: worker.batches == [[OUT_OF_MEMORY_IN_COMPANY, "gone"]])
        gone.cancel()
        await asyncio.wait({gone})
        worker.gate.set()
        (computed,) = await stays
    assert (computed.vector == fake_vector(rows_of(OUT_OF_MEMORY_IN_COMPANY)[0])).all()
    assert worker.batches[1:] == [[OUT_OF_MEMORY_IN_COMPANY]]


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
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics())
    run = asyncio.create_task(batcher.run(plan(batch_tokens=3)))
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


async def test_a_lane_takes_no_more_than_it_may_hold() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics(), max_queued_tokens=20)
    run = asyncio.create_task(batcher.run(plan()))
    tasks = [asyncio.create_task(batcher.submit(rows_of("first")))]
    await until(lambda: worker.batches)
    # One that is too large in itself has its turn where nothing waits; nothing goes behind it.
    tasks.append(asyncio.create_task(batcher.submit(rows_of("x" * 30), "bulk")))
    await until(lambda: batcher.queued_in("bulk") == 31)
    with pytest.raises(Overloaded) as caught:
        await batcher.submit(rows_of("y"), "bulk")
    assert caught.value.queued_tokens == 31
    assert 1 <= caught.value.retry_after_seconds <= 60
    tasks.append(asyncio.create_task(batcher.submit(rows_of("q" * 9, "r" * 9))))
    await until(lambda: batcher.queued_in("interactive") == 20)
    with pytest.raises(Overloaded):
        await batcher.submit(rows_of("s"))
    probe = asyncio.create_task(batcher.probe(rows_of("s")[0]))
    await until(lambda: batcher.queued_in("interactive") == 22)
    worker.gate.set()
    await asyncio.gather(probe, *tasks)
    assert not batcher.queued_tokens
    run.cancel()
    await asyncio.wait({run})


async def test_of_many_at_once_only_those_are_queued_that_have_room() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics(), max_queued_tokens=20)
    requests = [asyncio.create_task(batcher.submit(rows_of(f"{number:04}"))) for number in range(10)]
    await asyncio.sleep(0.01)
    assert batcher.queued_tokens == 20
    run = asyncio.create_task(batcher.run(plan()))
    worker.gate.set()
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    assert [isinstance(outcome, Overloaded) for outcome in outcomes] == [False] * 4 + [True] * 6
    run.cancel()
    await asyncio.wait({run})


async def test_small_requests_pass_bulk_in_the_queue() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker, batch_tokens=20) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches)
        bulk = asyncio.create_task(batcher.submit(rows_of(*(f"text {i}" for i in range(40))), "bulk"))
        await until(lambda: batcher.queued_tokens > 100)
        query = asyncio.create_task(batcher.submit(rows_of("query")))
        await until(lambda: batcher.queued_tokens > 312)
        worker.gate.set()
        await asyncio.gather(first, bulk, query)
    assert "query" in worker.batches[1]
    assert "text 0" in worker.batches[1]


async def test_a_caller_s_single_query_does_not_wait_behind_another_s_thousand() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker, batch_tokens=20) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches)
        greedy = [asyncio.create_task(batcher.submit(rows_of(f"{number:04}"), caller=1)) for number in range(1000)]
        await until(lambda: batcher.queued_tokens == 5000)
        single = asyncio.create_task(batcher.submit(rows_of("single"), caller=2))
        await until(lambda: batcher.queued_tokens == 5007)
        worker.gate.set()
        await asyncio.gather(first, single, *greedy)
    assert worker.batches[1] == ["0000", "single", "0001"]
    assert [text for batch in worker.batches[2:] for text in batch] == [f"{number:04}" for number in range(2, 1000)]


async def test_a_row_that_two_callers_wait_for_is_computed_at_the_earlier_turn() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker, batch_tokens=20) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches)
        greedy = [asyncio.create_task(batcher.submit(rows_of(f"{number:04}"), caller=1)) for number in range(100)]
        await until(lambda: batcher.queued_tokens == 500)
        others = [asyncio.create_task(batcher.submit(rows_of(text), caller=2)) for text in ("0099", "0000")]
        await asyncio.sleep(0)
        assert batcher.queued_tokens == 500
        worker.gate.set()
        answers = await asyncio.gather(first, *greedy, *others)
    assert worker.batches[1] == ["0000", "0099", "0001"]
    assert sorted(text for batch in worker.batches[1:] for text in batch) == [f"{number:04}" for number in range(100)]
    for text, (computed,) in zip(("0099", "0000"), answers[-2:], strict=True):
        assert (computed.vector == fake_vector(rows_of(text)[0])).all()
    assert batcher.queued_tokens == 0


async def test_equal_rows_that_wait_are_computed_once() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker, batch_tokens=1000) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches)
        left = asyncio.create_task(batcher.submit(rows_of("same", "left", "same")))
        right = asyncio.create_task(batcher.submit(rows_of("right", "same")))
        late = asyncio.create_task(batcher.submit(rows_of("first")))  # what is computed now is shared too
        await until(lambda: batcher.queued_tokens == len("same" + "left" + "right") + 3)
        worker.gate.set()
        answers = await asyncio.gather(first, left, right, late)
    assert [sorted(batch) for batch in worker.batches] == [["first"], ["left", "right", "same"]]
    for texts, computed in zip(
        (["first"], ["same", "left", "same"], ["right", "same"], ["first"]), answers, strict=True
    ):
        for row, item in zip(rows_of(*texts), computed, strict=True):
            assert (item.vector == fake_vector(row)).all()


async def test_rows_of_another_width_are_not_equal() -> None:
    worker = FakeWorker()
    text = rows_of("same")[0].text
    async with running(worker) as batcher:
        wide, narrow = await asyncio.gather(
            batcher.submit([EmbedRow(text, WIDTH)]), batcher.submit([EmbedRow(text, 3)])
        )
    assert (len(wide[0].vector), len(narrow[0].vector)) == (WIDTH, 3)


async def test_one_of_two_that_share_a_row_hangs_up() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches)
        gone = asyncio.create_task(batcher.submit(rows_of("same")))
        await until(lambda: batcher.queued_tokens)
        stays = asyncio.create_task(batcher.submit(rows_of("same")))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.wait({gone})
        assert batcher.queued_tokens == 5
        worker.gate.set()
        await asyncio.gather(first, stays)
        worker.gate.clear()
        # And where both do, nothing is left of it.
        blocker = asyncio.create_task(batcher.submit(rows_of("blocker")))
        await until(lambda: len(worker.batches) == 3)
        both = [asyncio.create_task(batcher.submit(rows_of("shared"))) for _ in range(2)]
        await until(lambda: batcher.queued_tokens)
        await asyncio.sleep(0.01)
        for task in both:
            task.cancel()
        await asyncio.wait(both)
        assert batcher.queued_tokens == 0
        worker.gate.set()
        await blocker
    assert worker.batches == [["first"], ["same"], ["blocker"]]


async def test_an_error_that_two_requests_share_names_each_one_s_own_index() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker) as batcher:
        blocker = asyncio.create_task(batcher.submit(rows_of("blocker")))
        await until(lambda: worker.batches)
        left = asyncio.create_task(batcher.submit(rows_of("a", NOT_FINITE)))
        right = asyncio.create_task(batcher.submit(rows_of("b", "c", "d", NOT_FINITE)))
        await until(lambda: batcher.queued_tokens > 20)
        worker.gate.set()
        outcomes = await asyncio.gather(left, right, return_exceptions=True)
        await blocker
    assert [error.index for error in outcomes if isinstance(error, EncodingError)] == [1, 3]


async def test_remembered_vectors_are_not_computed() -> None:
    worker = FakeWorker()
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics(), VectorCache(10_000))
    task = asyncio.create_task(batcher.run(plan()))
    await batcher.submit(rows_of("a", "b"))
    computed = await batcher.submit(rows_of("b", "c", "a"))
    assert worker.batches == [["a", "b"], ["c"]]
    for row, item in zip(rows_of("b", "c", "a"), computed, strict=True):
        assert (item.vector == fake_vector(row)).all()
    assert await batcher.submit(rows_of("a"))
    task.cancel()
    await asyncio.wait({task})


async def test_where_the_device_can_queue_the_next_batch_is_composed_shortly_before_it_is_free() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics())
    cost = CostModel(floor=0.2, base=0.2, per_token=1e-9)
    task = asyncio.create_task(batcher.run(plan(lead_seconds=0.1, cost=cost)))
    tasks = [asyncio.create_task(batcher.submit(rows_of("a")))]
    await until(lambda: len(worker.batches) == 1)
    tasks.append(asyncio.create_task(batcher.submit(rows_of("b"))))
    await asyncio.sleep(0.02)
    assert len(worker.batches) == 1  # the device is busy for long yet: who comes now may still go along
    tasks.append(asyncio.create_task(batcher.submit(rows_of("c"))))
    await until(lambda: len(worker.batches) == 2)
    assert worker.batches[1] == ["b", "c"]
    tasks.append(asyncio.create_task(batcher.submit(rows_of("d"))))
    await asyncio.sleep(0.3)
    assert len(worker.batches) == 2  # never two ahead
    worker.gate.set()
    await asyncio.gather(*tasks)
    task.cancel()
    await asyncio.wait({task})


async def test_backlog_follows_what_batches_take() -> None:
    worker = FakeWorker()
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics())
    assert batcher.backlog_seconds() == 0.0
    cost = CostModel(floor=0.0, base=0.0, per_token=1.0)
    task = asyncio.create_task(batcher.run(plan(cost=cost)))
    worker.gate.clear()
    first = asyncio.create_task(batcher.submit(rows_of("a")))
    await until(lambda: worker.batches)
    second = asyncio.create_task(batcher.submit(rows_of("123456789")))
    await until(lambda: batcher.queued_tokens)
    assert 11 < batcher.backlog_seconds() <= 12  # 2 tokens at work and 10 that wait, a second each
    worker.gate.set()
    await asyncio.gather(first, second)
    for number in range(40):
        await batcher.submit(rows_of(str(number)))
    worker.gate.clear()
    third = asyncio.create_task(batcher.submit(rows_of("b")))
    await until(lambda: len(worker.batches) == 43)
    assert batcher.backlog_seconds() < 1  # it was far quicker than the model said
    worker.gate.set()
    await third
    task.cancel()
    await asyncio.wait({task})


async def together(worker: FakeWorker, batcher: Batcher, *texts: str) -> list[Any]:
    """What a request for each text comes to, where all of them share a batch."""
    worker.gate.clear()
    before = len(worker.batches)
    blocker = asyncio.create_task(batcher.submit(rows_of("blocker")))
    await until(lambda: len(worker.batches) > before)
    tasks = [asyncio.create_task(batcher.submit(rows_of(text))) for text in texts]
    await until(lambda: batcher.queued_tokens >= sum(map(len, texts)) + len(texts))
    worker.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await blocker
    return outcomes


def assert_vectors(outcomes: list[Any], *texts: str) -> None:
    for text, outcome in zip(texts, outcomes, strict=True):
        assert (outcome[0].vector == fake_vector(rows_of(text)[0])).all()


async def test_a_vector_that_is_not_finite_is_computed_alone_once_more() -> None:
    worker = FakeWorker()
    async with running(worker, batch_tokens=1000) as batcher:
        outcomes = await together(worker, batcher, "a", NOT_FINITE_IN_COMPANY, NOT_FINITE, "b")
    assert_vectors([*outcomes[:2], outcomes[3]], "a", NOT_FINITE_IN_COMPANY, "b")
    assert isinstance(outcomes[2], EncodingError)
    assert worker.batches[2:] == [[NOT_FINITE_IN_COMPANY], [NOT_FINITE]]  # and no third time


async def test_a_batch_that_runs_out_of_memory_is_split_and_the_next_are_smaller_for_a_while() -> None:
    worker, metrics = FakeWorker(), Metrics()
    batcher: Batcher = MicroBatcher(worker.run_batch, metrics)
    limits = BatchLimits(batch_tokens=2000, token_budget=2000)
    run = asyncio.create_task(batcher.run(DevicePlan(COST, limits)))
    texts = [OUT_OF_MEMORY_IN_COMPANY, *(f"{number} {'long ' * 50}" for number in range(7))]
    assert_vectors(await together(worker, batcher, *texts), *texts)

    def budget() -> float:
        return next(value for _, name, _, value in metrics.samples() if name == "llm2vec_token_budget")

    def splits() -> float:
        return next(value for _, name, _, value in metrics.samples() if name == "llm2vec_oom_splits_total")

    tokens = sum(map(len, rows_of(*texts)))
    assert budget() == tokens // 2
    assert splits() == 3  # of 8, 4 and 2 texts
    before = len(worker.batches)
    assert_vectors(await together(worker, batcher, *texts[1:]), *texts[1:])
    assert [len(batch) for batch in worker.batches[before + 1 :]] == [3, 3, 1]
    for number in range(CLEAN_BATCHES):
        await batcher.submit(rows_of(f"{number}"))
    assert tokens // 2 < budget() < 2000
    for number in range(CLEAN_BATCHES * STEPS):
        await batcher.submit(rows_of(f"{number}"))
    assert budget() == 2000
    run.cancel()
    await asyncio.wait({run})


async def test_one_input_too_large_for_the_memory_leaves_the_budget_alone() -> None:
    worker, metrics = FakeWorker(), Metrics()
    batcher: Batcher = MicroBatcher(worker.run_batch, metrics)
    run = asyncio.create_task(batcher.run(plan()))
    with pytest.raises(OutOfMemory):
        await batcher.submit(rows_of(OUT_OF_MEMORY))
    samples = {name: value for _, name, _, value in metrics.samples()}
    assert (samples["llm2vec_token_budget"], samples["llm2vec_oom_splits_total"]) == (10_000, 0)
    run.cancel()
    await asyncio.wait({run})


async def test_a_device_that_hangs_ends_the_batcher_and_everybody_is_told() -> None:
    worker = FakeWorker()
    batcher: Batcher = MicroBatcher(worker.run_batch, Metrics(), stuck_batch_seconds=0.2)
    run = asyncio.create_task(batcher.run(plan(batch_tokens=10)))
    hung = asyncio.create_task(batcher.submit(rows_of("a", HANGS)))
    await until(lambda: worker.batches)
    queued = asyncio.create_task(batcher.submit(rows_of("b", "c" * 20)))
    with pytest.raises(DeviceLost, match="2 inputs"):
        await run
    for task in (hung, queued):
        with pytest.raises(Unavailable):
            await task
    assert not batcher.queued_tokens


async def test_a_device_that_hangs_on_the_only_request_there_is_ends_the_batcher() -> None:
    batcher: Batcher = MicroBatcher(FakeWorker().run_batch, Metrics(), stuck_batch_seconds=0.05)
    run = asyncio.create_task(batcher.run(plan()))
    with pytest.raises(DeviceLost):
        await batcher.submit(rows_of(HANGS))
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(run, 10)


async def test_a_request_that_is_being_queued_when_the_batcher_ends_is_told() -> None:
    remembered = VectorCache(1_000_000)
    texts = [f"{number}" for number in range(500)]
    rows = rows_of(*texts)
    for row in rows[:400]:
        remembered.put(row.key, fake_vector(row))
    batcher: Batcher = MicroBatcher(FakeWorker().run_batch, Metrics(), remembered)
    run = asyncio.create_task(batcher.run(plan()))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(batcher.submit(rows))
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, 10)


async def test_what_was_cancelled_leaves_the_memory_while_the_device_is_busy() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches == [["first"]])
        kept = asyncio.create_task(batcher.submit(rows_of("kept"), "bulk"))
        rows = [[EmbedRow(TokenizedText([1, number, other], 1), WIDTH) for other in range(20)] for number in range(50)]
        alive = [weakref.ref(row) for some in rows for row in some]
        lanes: list[Lane] = ["interactive", "bulk"]
        tasks = [asyncio.create_task(batcher.submit(some, lanes[n % 2])) for n, some in enumerate(rows)]
        await until(lambda: batcher.queued_tokens == 3000 + len("kept") + 1)
        del rows
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        del tasks, task
        gc.collect()
        assert sum(row() is not None for row in alive) <= 300
        worker.gate.set()
        await asyncio.gather(first, kept)


async def test_who_joins_a_row_that_waits_has_its_own_wait() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    async with running(worker) as batcher:
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: worker.batches == [["first"]])
        early = asyncio.create_task(batcher.submit(rows_of("shared")))
        await asyncio.sleep(0.1)
        late = asyncio.create_task(batcher.submit(rows_of("shared")))
        await until(lambda: sum(len(item.waiting) for item in batcher._known.values()) == 3)
        worker.gate.set()
        (one,), (other,) = await early, await late
        await first
    assert one.queue_seconds - other.queue_seconds >= 0.09
    assert other.queue_seconds >= 0


async def test_only_who_is_cancelled_counts_as_cancelled() -> None:
    worker, metrics = FakeWorker(), Metrics()
    worker.gate.clear()
    batcher: Batcher = MicroBatcher(worker.run_batch, metrics)
    task = asyncio.create_task(batcher.run(plan()))
    first = asyncio.create_task(batcher.submit(rows_of("first")))
    await until(lambda: worker.batches == [["first"]])
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(rows_of("a", "b"), timeout_seconds=0.01)
    counted = metrics.cancelled.labels("queued")._value
    assert counted.get() == 0
    gone = asyncio.create_task(batcher.submit(rows_of("c", "d")))
    await until(lambda: batcher.queued_tokens == 4)
    gone.cancel()
    await asyncio.wait({gone})
    assert counted.get() == 2
    worker.gate.set()
    await first
    task.cancel()
    await asyncio.wait({task})
