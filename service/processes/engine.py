"""An engine process: one device, its worker and its queue. `python -m service.processes.engine FD`

It serves all front ends. It ends when its supervisor says so or is gone, or after a failure. It ignores signals, as the
front ends need it until their last answer.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

import uvloop

from service.batching.batcher import MicroBatcher
from service.batching.scheduling import LANES
from service.device import watchdog
from service.device.backend import LocalBackend, Worker
from service.embedding.rows import EmbedRow, Vector
from service.errors import ServiceError
from service.logs import log, unexplained
from service.metrics import Metrics
from service.processes.child import Assignment, Child, inherited
from service.processes.link import Link
from service.processes.wire import Cancel, Failed, Message, State, Submit, vectors_in_parts
from service.server.startup import settle

# Time for the last answers to leave the process, after the device hangs.
_LAST_WORDS_SECONDS = 0.2

# How old a front end's knowledge of the other front ends' load may be.
_TELL_SECONDS = 0.02

# How often an engine without news says that it is alive.
_ALIVE_SECONDS = 1.0

# Rows made from their keys between two turns of the event loop: a millisecond or two.
_ROWS_AT_ONCE = 256

MakeWorker = Callable[[Assignment, Metrics], Worker]


class Desk:
    """Serves one front end: puts what it submits into the queue that all front ends share."""

    def __init__(self, end: socket.socket, batcher: MicroBatcher[EmbedRow, Vector], metrics: Metrics) -> None:
        self.link = Link("front end", end, metrics, self._take, self._drop_all)
        self.tokens = 0  # submitted, but not answered yet
        self._submissions = 0  # number of submissions received
        self._coming: set[int] = set()  # the received submissions that are not in the queue yet
        self._batcher = batcher
        self._others_tokens = 0
        self._told: State | None = None
        self._tell_again = 0.0
        self._work: dict[int, asyncio.Task[None]] = {}

    def tell(self, others_tokens: int) -> None:
        """Send the engine's state to the front end, if it has changed or none was sent for a while."""
        self._others_tokens = others_tokens
        batcher, now = self._batcher, time.monotonic()
        queued = tuple(map(batcher.queued_in, LANES))
        failed, retry_seconds = batcher.last_batch_failed, batcher.retry_seconds()
        submissions = self._submissions - len(self._coming)
        state = State(batcher.batch_tokens, others_tokens, failed, queued, submissions, retry_seconds)
        if state != self._told or now >= self._tell_again:
            self.link.send(state)
            self._told, self._tell_again = state, now + _ALIVE_SECONDS

    def _take(self, message: Message) -> None:
        if isinstance(message, Submit):
            self._submissions += 1
            self._coming.add(message.number)
            task = self._work[message.number] = asyncio.create_task(self._answer(message))
            task.add_done_callback(lambda _: self._forget(message.number))
        else:
            assert isinstance(message, Cancel), message
            if (work := self._work.get(message.number)) is not None:
                work.cancel()

    async def _answer(self, asked: Submit) -> None:
        tokens = 0
        try:
            rows = await _rows(asked.keys)
            tokens = sum(map(len, rows))
            self.tokens += tokens
            self._coming.discard(asked.number)
            computed = await self._batcher.submit(
                rows, asked.lane, asked.timeout_seconds, asked.caller, admitted=asked.probe
            )
            for part in vectors_in_parts(asked.number, computed):
                self.link.send(part)
                await self.link.drain()
        except Exception as error:
            if not isinstance(error, ServiceError):
                log.exception("unexpected error")
                error = ServiceError("the server failed on this request")
            # The state goes before the answer, so that the front end knows of the failure when it gets the answer.
            self.tell(self._others_tokens)
            self.link.send(Failed.of(asked.number, error))
        finally:
            self.tokens -= tokens

    def _forget(self, number: int) -> None:
        del self._work[number]
        self._coming.discard(number)  # if it ended before it was queued

    def _drop_all(self) -> None:
        for work in self._work.values():
            work.cancel()


async def _rows(keys: Sequence[bytes]) -> list[EmbedRow]:
    rows: list[EmbedRow] = []
    for start in range(0, len(keys), _ROWS_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        rows += map(EmbedRow.from_key, keys[start : start + _ROWS_AT_ONCE])
    return rows


async def tell_all(desks: Sequence[Desk]) -> None:
    """Keep the front ends informed, for ever."""
    while True:
        tokens = sum(desk.tokens for desk in desks)
        for desk in desks:
            desk.tell(tokens - desk.tokens)
        await asyncio.sleep(_TELL_SECONDS)


async def serve(child: Child, make_worker: MakeWorker) -> int:
    """Load and compute until told to end or unable to go on. Returns the exit status."""
    assignment, metrics = child.assignment, Metrics()
    worker = make_worker(assignment, metrics)
    backend = LocalBackend(worker, assignment.settings, assignment.manifest, assignment.limits, metrics)
    desks = [Desk(end, backend.batcher, metrics) for end in inherited(assignment.front_ends)]

    async def live() -> None:
        for desk in desks:
            await desk.link.connect()
        facts = await backend.start()
        settle()
        log.info("%s ready", assignment.name, extra={"fields": facts})
        telling = asyncio.create_task(tell_all(desks))
        try:
            await backend.run()
        finally:
            telling.cancel()

    loop, told_to_end = asyncio.get_running_loop(), asyncio.Event()
    child.on_end(lambda: loop.call_soon_threadsafe(told_to_end.set))
    life, end = asyncio.create_task(live()), asyncio.create_task(told_to_end.wait())
    await asyncio.wait({life, end}, return_when=asyncio.FIRST_COMPLETED)
    failure = life.exception() if life.done() else None
    if failure is not None:
        log.critical("%s can't go on: %s", assignment.name, failure, exc_info=unexplained(failure))
        watchdog.end_within(watchdog.GRACE_SECONDS)
    life.cancel()
    end.cancel()
    await asyncio.wait({life, end})
    backend.stop()
    status = 1 if failure else 0
    if backend.busy:
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        watchdog.end_now(status)
    return status


def encoder_worker(assignment: Assignment, metrics: Metrics) -> Worker:
    from service.device.worker import EncoderWorker  # torch, from here on

    return EncoderWorker(assignment.folder, assignment.settings, metrics)


def main(make_worker: MakeWorker = encoder_worker) -> int:
    child = Child()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return uvloop.run(serve(child, make_worker))


if __name__ == "__main__":
    sys.exit(main())
