"""A front end's batcher: engines in other processes do the work.

Each engine decides itself what it admits to its queue. Equal rows are computed once if they go to the same engine, and
twice if they go to two engines.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
from collections import deque
from collections.abc import Callable, Sequence

from service.batching.contract import Computed
from service.batching.inputs import Request
from service.batching.pace import LEAST_STUCK_SECONDS
from service.batching.room import has_room
from service.batching.scheduling import LANES, Lane
from service.embedding.rows import EmbedRow, Vector
from service.errors import EncodingError, Overloaded, ServiceError
from service.logs import log
from service.metrics import Metrics, merged_page
from service.processes.dispatch import Part, share
from service.processes.link import Link
from service.processes.wire import Cancel, Failed, Message, State, Submit, Vectors

# A scrape that takes longer fails: without one process's metrics the sums would be wrong.
_SAMPLES_SECONDS = 1.0

# How often a front end checks that each engine has said something.
_LISTEN_SECONDS = 1.0


class RemoteEngine:
    """One engine, as a front end sees it."""

    def __init__(self, name: str, end: socket.socket, metrics: Metrics, lost: asyncio.Event) -> None:
        self.link = Link(name, end, metrics, self._take, self._lose)
        self.state = State(0, 0, False)
        self.ready = asyncio.Event()  # also set when it is lost
        self.heard = False  # whether it said anything since this was last set to False
        self._numbers = itertools.count()
        self._lost = lost
        self._pending: dict[int, Request[Vector]] = {}
        self._own_tokens = 0
        self._unseen: deque[tuple[Lane, int]] = deque()  # tokens sent that its last state does not contain yet
        self._seen = 0  # submissions that its last state contains
        self.on_room: Callable[[], None] = lambda: None

    @property
    def load(self) -> int:
        """Tokens that the engine has to do: those of this front end, and those of others by its last state."""
        return self._own_tokens + self.state.others_tokens

    def queued_in(self, lane: Lane) -> int:
        """Tokens that wait in one lane: by the engine's last state, plus those sent since."""
        sent = sum(tokens for its_lane, tokens in self._unseen if its_lane == lane)
        return self.state.queued[LANES.index(lane)] + sent

    async def submit(
        self,
        rows: Sequence[EmbedRow],
        lane: Lane,
        timeout_seconds: float | None = None,
        caller: int = 0,
        probe: bool = False,
    ) -> list[Computed[Vector]]:
        """The rows' vectors, in order. Cancelling this also cancels the work in the engine."""
        if self.link.lost:
            raise self.link.gone()
        number, tokens = next(self._numbers), sum(map(len, rows))
        request = self._pending[number] = Request(len(rows))
        self._own_tokens += tokens
        self._unseen.append((lane, tokens))
        self.link.send(Submit(number, [row.key for row in rows], lane, probe, timeout_seconds, caller))
        try:
            await request.done
            return request.answers
        finally:
            self._own_tokens -= tokens
            del self._pending[number]
            if request.done.cancelled():
                self.link.send(Cancel(number))
            self.on_room()

    def _take(self, message: Message) -> None:
        self.heard = True
        if isinstance(message, State):
            self.state = message
            for _ in range(message.submissions - self._seen):
                self._unseen.popleft()
            self._seen = message.submissions
            self.ready.set()
            self.on_room()
            return
        assert isinstance(message, Vectors | Failed), message
        request = self._pending.get(message.number)
        if request is None:  # it was cancelled meanwhile
            return
        if isinstance(message, Failed):
            request.fail(message.error)
            return
        for index, computed in enumerate(message.computed, message.first):
            request.set(index, computed)

    def _lose(self) -> None:
        self._lost.set()
        self.ready.set()
        for request in self._pending.values():
            request.fail(self.link.gone())
        self.on_room()


