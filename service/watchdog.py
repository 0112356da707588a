"""When a batch has taken too long for anything but a device that hangs, and how a process ends that has one.

A thread that waits for such a device can't be interrupted or joined: everybody who waits is answered, then the process
goes without it, with a status that makes whatever started it start it again. Knows nothing of HTTP, batches or torch.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

# Where nothing is set: nothing is called stuck before this, nor before so many times what it was expected to take.
LEAST_SECONDS = 120.0
TIMES_EXPECTED = 20.0

# What the answers to those who wait, and an orderly end, are given before the process goes.
GRACE_SECONDS = 5.0


def stuck_after(expected_seconds: float, setting: float | None) -> float:
    """Seconds after which a batch that was expected to take so long is stuck."""
    return setting if setting is not None else max(LEAST_SECONDS, TIMES_EXPECTED * expected_seconds)


def end_within(seconds: float) -> None:
    """End this process with status 1 if it still runs then, whatever its threads are at."""
    timer = threading.Timer(seconds, end_now)
    timer.daemon = True
    timer.start()


def end_now(status: int = 1) -> None:
    """End this process, without waiting for its threads."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
