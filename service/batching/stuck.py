"""When a batch has taken too long for anything but a device that hangs: a pure rule."""

from __future__ import annotations

# Where nothing is set: nothing is called stuck before this, nor before so many times what it was expected to take.
LEAST_SECONDS = 120.0
TIMES_EXPECTED = 20.0


def stuck_after(expected_seconds: float, setting: float | None) -> float:
    """Seconds after which a batch that was expected to take so long is stuck."""
    return setting if setting is not None else max(LEAST_SECONDS, TIMES_EXPECTED * expected_seconds)