class RemoteBatcher:
    """Several engines as one batcher. When an engine is lost, its requests and all later ones get Unavailable."""

    def __init__(self, engines: Sequence[RemoteEngine], max_queued_tokens: int | None = None) -> None:
        self._engines = engines
        self._max_queued_tokens = max_queued_tokens  # in each lane of each engine
        self._turns = itertools.count()
        self.on_room: Callable[[], None] = lambda: None
        for engine in engines:
            engine.on_room = lambda: self.on_room()

    @property
    def batch_tokens(self) -> int:
        """Tokens at which the smallest engine's batch is full; 0 before all are ready."""
        return min(engine.state.batch_tokens for engine in self._engines)

    @property
    def last_batch_failed(self) -> bool:
        return any(engine.state.last_batch_failed for engine in self._engines)

    def admit(self, tokens: int, lane: Lane, ahead: int = 0) -> None:
        """As `Batcher.admit`: one engine with room is enough."""
        for engine in self._engines:
            if engine.link.lost:
                raise engine.link.gone()
        if not any(
            has_room(tokens, engine.queued_in(lane) + ahead, self._max_queued_tokens) for engine in self._engines
        ):
            raise self.overloaded(lane)

    def overloaded(self, lane: Lane) -> Overloaded:
        queued = sum(engine.load for engine in self._engines)
        return Overloaded(queued, min(engine.state.retry_seconds for engine in self._engines))

    async def submit(
        self,
        rows: Sequence[EmbedRow],
        lane: Lane = "interactive",
        timeout_seconds: float | None = None,
        caller: int = 0,
    ) -> list[Computed[Vector]]:
        """As `Batcher.submit`. One engine computes a small request; engines share a large one by full batches.

        After the error of one part, the other parts are dropped.
        """
        lengths = [len(row) for row in rows]
        # Parts smaller than a batch would take longer than the whole request in one engine.
        most_parts = 1 if lane == "interactive" else sum(lengths) // max(self.batch_tokens, 1)
        parts = share(lengths, [engine.load for engine in self._engines], most_parts, next(self._turns))
        if len(parts) == 1:
            return await self._engines[parts[0].engine].submit(rows, lane, timeout_seconds, caller)
        tasks = [asyncio.create_task(self._submit_part(part, rows, lane, timeout_seconds, caller)) for part in parts]
        try:
            return [computed for answers in await asyncio.gather(*tasks) for computed in answers]
        finally:
            for task in tasks:
                task.cancel()

    async def probe(self, row: EmbedRow) -> None:
        """Compute a row in every engine whose last batch failed: see `Batcher.probe`."""
        failing = [engine for engine in self._engines if engine.state.last_batch_failed]
        await asyncio.gather(*(engine.submit([row], "interactive", probe=True) for engine in failing))

    async def _submit_part(
        self, part: Part, rows: Sequence[EmbedRow], lane: Lane, timeout_seconds: float | None, caller: int
    ) -> list[Computed[Vector]]:
        try:
            return await self._engines[part.engine].submit(rows[part.start : part.stop], lane, timeout_seconds, caller)
        except EncodingError as error:
            raise error.at(part.start + (error.index or 0)) from error


class RemoteBackend:
    """A front end's connections: to every engine, and to the other front ends for their metrics."""

    busy = False

    def __init__(
        self,
        engine_ends: Sequence[socket.socket],
        front_end_ends: Sequence[socket.socket],
        metrics: Metrics,
        silent_seconds: float = LEAST_STUCK_SECONDS,
        max_queued_tokens: int | None = None,
    ) -> None:
        self._metrics = metrics
        self._silent_seconds = silent_seconds
        self._lost = asyncio.Event()  # set when any engine is lost
        self.engines = [
            RemoteEngine(f"engine {number}", end, metrics, self._lost) for number, end in enumerate(engine_ends)
        ]
        self.batcher = RemoteBatcher(self.engines, max_queued_tokens)
        self.links = [engine.link for engine in self.engines] + [
            Link("front end", end, metrics) for end in front_end_ends
        ]

    async def start(self) -> dict[str, object]:
        for link in self.links:
            await link.connect()
        for engine in self.engines:
            await engine.ready.wait()
            if engine.link.lost:
                raise engine.link.gone()
        return {"engines": len(self.engines)}

    async def run(self) -> None:
        """Wait until an engine is lost, or says nothing for so long that it must hang.

        Raises:
            Unavailable: always, in the end. Requests that wait for another engine still get their answers.
        """
        listening = [asyncio.create_task(self._listen(engine)) for engine in self.engines]
        try:
            await self._lost.wait()
            raise next(engine.link.gone() for engine in self.engines if engine.link.lost)
        finally:
            for task in listening:
                task.cancel()

    async def _listen(self, engine: RemoteEngine) -> None:
        """Give up an engine that is silent. It counts clock turns, so that a pause of all processes does not count."""
        most = math.ceil(self._silent_seconds / _LISTEN_SECONDS)
        silent = 0
        while silent < most:
            engine.heard = False
            await asyncio.sleep(_LISTEN_SECONDS)
            silent = 0 if engine.heard else silent + 1
        log.critical("%s has said nothing for %.0f s: it hangs", engine.link.name, self._silent_seconds)
        engine.link.give_up()

    def stop(self) -> None:
        for link in self.links:
            link.close()

    async def metrics_page(self) -> bytes:
        """The merged metrics of all processes.

        Raises:
            ServiceError: if a process does not answer, as sums without it would go backwards.
        """
        try:
            async with asyncio.timeout(_SAMPLES_SECONDS):
                given = await asyncio.gather(*(link.samples() for link in self.links))
        except TimeoutError as error:
            raise ServiceError(f"a process of the server gave no metrics in {_SAMPLES_SECONDS} s") from error
        engines = len(self.engines)
        return merged_page([self._metrics.samples(), *given[engines:]], given[:engines])
