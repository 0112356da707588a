"""When a batch has taken so long that the device must hang: a pure rule."""

from __future__ import annotations

# Without a setting, a batch is stuck after this many seconds or this many times its expected time, whichever is longer.
LEAST_SECONDS = 120.0
TIMES_EXPECTED = 20.0


def stuck_after(expected_seconds: float, setting: float | None) -> float:
    """Seconds after which a batch counts as stuck."""
    return setting if setting is not None else max(LEAST_SECONDS, TIMES_EXPECTED * expected_seconds)
