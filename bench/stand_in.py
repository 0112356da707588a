"""The server with a stand-in for its encoder: python -m bench.stand_in serve …

Everything is real, the tokenizer included, but for the worker. It gives unit vectors of BENCH_WIDTH numbers that were
ready before: at once, or as fast as a device of BENCH_TOKENS_PER_SECOND. On SIGUSR1 the process of the worker logs the
longest stall of its event loop since the last time: the latest that a timer of 1 ms came.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import numpy as np

from service.batching.contract import DevicePlan
from service.batching.cost_model import CostModel
from service.batching.limits import Limits
from service.embedding.rows import EmbedRow, Vector
from service.logs import log

WIDTH = int(os.environ.get("BENCH_WIDTH", "640"))
TOKENS_PER_SECOND = float(os.environ.get("BENCH_TOKENS_PER_SECOND", "inf"))

_STALL_TICK_SECONDS = 0.001


class ReadyWorker:
    """Stands in for `EncoderWorker`; any arguments will do."""

    device, dtype, kernel = "none", "float32", "none"

    def __init__(self, *_: object) -> None:
        vectors = np.random.default_rng(0).standard_normal((1024, WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self._vectors = itertools.cycle(list(vectors))

    async def start(self, limits: Limits) -> DevicePlan:
        """Nothing to load; a plan that knows the device's speed."""
        self._stalls = asyncio.create_task(watch_stalls())
        least = 1e-6 if inf == TOKENS_PER_SECOND else 1e-3
        cost = CostModel(floor=least, base=least, per_token=max(1 / TOKENS_PER_SECOND, 1e-9))
        return DevicePlan(cost, limits.for_batches(cost))

    async def run_batch(self, rows: list[EmbedRow]) -> list[Vector]:
        """The next vectors, whatever the rows, after the time that so many tokens take."""
        # A batch takes its time on another thread: the event loop goes round here too.
        await asyncio.sleep(sum(map(len, rows)) / TOKENS_PER_SECOND)
        return list(itertools.islice(self._vectors, len(rows)))

    def stop(self) -> None:
        """Nothing to end but the watch."""
        self._stalls.cancel()


async def watch_stalls() -> None:
    """Measure the event loop for ever, and log its longest stall whenever it is asked for."""
    longest = 0.0

    def tell() -> None:
        nonlocal longest
        log.info("event loop", extra={"fields": {"longest_ms": round(longest * 1000, 1)}})
        longest = 0.0

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    while True:
        expected = time.perf_counter() + _STALL_TICK_SECONDS
        await asyncio.sleep(_STALL_TICK_SECONDS)
        longest = max(longest, time.perf_counter() - expected)


def main() -> int:
    """The command, or, for a module that is run with one number, an engine: as its supervisor starts it."""
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        from service.processes.engine import main as engine_main

        return engine_main(ReadyWorker)

    import service.device.worker  # torch with all its objects, which the garbage collector walks as in real use
    import service.server.startup
    from service import cli
    from service.processes import supervisor

    def wide(prepare_store: Callable[..., Any]) -> Callable[..., Any]:
        def prepared(*arguments: Any) -> Any:
            folder, manifest = prepare_store(*arguments)
            return folder, manifest.model_copy(update={"width": WIDTH})

        return prepared

    for module in (service.server.startup, supervisor):
        vars(module)["prepare_store"] = wide(vars(module)["prepare_store"])
    vars(service.device.worker)["EncoderWorker"] = ReadyWorker
    supervisor.supervise = partial(supervisor.supervise, engine="bench.stand_in")
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
