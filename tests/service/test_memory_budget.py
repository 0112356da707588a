"""The token budget after batches that ran out of memory and batches that did not: a table."""

from __future__ import annotations

from typing import Any

import pytest

from service.batching.memory_budget import CLEAN_BATCHES, LEAST_TOKENS, MemoryBudget
from service.batching.pace import LEAST_STUCK_SECONDS, TIMES_EXPECTED, stuck_after

GOOD = "good"


def after(most: int, *events: Any) -> int:
    budget = MemoryBudget(most)
    for event in events:
        if event == GOOD:
            budget.went_well()
        else:
            budget.ran_out(*event)
    return budget.tokens


@pytest.mark.parametrize(
    ("events", "tokens"),
    [
        ([], 16384),
        ([GOOD] * 1000, 16384),
        ([(16384, 30)], 8192),
        ([(10000, 30)], 5000),  # half of what was too much, not of what was never tried
        ([(16384, 30), (8192, 15)], 4096),
        ([(16384, 30), (16384, 30)], 8192),  # the second was composed before the first had run out
        ([(16384, 1)], 16384),  # one input: a smaller batch would not have helped
        ([(600, 3)], LEAST_TOKENS),
        ([(600, 3), (500, 3), (100, 2)], LEAST_TOKENS),
        ([(16384, 30)] + [GOOD] * (CLEAN_BATCHES - 1), 8192),
        ([(16384, 30)] + [GOOD] * CLEAN_BATCHES, 8192 + 2048),
        ([(16384, 30)] + [GOOD] * (CLEAN_BATCHES - 1) + [(9000, 1)] + [GOOD] * (CLEAN_BATCHES - 1), 8192),
        ([(16384, 30)] + [GOOD] * (4 * CLEAN_BATCHES), 16384),
        ([(16384, 30)] + [GOOD] * (9 * CLEAN_BATCHES), 16384),
        ([(16384, 30)] + [GOOD] * CLEAN_BATCHES + [(10240, 9)], 5120),
    ],
)
def test_the_budget_after(events: list[Any], tokens: int) -> None:
    assert after(16384, *events) == tokens


def test_a_budget_that_is_small_by_itself_falls_no_further() -> None:
    assert after(100, (100, 4)) == 100


@pytest.mark.parametrize(
    ("expected", "setting", "limit"),
    [
        (0.01, None, LEAST_STUCK_SECONDS),
        (30.0, None, 30.0 * TIMES_EXPECTED),
        (0.01, 5.0, 5.0),
        (30.0, 5.0, 5.0),
    ],
)
def test_a_batch_is_stuck_after(expected: float, setting: float | None, limit: float) -> None:
    assert stuck_after(expected, setting) == limit
