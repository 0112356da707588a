"""Front ends and engines over real Unix sockets, in one process and with a stand-in for the device."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest

from service.batching.limits import Limits
from service.device.backend import LocalBackend
from service.embedding.backend import Served
from service.embedding.embedder import Embedder
from service.embedding.requests import EmbedInput, EmbedRequest
from service.errors import EncodingError, NonFiniteEmbedding, Overloaded, ServiceError, Unavailable
from service.metrics import Metrics
from service.processes.engine import Desk, tell_all
from service.processes.frontend import silence_seconds
from service.processes.remote import RemoteBackend
from service.server.app import create_app
from service.settings import Settings
from tests.service.fakes import (
    BREAKS_THE_BATCH,
    NOT_FINITE,
    FakeTokenizer,
    FakeWorker,
    fake_manifest,
    fake_vector,
    rows_of,
    until,
)

MANIFEST = fake_manifest()
SETTINGS = Settings(batch_tokens=100)


class Engine:
    """What `service.processes.engine` runs, but for the process."""

    def __init__(self, front_ends: Iterable[socket.socket], worker: FakeWorker, max_queued_tokens: int) -> None:
        self.worker = worker
        self.metrics = Metrics()
        settings = SETTINGS.model_copy(update={"max_queued_tokens": max_queued_tokens})
        limits = Limits(settings, MANIFEST, "cpu")
        self.backend = LocalBackend(worker, settings, MANIFEST, limits, self.metrics)
        self.desks = [Desk(end, self.backend.batcher, self.metrics) for end in front_ends]
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        for desk in self.desks:
            await desk.link.connect()
        await self.backend.start()
        self.tasks = [asyncio.create_task(self.backend.run()), asyncio.create_task(tell_all(self.desks))]

    async def end(self) -> None:
        """As when its process dies."""
        for task in self.tasks:
            task.cancel()
        for desk in self.desks:
            desk.link.close()
        if self.tasks:
            await asyncio.wait(self.tasks)


class Server:
    """Front ends, each joined to each engine and to each other."""

    def __init__(self, front_ends: int, engines: int, max_queued_tokens: int) -> None:
        pairs = {(front, engine): socket.socketpair() for front in range(front_ends) for engine in range(engines)}
        peers = {
            (left, right): socket.socketpair() for left in range(front_ends) for right in range(left + 1, front_ends)
        }
        self.workers = [FakeWorker() for _ in range(engines)]
        self.engines = [
            Engine((pairs[front, engine][1] for front in range(front_ends)), self.workers[engine], max_queued_tokens)
            for engine in range(engines)
        ]
        self.metrics = [Metrics() for _ in range(front_ends)]
        self.fronts = [
            RemoteBackend(
                [pairs[front, engine][0] for engine in range(engines)],
                [ends[both.index(front)] for both, ends in peers.items() if front in both],
                self.metrics[front],
                max_queued_tokens=max_queued_tokens,
            )
            for front in range(front_ends)
        ]

    async def start(self) -> None:
        for engine in self.engines:
            await engine.start()
        for front in self.fronts:
            await front.start()

    @property
    def computed(self) -> list[list[str]]:
        """The texts that each engine was given."""
        return [[text for batch in worker.batches for text in batch] for worker in self.workers]

    def hold(self) -> None:
        for worker in self.workers:
            worker.gate.clear()

    def go_on(self) -> None:
        for worker in self.workers:
            worker.gate.set()


@asynccontextmanager
async def running(front_ends: int = 1, engines: int = 1, max_queued_tokens: int = 1_000_000) -> AsyncIterator[Server]:
    server = Server(front_ends, engines, max_queued_tokens)
    await server.start()
    try:
        yield server
    finally:
        server.go_on()
        for engine in server.engines:
            await engine.end()
        for front in server.fronts:
            front.stop()
        await until(lambda: all(link.lost for front in server.fronts for link in front.links))


async def test_every_row_gets_its_own_vector() -> None:
    async with running(2, 2) as server:
        requests = [rows_of(*(f"text {request}-{number}" for number in range(7))) for request in range(30)]
        answers = await asyncio.gather(
            *(server.fronts[number % 2].batcher.submit(rows) for number, rows in enumerate(requests))
        )
    for rows, computed in zip(requests, answers, strict=True):
        for row, item in zip(rows, computed, strict=True):
            assert (item.vector == fake_vector(row)).all()
    assert all(server.computed)
    assert sum(map(len, server.computed)) == 210


async def test_a_large_request_goes_to_every_engine_and_keeps_its_order() -> None:
    texts = [f"number {number}" for number in range(2000)]
    async with running(engines=3) as server:
        computed = await server.fronts[0].batcher.submit(rows_of(*texts), "bulk")
        assert (np.stack([item.vector for item in computed]) == np.stack([*map(fake_vector, rows_of(*texts))])).all()
        assert [text for part in server.computed for text in part] == texts
        assert all(len(part) > 500 for part in server.computed)
        # Of less than two batches, in one piece.
        for worker in server.workers:
            worker.batches.clear()
        await server.fronts[0].batcher.submit(rows_of(*texts[:12]), "bulk")
        assert sorted(map(len, server.computed)) == [0, 0, 12]


async def test_what_other_front_ends_have_submitted_counts_as_load() -> None:
    async with running(2, 2) as server:
        left, right = (front.batcher for front in server.fronts)
        server.hold()
        tasks = [asyncio.create_task(left.submit(rows_of("x" * 90)))]  # engine 0, whose turn it is
        await until(lambda: server.computed[0])
        state = server.fronts[1].engines[0]
        await until(lambda: state.load == 91)
        tasks.append(asyncio.create_task(right.submit(rows_of("a"))))  # its turn is engine 0's too
        await until(lambda: server.computed[1] == ["a"])
        server.go_on()
        await asyncio.gather(*tasks)
        await until(lambda: state.load == 0)


async def test_a_client_that_hung_up_costs_no_compute() -> None:
    async with running() as server:
        batcher, engine = server.fronts[0].batcher, server.engines[0]
        server.hold()
        first = asyncio.create_task(batcher.submit(rows_of("first")))
        await until(lambda: server.workers[0].batches)
        gone = asyncio.create_task(batcher.submit(rows_of("gone", "gone too")))
        stays = asyncio.create_task(batcher.submit(rows_of("stays")))
        await until(lambda: engine.backend.batcher.queued_tokens > 15)
        gone.cancel()
        await asyncio.wait({gone})
        await until(lambda: engine.backend.batcher.queued_tokens == len("stays") + 1)
        server.go_on()
        await asyncio.gather(first, stays)
        assert server.computed == [["first", "stays"]]
        await until(lambda: not engine.desks[0].tokens)


async def test_a_front_end_that_is_gone_leaves_nothing_in_the_queue() -> None:
    async with running(2) as server:
        gone, stays = (front.batcher for front in server.fronts)
        queue = server.engines[0].backend.batcher
        server.hold()
        tasks = [asyncio.create_task(gone.submit(rows_of("first")))]
        await until(lambda: server.workers[0].batches)
        tasks.append(asyncio.create_task(gone.submit(rows_of("gone"))))
        await until(lambda: queue.queued_tokens == 5)
        other = asyncio.create_task(stays.submit(rows_of("stays")))
        await until(lambda: queue.queued_tokens == 11)
        for link in server.fronts[0].links:
            link.close()
        await until(lambda: queue.queued_tokens == 6)
        server.go_on()
        await other
        assert server.computed == [["first", "stays"]]
        assert all(isinstance(error, Unavailable) for error in await asyncio.gather(*tasks, return_exceptions=True))


async def test_the_engine_says_when_too_much_is_queued_by_all_front_ends() -> None:
    async with running(2, max_queued_tokens=500) as server:
        left, right = (front.batcher for front in server.fronts)
        server.hold()
        tasks = [asyncio.create_task(left.submit(rows_of("first")))]
        await until(lambda: server.workers[0].batches)
        tasks.append(asyncio.create_task(left.submit(rows_of("x" * 300), "bulk")))
        await until(lambda: server.engines[0].backend.batcher.queued_tokens == 301)
        with pytest.raises(Overloaded) as caught:
            await right.submit(rows_of("y" * 200), "bulk")
        assert caught.value.queued_tokens == 301
        assert 1 <= caught.value.retry_after_seconds <= 60
        tasks.append(asyncio.create_task(right.submit(rows_of("y" * 200))))  # the other lane has room
        server.go_on()
        await asyncio.gather(*tasks)


async def test_those_who_wait_for_room_in_an_engine_are_served_in_the_order_in_which_they_came() -> None:
    async with running(max_queued_tokens=100) as server:
        front, settings = server.fronts[0], Settings(max_queued_tokens=100)
        limits = Limits(settings, MANIFEST, "cpu")
        embedder = Embedder(MANIFEST, FakeTokenizer(), front.batcher, settings, limits, server.metrics[0])

        def asked(text: str, wait_seconds: float = 1e6) -> EmbedRequest:
            return EmbedRequest([EmbedInput(text)], lane="interactive", wait_seconds=wait_seconds)

        server.hold()
        tasks = [asyncio.create_task(embedder.embed(asked("first")))]
        await until(lambda: server.workers[0].batches and not front.engines[0].queued_in("interactive"))
        texts = [f"{number:02}".ljust((7, 45, 25)[number % 3], "x") for number in range(30)]
        for text in texts:
            tasks.append(asyncio.create_task(embedder.embed(asked(text))))
            await asyncio.sleep(0)
        assert front.engines[0].queued_in("interactive") == 88  # known before the engine says so
        with pytest.raises(Overloaded):  # there would be room, but not for those who came later
            await embedder.embed(asked("y", wait_seconds=0.0))
        await until(lambda: server.engines[0].backend.batcher.queued_tokens == 88)
        server.go_on()
        await asyncio.gather(*tasks)
        assert server.computed[0][1:] == texts
        embedder.close()


async def test_callers_take_turns_whichever_front_end_they_ask() -> None:
    async with running(2) as server:
        left, right = (front.batcher for front in server.fronts)
        batcher = server.engines[0].backend.batcher
        server.hold()
        tasks = [asyncio.create_task(left.submit(rows_of("first")))]
        await until(lambda: server.workers[0].batches)
        tasks += [asyncio.create_task(left.submit(rows_of("x" * 50 + c), caller=1)) for c in "abc"]
        await until(lambda: batcher.queued_tokens == 156)
        tasks.append(asyncio.create_task(right.submit(rows_of("y" * 51 + "d"), caller=1)))
        await until(lambda: batcher.queued_tokens == 209)
        tasks.append(asyncio.create_task(right.submit(rows_of("z" * 40), caller=2)))
        await until(lambda: batcher.queued_tokens == 250)
        server.go_on()
        await asyncio.gather(*tasks)
        assert [text[-1] for text in server.computed[0][1:]] == ["a", "z", "b", "c", "d"]


async def test_who_waits_for_room_is_told_when_the_engine_is_lost() -> None:
    async with running(max_queued_tokens=10) as server:
        front, settings = server.fronts[0], Settings(max_queued_tokens=10)
        limits = Limits(settings, MANIFEST, "cpu")
        embedder = Embedder(MANIFEST, FakeTokenizer(), front.batcher, settings, limits, server.metrics[0])
        server.hold()
        tasks = [
            asyncio.create_task(embedder.embed(EmbedRequest([EmbedInput(letter * 9)], lane="bulk", wait_seconds=1e6)))
            for letter in "abcdef"
        ]
        await until(lambda: server.engines[0].backend.batcher.queued_tokens)
        await server.engines[0].end()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 6
        embedder.close()


async def test_where_one_part_is_refused_the_others_are_dropped() -> None:
    async with running(engines=2, max_queued_tokens=500) as server:
        batcher = server.fronts[0].batcher
        server.hold()
        tasks = [asyncio.create_task(batcher.submit(rows_of("x" * 450 + c), "bulk")) for c in "ab"]
        await until(lambda: all(server.computed))
        tasks += [asyncio.create_task(batcher.submit(rows_of("x" * 450 + c), "bulk")) for c in "cd"]
        queues = [engine.backend.batcher for engine in server.engines]
        await until(lambda: all(queue.queued_tokens == 452 for queue in queues))
        server.workers[1].gate.set()  # engine 1 has room again
        await until(lambda: queues[1].queued_tokens == 0)
        await until(lambda: server.fronts[0].engines[1].load == 0)
        with pytest.raises(Overloaded):
            await batcher.submit(rows_of(*(f"{number:0100d}" for number in range(20))), "bulk")
        await until(lambda: not server.engines[1].desks[0].tokens)
        assert queues[0].queued_tokens == 452
        server.go_on()
        await asyncio.gather(*tasks)


async def test_errors_name_the_input_in_whichever_part_it_is() -> None:
    texts = [f"number {number}" for number in range(100)]
    for index in (0, 40, 99):
        async with running(engines=2) as server:
            with pytest.raises(NonFiniteEmbedding) as caught:
                await server.fronts[0].batcher.submit(rows_of(*texts[:index], NOT_FINITE, *texts[index + 1 :]), "bulk")
            assert caught.value.index == index
            assert all(server.computed)


async def test_the_probe_goes_to_the_engine_that_failed() -> None:
    async with running(2, 2) as server:
        batcher, other = (front.batcher for front in server.fronts)
        await batcher.submit(rows_of("a"))
        server.workers[1].broken = True
        with pytest.raises(EncodingError):
            await batcher.submit(rows_of(BREAKS_THE_BATCH))
        assert batcher.last_batch_failed
        await until(lambda: other.last_batch_failed)
        with pytest.raises(EncodingError):
            await other.probe(rows_of("b")[0])
        assert other.last_batch_failed
        server.workers[1].broken = False
        await other.probe(rows_of("b")[0])
        assert server.computed == [["a"], [BREAKS_THE_BATCH, "b", "b"]]
        await until(lambda: not other.last_batch_failed and not batcher.last_batch_failed)


async def test_a_probe_is_computed_whatever_waits() -> None:
    async with running(max_queued_tokens=500) as server:
        batcher = server.fronts[0].batcher
        server.workers[0].broken = True
        with pytest.raises(EncodingError):
            await batcher.submit(rows_of("a"))
        server.workers[0].broken = False
        server.hold()
        tasks = [asyncio.create_task(batcher.submit(rows_of("a")))]
        await until(lambda: server.computed == [["a", "a"]])
        tasks.append(asyncio.create_task(batcher.submit(rows_of("b" * 400))))
        await until(lambda: server.engines[0].backend.batcher.queued_tokens == 401)
        with pytest.raises(Overloaded):
            await batcher.submit(rows_of("c" * 200))
        probe = asyncio.create_task(batcher.probe(rows_of("c" * 200)[0]))
        await until(lambda: server.engines[0].backend.batcher.queued_tokens == 602)
        server.go_on()
        await asyncio.gather(probe, *tasks)


async def test_a_lost_engine_is_told_to_those_who_wait_for_it_and_ends_the_backend() -> None:
    async with running(engines=2) as server:
        front = server.fronts[0]
        run = asyncio.create_task(front.run())
        server.hold()
        waiting = [asyncio.create_task(front.batcher.submit(rows_of(text))) for text in ("a", "b")]
        await until(lambda: all(server.computed))
        await server.engines[1].end()
        with pytest.raises(Unavailable):
            await waiting[1]
        with pytest.raises(Unavailable, match="engine 1"):
            await run
        server.workers[0].gate.set()
        assert len(await waiting[0]) == 1  # nothing is wrong with the other one
        with pytest.raises(Unavailable):
            await asyncio.gather(*(front.batcher.submit(rows_of(text)) for text in "cd"))


async def test_an_engine_lost_before_it_is_ready() -> None:
    ours, theirs = socket.socketpair()
    front = RemoteBackend([ours], [], Metrics())
    starting = asyncio.create_task(front.start())
    await asyncio.sleep(0.01)
    assert not starting.done()
    theirs.close()
    with pytest.raises(Unavailable, match="engine 0"):
        await starting
    front.stop()
    await asyncio.sleep(0.01)


async def test_the_page_of_any_front_end_has_the_sums() -> None:
    async with running(3, 2) as server:
        for number, front in enumerate(server.fronts):
            await front.batcher.submit(rows_of(*(f"{number} {other}" for other in range(number + 1))))
            server.metrics[number].inputs.inc(number + 1)
        pages = [(await front.metrics_page()).decode() for front in server.fronts]
        assert pages[0] == pages[1] == pages[2]
        assert "llm2vec_batch_inputs_sum 6.0" in pages[0]
        assert "llm2vec_inputs_total 6.0" in pages[0]


async def test_without_a_process_s_metrics_there_is_no_page() -> None:
    async with running(2, 1) as server:
        manifest, limits = MANIFEST, Limits(SETTINGS, MANIFEST, "cpu")
        app = create_app(
            Served(SETTINGS, manifest, FakeTokenizer(), limits, server.fronts[0], server.metrics[0]), lambda error: None
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            assert (await client.get("/metrics")).status_code == 200
            server.fronts[1].links[1].close()
            assert (await client.get("/metrics")).status_code == 503


async def test_a_process_that_is_not_up_yet_fails_the_scrape() -> None:
    ours, theirs = socket.socketpair()
    front = RemoteBackend([], [ours], Metrics())
    await front.start()
    with theirs, pytest.raises(ServiceError, match="no metrics"):
        await front.metrics_page()
    front.stop()
    await asyncio.sleep(0.01)


@pytest.mark.parametrize(("setting", "silence"), [(None, 120.0), (0.5, 10.0), (1.0, 10.0), (60.0, 60.0)])
def test_an_engine_that_speaks_every_second_is_not_called_silent(setting: float | None, silence: float) -> None:
    assert silence_seconds(setting) == silence
