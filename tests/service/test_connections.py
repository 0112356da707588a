"""When a client counts as one that does not read its answer; tests/e2e/test_limits.py has real ones."""

from __future__ import annotations

import pytest

from service.connections import Unsent


@pytest.mark.parametrize(
    ("unsent_bytes", "idle_seconds"),
    [
        ([0, 0, 0], [0, 0, 0]),
        ([9, 9, 9], [0, 1, 2]),
        ([9, 8, 7], [0, 0, 0]),  # steady, though the buffer is never empty
        ([9, 9, 8, 8, 8], [0, 1, 0, 1, 2]),
        ([9, 20, 20], [0, 1, 2]),  # more was put there, and nothing taken
        ([9, 0, 9, 9], [0, 0, 1, 2]),
    ],
)
def test_a_client_is_idle_while_it_takes_nothing(unsent_bytes: list[int], idle_seconds: list[float]) -> None:
    unsent = Unsent()
    assert [unsent.idle_seconds(now, count) for now, count in enumerate(unsent_bytes)] == idle_seconds
