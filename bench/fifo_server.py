"""The server with its queue served first come, first served, for comparison: python -m bench.fifo_server serve …"""

from __future__ import annotations

import sys
from typing import Any

from service import cli
from service.batching import batcher
from service.batching.scheduling import BatchLimits, Queue


def take_oldest(queue: Queue[Any], limits: BatchLimits) -> list[Any]:
    """Whole requests in the order they came, in batches of as many tokens as usual."""
    batch: list[Any] = []
    tokens = 0
    while (flow := queue.bulk.first()) is not None:
        if batch and tokens + flow.items[0].tokens > limits.batch_tokens:
            break
        batch.append(flow.items.popleft())
        tokens += batch[-1].tokens
    return batch


if __name__ == "__main__":
    batcher.take_batch = take_oldest  # type: ignore[attr-defined]
    # Nothing is interactive, so everything is queued as bulk, in order.
    sys.exit(cli.main([*sys.argv[1:], "--interactive-inputs", "0"]))
