"""The server, which notes when its threads are busy: python -m bench.traced_server serve …

Everything is real. The device's threads, the tokenizer's threads and the event loop note each piece of their work. When
the server ends, it writes the notes to the file BENCH_TRACE, a JSON list of [row, began, ended, cpu, tokens]. Times are
those of `time.perf_counter`, which all processes of a machine share, `cpu` is the seconds that the thread itself had a
core, and `tokens` is the size of a batch, or 0 for other work.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
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

# The numbers that libuv's uv.h gives them.
_METRICS_IDLE_TIME, _PREPARE = 1, 9

_TURNS = 1 << 20
_HOOK = """
#include <stdint.h>
#include <time.h>
uint64_t uv_metrics_idle_time(void *);
void *loop;
int turns;
double seen[1 << 20][3]; /* now, all waits so far, the thread's CPU time; in seconds */
static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}
void before_wait(void *handle) {
    if (turns == 1 << 20) return;
    seen[turns][0] = seconds(CLOCK_MONOTONIC);
    seen[turns][1] = uv_metrics_idle_time(loop) / 1e9;
    seen[turns++][2] = seconds(CLOCK_THREAD_CPUTIME_ID);
}
"""


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


class LoopTurns:
    """Notes each turn of uvloop's loop, from the end of its wait for events to the beginning of the next wait.

    libuv calls a hook before each wait. The hook is in C: in Python it would wait for the interpreter's lock each time.
    """

    def __init__(self) -> None:
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._uv = ctypes.CDLL(uvloop.__file__, ctypes.RTLD_GLOBAL)
        with tempfile.TemporaryDirectory() as folder:
            command = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", f"{folder}/hook.so"]
            subprocess.run(command, input=_HOOK, text=True, check=True)
            self._c = ctypes.CDLL(f"{folder}/hook.so")
        capsule = uvloop.libuv_get_loop_t_ptr(asyncio.get_running_loop())  # type: ignore[attr-defined]
        loop = ctypes.c_void_p.in_dll(self._c, "loop")
        loop.value = pointer(capsule, None)
        self._handle = ctypes.create_string_buffer(self._uv.uv_handle_size(_PREPARE))
        self._uv.uv_loop_configure(loop, _METRICS_IDLE_TIME)
        self._uv.uv_prepare_init(loop, self._handle)
        self._uv.uv_prepare_start(self._handle, self._c.before_wait)

    def close(self) -> None:
        """Take the hook away, without which the loop could not end, and note what it has seen."""
        self._uv.uv_close(self._handle, None)
        seen = (ctypes.c_double * 3 * _TURNS).in_dll(self._c, "seen")
        turns = [tuple(turn) for turn in seen[: ctypes.c_int.in_dll(self._c, "turns").value]]
        for (last, waited_before, cpu_before), (now, waited, cpu) in itertools.pairwise(turns):
            NOTES.append(("event loop", last + waited - waited_before, now, cpu - cpu_before, 0))


class TracedWorker(EncoderWorker):
    """Notes each batch. On a GPU one thread's note is of its launch, and another's of the wait for its vectors."""

    async def start(self, *arguments: Any) -> Any:
        """Start, and note the event loop's turns from here on."""
        self._turns = LoopTurns()
        return await super().start(*arguments)

    def stop(self) -> None:
        """Stop the notes of the event loop, and the threads."""
        self._turns.close()
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
