"""The server, which notes when its threads are busy: python -m bench.traced_server serve …

Everything is real. When the server ends, it writes the notes of its threads' work to the file BENCH_TRACE, a JSON list
of [row, began, ended, cpu, tokens]. Times are those of `time.perf_counter`, which all processes of a machine share,
`cpu` is the seconds that the thread itself had a core, and `tokens` is the size of a batch, or 0 for other work.

The device's threads and the tokenizer's note each piece of their work. libuv counts how long the event loop waits for
events, and another thread looks at that count every millisecond: a note is of the time between two waits that it saw.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from uvloop import loop as uvloop

import service.device.worker
import service.embedding.embedder
from service import cli
from service.device.worker import EncoderWorker
from service.embedding.tokenizer_pool import TokenizerPool

NOTES: list[tuple[str, float, float, float, int]] = []

_METRICS_IDLE_TIME = 1  # the number that libuv's uv.h gives it
_LOOK_SECONDS = 0.001


def noted(work: Callable[[], Any], tokens: int = 0) -> Any:
    """The result of work that a pool's thread does."""
    row = threading.current_thread().name
    if row == "MainThread":
        return work()  # a part of the event loop's turn
    began, cpu = time.perf_counter(), time.thread_time()
    try:
        return work()
    finally:
        NOTES.append((row, began, time.perf_counter(), time.thread_time() - cpu, tokens))


def watch_event_loop(ended: threading.Event) -> threading.Thread:
    """Note when uvloop's loop, which is this thread's, is busy, until the event is set."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = uvloop.libuv_get_loop_t_ptr(asyncio.get_running_loop())  # type: ignore[attr-defined]
    loop = ctypes.c_void_p(pointer(capsule, None))
    uv = ctypes.CDLL(uvloop.__file__)
    uv.uv_metrics_idle_time.restype = ctypes.c_uint64
    uv.uv_loop_configure(loop, _METRICS_IDLE_TIME)
    clock = time.pthread_getcpuclockid(threading.get_ident())

    def look() -> tuple[float, float, float]:
        return time.perf_counter(), uv.uv_metrics_idle_time(loop) / 1e9, time.clock_gettime(clock)

    def watch() -> None:
        before, busy, on_a_core = look(), 0.0, 0.0
        while not ended.wait(_LOOK_SECONDS):
            now = look()
            seconds, waited, cpu = (new - old for new, old in zip(now, before, strict=True))
            if waited and busy:
                NOTES.append(("event loop", before[0] - busy, before[0], on_a_core, 0))
                busy = on_a_core = 0.0
            if cpu or not waited:  # else the rest of the time is that of the look itself
                busy += max(seconds - waited, 0.0)
                on_a_core += cpu
            before = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    return watcher


class TracedWorker(EncoderWorker):
    """Notes each batch. On a GPU one thread's note is of its launch, and another's of the wait for its vectors."""

    async def start(self, *arguments: Any) -> Any:
        """Start, and note the event loop's work from here on."""
        self._ended = threading.Event()
        self._watcher = watch_event_loop(self._ended)
        return await super().start(*arguments)

    def stop(self) -> None:
        """End the notes of the event loop, which may be gone soon, and the threads."""
        self._ended.set()
        self._watcher.join()
        super().stop()

    def _launch(self, rows: Any, *others: Any) -> Any:
        return noted(partial(super()._launch, rows, *others), sum(map(len, rows)))

    def _finish(self, rows: Any, *others: Any) -> Any:
        return noted(partial(super()._finish, rows, *others), sum(map(len, rows)))


class TracedPool(TokenizerPool):
    """Notes each piece of work."""

    async def run(self, lane: Any, work: Callable[[], Any]) -> Any:
        """Run it in a thread, which notes it."""
        return await super().run(lane, partial(noted, work))


if __name__ == "__main__":
    vars(service.device.worker)["EncoderWorker"] = TracedWorker
    vars(service.embedding.embedder)["TokenizerPool"] = TracedPool
    status = cli.main()
    Path(os.environ["BENCH_TRACE"]).write_text(json.dumps(NOTES))
    sys.exit(status)
