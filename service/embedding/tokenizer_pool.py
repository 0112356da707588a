"""Threads that tokenize. Interactive work goes first: no query waits behind the slices of a bulk request."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from service.batching.scheduling import LANES, Lane

T = TypeVar("T")


class TokenizerPool:
    """A fixed number of threads. Work waits for a free one by lane, and within a lane in the order of its arrival."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "tokenizer", _stand_back)
        self._free = threads
        self._waiting: dict[Lane, deque[asyncio.Future[None]]] = {lane: deque() for lane in LANES}

    async def run(self, lane: Lane, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        if self._free:
            self._free -= 1
        else:
            turn = loop.create_future()
            self._waiting[lane].append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # its turn had come already: a thread is reserved for it
                    self._pass_on()
                raise
        done = self._threads.submit(work)

        def passed_on(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(self._pass_on)

        done.add_done_callback(passed_on)
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the threads after their present work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _pass_on(self) -> None:
        """Give a free thread to the first work that still waits."""
        for lane in LANES:
            while self._waiting[lane]:
                turn = self._waiting[lane].popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._free += 1


def _stand_back() -> None:
    """Lower this thread's priority below the event loop's, for when they share a core; only Linux can do that."""
    if sys.platform == "linux":
        os.nice(5)
