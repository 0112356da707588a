"""How fast the device is at present, measured against the cost model, and when it will be free."""

from __future__ import annotations

import time
from typing import NamedTuple

from service.batching.cost_model import CostModel

# Share of the newest batch in the running average.
_NEWEST = 0.2

# Seconds that a batch took for each that was expected count within these bounds.
_LEAST, _MOST = 0.1, 10.0


class Given(NamedTuple):
    """A batch that the device has: when it got it, how long it should take, and when it should be done."""

    at: float
    expected_seconds: float
    due: float


class Pace:
    """The running average of seconds that batches take for each second of the cost model."""

    def __init__(self) -> None:
        self._slowness = 1.0
        self._free_at = 0.0
        self._last_ended = 0.0

    def seconds_to_free(self) -> float:
        """Until the device has done everything that it was given; at most 0 where it has."""
        return self._free_at - time.perf_counter()

    def backlog_seconds(self, cost: CostModel, queued_tokens: int) -> float:
        """How long the device needs for what it has and for so many tokens that wait."""
        return max(self.seconds_to_free(), 0.0) + queued_tokens * cost.per_token * self._slowness

    def give(self, cost: CostModel, tokens: int) -> Given:
        """The device gets a batch of so many tokens."""
        now = time.perf_counter()
        expected = cost.seconds(tokens) * self._slowness
        self._free_at = max(now, self._free_at) + expected
        return Given(now, expected, self._free_at)

    def end(self, given: Given) -> tuple[float, float]:
        """The batch is done: the moment, and its seconds on the device, without the wait for batches before it."""
        ended = time.perf_counter()
        seconds = ended - max(given.at, self._last_ended)
        self._last_ended = ended
        self._free_at += ended - given.due  # what is queued behind it moves with it
        self._slowness *= 1 + _NEWEST * (min(max(seconds / given.expected_seconds, _LEAST), _MOST) - 1)
        return ended, seconds

    def fail(self) -> None:
        """The batch failed, and the device is free."""
        self._free_at = time.perf_counter()
