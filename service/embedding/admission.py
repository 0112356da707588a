"""Room for requests: who is admitted now, who waits and in which lane, before and after a request is tokenized.

A request passes twice. Before it is tokenized it needs room for a guess of its tokens, so that no time is spent on
requests that would be refused; after that it needs room for its tokens as counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

from service.batching.contract import Batcher, Computed
from service.batching.room import Line
from service.batching.scheduling import LANES, Lane
from service.embedding.requests import EmbedRequest
from service.embedding.rows import EmbedRow, Vector
from service.errors import DeadlineExceeded, Overloaded
from service.settings import Settings

# Tokens a character: the guess at the start, and the share of the newest request in the running average.
_FIRST_GUESS = 0.25
_NEWEST_SHARE = 0.02

# The tokens of all requests that wait for room, in full queues: a request beyond them is refused at once.
_WAITING_QUEUES = 8

# The number of the caller whose request is served. Callers take turns in the queue.
caller_of_request: ContextVar[int] = ContextVar("caller_of_request", default=0)


def caller_number(name: bytes) -> int:
    """A number of 64 bits, the same for a name in every process. It tells nothing about the caller's key."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


class Size(NamedTuple):
    """A request's tokens, and the lane that they put it in."""

    tokens: int
    lane: Lane


@dataclass(frozen=True)
class Patience:
    """When a request arrived, how long it may take until it is computed, and how long it may wait for room."""

    began: float
    timeout_seconds: float | None = None
    wait_seconds: float = 0.0

    @property
    def deadline(self) -> float:
        """The time after which nothing is computed any more."""
        return math.inf if self.timeout_seconds is None else self.began + self.timeout_seconds

    @property
    def until(self) -> float:
        """The time at which a wait for room ends."""
        return min(self.deadline, self.began + self.wait_seconds)

    def seconds_left(self) -> float | None:
        """Seconds until the deadline, None if there is none."""
        return None if self.timeout_seconds is None else self.deadline - time.perf_counter()


class Admission:
    """Admits requests to the batcher's queue, first come, first served in each lane."""

    def __init__(self, batcher: Batcher[EmbedRow, Vector], settings: Settings) -> None:
        self._batcher = batcher
        self._settings = settings
        self._lines = {lane: Line() for lane in LANES}  # requests that wait for room
        self._tokenizing = dict.fromkeys(LANES, 0)  # guessed tokens of requests that are being tokenized
        self._waiting = 0  # guessed tokens of requests that wait for room
        self.tokens_per_character = _FIRST_GUESS
        batcher.on_room = self._call_lines

    @property
    def interactive_tokens(self) -> int:
        """The most tokens of a request that goes before bulk: a larger one would keep other callers waiting."""
        return self._batcher.batch_tokens // 2

    def guess(self, request: EmbedRequest) -> Size:
        inputs = len(request.inputs)
        guessed = round(request.characters * self.tokens_per_character) + request.ids
        return self.size(inputs, max(guessed, inputs), request.lane)

    def learn(self, request: EmbedRequest, tokens: int) -> None:
        """Keep the guess near to the texts of this server, by the counted tokens of a request.

        Requests with token ids teach nothing: their ids have no characters.
        """
        if request.characters and not request.ids:
            seen = tokens / request.characters
            self.tokens_per_character += _NEWEST_SHARE * (min(seen, 1.0) - self.tokens_per_character)

    def size(self, inputs: int, tokens: int, asked: Lane | None = None) -> Size:
        """The lane of a request: interactive if it is small, unless it asks for bulk.

        A request that asks for interactive may have many inputs, but no more tokens than any other there.
        """
        few = asked == "interactive" or inputs <= self._settings.interactive_inputs
        small = few and tokens <= self.interactive_tokens
        return Size(tokens, "interactive" if small and asked != "bulk" else "bulk")

    @asynccontextmanager
    async def tokenizing(self, size: Size, patience: Patience) -> AsyncIterator[None]:
        """Waits for room, and counts the request as queued while it is tokenized in this context.

        Where the requests that wait would fill the queue several times, a further one does not wait.

        Raises:
            Overloaded: if there is no room.
            DeadlineExceeded: if the request's time ran out first.
            Unavailable: if the batcher has ended.
        """
        tokens, lane = size
        if self._waiting and self._waiting + tokens > _WAITING_QUEUES * self._settings.max_queued_tokens:
            patience = replace(patience, wait_seconds=0.0)
        self._waiting += tokens
        try:
            await self._in_turn(lane, lambda: self._batcher.admit(tokens, lane, self._tokenizing[lane]), patience)
        finally:
            self._waiting -= tokens
        self._tokenizing[lane] += tokens
        try:
            yield
        finally:
            self._tokenizing[lane] -= tokens
            self._lines[lane].call()

    async def submit(self, rows: Sequence[EmbedRow], size: Size, patience: Patience) -> list[Computed[Vector]]:
        """The rows' vectors, once there is room for their tokens."""
        admit = partial(self._batcher.admit, size.tokens, size.lane)
        refused = False
        while True:
            await self._in_turn(size.lane, admit, patience, refused)
            try:
                return await self._batcher.submit(rows, size.lane, patience.seconds_left(), caller_of_request.get())
            except Overloaded:
                if not patience.wait_seconds:
                    raise
                refused = True  # by an engine that another front end has filled meanwhile

    async def _in_turn(
        self, lane: Lane, attempt: Callable[[], None], patience: Patience, refused: bool = False
    ) -> None:
        """Attempt until there is room in the lane, once all earlier requests have found theirs.

        A request that was `refused` before makes no attempt at once: it waits until there is more room.
        """
        now = time.perf_counter()
        if now >= patience.deadline:
            raise DeadlineExceeded
        line, until = self._lines[lane], patience.until
        if not refused and not line.is_before(patience.began):
            try:
                attempt()
                return
            except Overloaded:
                if now >= until:
                    raise
        elif now >= until:
            raise self._batcher.overloaded(lane)
        try:
            await line.wait(patience.began, attempt, until - now)
        except TimeoutError:
            raise (DeadlineExceeded() if until == patience.deadline else self._batcher.overloaded(lane)) from None

    def _call_lines(self) -> None:
        for line in self._lines.values():
            line.call()
