"""The bookkeeping of who waits for which row: requests wait for inputs, and one input may answer several requests."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Generic

from service.batching.contract import Computed, Row, Vector
from service.batching.scheduling import Lane
from service.errors import EncodingError


class Request(Generic[Vector]):
    """The answers for a request's rows, and the future that is `done` when none of them is missing."""

    def __init__(self, rows: int) -> None:
        self.since = time.perf_counter()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers: list[Computed[Vector] | None] = [None] * rows
        self._missing = rows

    @property
    def answers(self) -> list[Computed[Vector]]:
        """All answers in the order of the rows, once the request is done."""
        return [answer for answer in self._answers if answer is not None]

    def set(self, index: int, computed: Computed[Vector]) -> None:
        self._answers[index] = computed
        self._missing -= 1
        if not self._missing and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False)
class Input(Generic[Row, Vector]):
    """One distinct row, and the places in requests that wait for its vector."""

    row: Row
    lane: Lane
    waiting: list[tuple[Request[Vector], int]]
    tokens: int
    since: float
    callers: tuple[int, ...]  # the callers in whose turns it may be computed
    queued: bool = True

    @property
    def wanted(self) -> bool:
        """Whether it still has to be computed."""
        return self.queued and self.awaited

    @property
    def awaited(self) -> bool:
        return any(not request.done.done() for request, _ in self.waiting)

    def set(self, vector: Vector, given: float, ended: float) -> None:
        """Answer each waiting request with its own times: some may have come long after the first, or after `given`."""
        for request, index in self.waiting:
            begun = max(given, request.since)
            request.set(index, Computed(vector, begun - request.since, ended - begun))

    def fail(self, error: Exception) -> None:
        for request, index in self.waiting:
            request.fail(error.at(index) if isinstance(error, EncodingError) else error)
