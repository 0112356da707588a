"""Ends a process whose device hangs.

A thread that waits for such a device can't be interrupted or joined. So everybody who waits is answered, then the
process ends without that thread, with status 1, so that its manager starts it again. It knows nothing of HTTP, batches
or torch.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

# The time for the last answers and an orderly end, before the process is ended.
GRACE_SECONDS = 5.0


def end_within(seconds: float) -> None:
    """End this process with status 1 if it still runs after this time, whatever its threads do."""
    timer = threading.Timer(seconds, end_now)
    timer.daemon = True
    timer.start()


def end_now(status: int = 1) -> None:
    """End this process, without waiting for its threads."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
