"""How fast the device is now, measured against the cost model, and when it will be free."""

from __future__ import annotations

import time
from typing import NamedTuple

from service.batching.cost_model import CostModel

# Share of the newest batch in the running average.
_NEWEST = 0.2

# Bounds of the ratio of a batch's seconds to its expected seconds, so that one odd batch does not spoil the average.
_LEAST, _MOST = 0.1, 10.0

# Without a setting, a batch is stuck after this many seconds or this many times its expected time, whichever is longer.
LEAST_STUCK_SECONDS = 120.0
TIMES_EXPECTED = 20.0


def stuck_after(expected_seconds: float, setting: float | None) -> float:
    """Seconds after which a batch has taken so long that the device must hang."""
    return setting if setting is not None else max(LEAST_STUCK_SECONDS, TIMES_EXPECTED * expected_seconds)


class Given(NamedTuple):
    """A batch on the device: when it was given, how long it should take, and when it should be done."""

    at: float
    expected_seconds: float
    due: float


class Pace:
    """The running average of the seconds that batches take for each second that the cost model expects."""

    def __init__(self) -> None:
        self._slowness = 1.0
        self._free_at = 0.0
        self._last_ended = 0.0

    def seconds_to_free(self) -> float:
        """Seconds until the device has done everything that it was given; 0 or less if it is free."""
        return self._free_at - time.perf_counter()

    def backlog_seconds(self, cost: CostModel, queued_tokens: int) -> float:
        """Seconds that the device needs for its batches and for this many tokens that wait."""
        return max(self.seconds_to_free(), 0.0) + queued_tokens * cost.per_token * self._slowness

    def give(self, cost: CostModel, tokens: int) -> Given:
        now = time.perf_counter()
        expected = cost.seconds(tokens) * self._slowness
        self._free_at = max(now, self._free_at) + expected
        return Given(now, expected, self._free_at)

    def end(self, given: Given) -> tuple[float, float]:
        """Note that a batch is done. Returns the time, and its seconds on the device without the wait for others."""
        ended = time.perf_counter()
        seconds = ended - max(given.at, self._last_ended)
        self._last_ended = ended
        self._free_at += ended - given.due  # the batches queued behind it move with it
        self._slowness *= 1 + _NEWEST * (min(max(seconds / given.expected_seconds, _LEAST), _MOST) - 1)
        return ended, seconds

    def fail(self) -> None:
        self._free_at = time.perf_counter()
