"""Chooses the engine for each row of a request: a pure policy. No event loop, no clock, no sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Part:
    """Rows from `start` up to `stop`, for one engine."""

    engine: int
    start: int
    stop: int


def share(lengths: Sequence[int], loads: Sequence[int], most_parts: int, turn: int) -> list[Part]:
    """Divide a request's rows, in order, over at most `most_parts` engines, the least loaded ones.

    `lengths` are the rows' tokens, `loads` the tokens that each engine has to do already. Afterwards the chosen engines
    have equal loads, to within a row each. Among equally loaded engines, `turn` decides.
    """
    order = sorted(range(len(loads)), key=lambda engine: (loads[engine], (engine - turn) % len(loads)))
    chosen = order[: max(min(most_parts, len(lengths)), 1)]
    ends = list(accumulate(_fill([loads[engine] for engine in chosen], sum(lengths))))
    parts: list[Part] = []
    start, place, tokens = 0, 0, 0
    for row, length in enumerate(lengths):
        # A row belongs to the part in which its middle lies.
        while place + 1 < len(ends) and tokens + length / 2 >= ends[place]:
            if row > start:
                parts.append(Part(chosen[place], start, row))
            start, place = row, place + 1
        tokens += length
    return [*parts, Part(chosen[place], start, len(lengths))]


def _fill(loads: Sequence[int], tokens: int) -> list[float]:
    """How many of the tokens each engine gets, for loads in rising order: all are filled up to one level."""
    for count in range(len(loads), 0, -1):
        level = (tokens + sum(loads[:count])) / count
        if level >= loads[count - 1]:
            break
    return [max(level - load, 0.0) for load in loads]
