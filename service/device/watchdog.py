"""How a process ends whose device hangs.

A thread that waits for such a device can't be interrupted or joined: everybody who waits is answered, then the process
goes without it, with a status that makes whatever started it start it again. Knows nothing of HTTP, batches or torch.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

# What the answers to those who wait, and an orderly end, are given before the process goes.
GRACE_SECONDS = 5.0


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
