"""The server with an encoder that fails on purpose: python -m tests.faults.faulty_server serve …

Everything is real but the step from the worker to the device, which misbehaves on batches with a text that begins with
one of the marks below, and, where FAULTS_SHARE says so, on that share of all batches, in a random order seeded by
FAULTS_SEED. FAULTS_TOKENS_PER_SECOND is how fast the device is at most. FAULTS_HANG_START=1 hangs the loading.
FAULTS_WATCH_LOOP=1 logs the longest turns of the event loop that the worker was started in.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model_store.encoder.encoder import Encoder
from model_store.encoder.pipeline import Pending, Pipeline
from model_store.encoder.pooling import Wanted
from model_store.manifest import read_manifest
from model_store.text.tokenizer import TextTokenizer, TokenizedText
from service.batching.contract import DevicePlan
from service.batching.limits import Limits
from service.device.worker import EncoderWorker
from service.logs import log
from service.metrics import Metrics
from service.processes.child import Assignment
from service.settings import Settings

RAISES = "[raises]"
RAISES_IN_COMPANY = "[raises in company]"
NOT_FINITE = "[nan]"
NOT_FINITE_IN_COMPANY = "[nan in company]"
OUT_OF_MEMORY = "[oom]"
OUT_OF_MEMORY_IN_COMPANY = "[oom in company]"
SLOW = "[slow]"
HANGS = "[hangs]"
REFUSES_FROM_NOW_ON = "[refuses from now on]"
MARKS = (
    RAISES,
    RAISES_IN_COMPANY,
    NOT_FINITE,
    NOT_FINITE_IN_COMPANY,
    OUT_OF_MEMORY,
    OUT_OF_MEMORY_IN_COMPANY,
    SLOW,
    HANGS,
    REFUSES_FROM_NOW_ON,
)

# Tokens of a text that are looked at for a mark.
_MARK_TOKENS = 32

_SLOW_SECONDS = 0.2

# How often the event loop's turns are looked at, and how often the longest since is told.
_LOOK_SECONDS = 0.002
_TELL_SECONDS = 1.0


@dataclass(frozen=True)
class FaultyPipeline(Pipeline):
    """A pipeline with faults."""

    tokenizer: TextTokenizer | None = None
    share: float = 0.0
    seconds_per_token: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(int(os.environ.get("FAULTS_SEED", "0"))))
    refuses: threading.Event = field(default_factory=threading.Event)

    def launch(self, rows: Sequence[TokenizedText], wanted: Sequence[Wanted]) -> Pending:
        """As the real one, unless a mark or chance will have it otherwise."""
        due = time.perf_counter() + self.seconds_per_token * sum(map(len, rows))
        marks = [self._mark(row) for row in rows]
        present = set(marks)
        if len(rows) > 1 and self.chance.random() < self.share:
            present.add(self.chance.choice((RAISES, OUT_OF_MEMORY, NOT_FINITE, SLOW)))
        company = len(rows) > 1
        if REFUSES_FROM_NOW_ON in present:
            self.refuses.set()
        self.probe()
        if HANGS in present:
            threading.Event().wait()
        if SLOW in present:
            time.sleep(_SLOW_SECONDS)
        if RAISES in present or (company and RAISES_IN_COMPANY in present):
            raise RuntimeError("a fault made on purpose")
        if OUT_OF_MEMORY in present or (company and OUT_OF_MEMORY_IN_COMPANY in present):
            raise torch.OutOfMemoryError("a fault made on purpose")
        pending = super().launch(rows, wanted)
        time.sleep(max(due - time.perf_counter(), 0.0))
        broken = [mark == NOT_FINITE or (company and mark == NOT_FINITE_IN_COMPANY) for mark in marks]
        if NOT_FINITE in present and not any(broken):
            broken[self.chance.randrange(len(rows))] = True
        if any(broken):
            vectors = pending.vectors.clone()
            vectors[np.flatnonzero(broken)] = torch.nan
            return Pending(vectors, pending.copied)
        return pending

    def probe(self) -> None:
        """As CUDA after an error that stays."""
        if self.refuses.is_set():
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        super().probe()

    def _mark(self, row: TokenizedText) -> str:
        assert self.tokenizer is not None
        start = row.span_start
        text = self.tokenizer.decode(row.token_ids[start : start + _MARK_TOKENS]).lstrip()
        return next((mark for mark in MARKS if text.startswith(mark)), "")


async def watch_loop() -> None:
    """Log how long the event loop is at one turn, in milliseconds of its thread's core, for ever."""
    await asyncio.sleep(_TELL_SECONDS)  # what the start still does
    while True:
        longest, end = 0.0, time.monotonic() + _TELL_SECONDS
        while time.monotonic() < end:
            began = time.thread_time()
            await asyncio.sleep(_LOOK_SECONDS)
            longest = max(longest, time.thread_time() - began)
        log.info("event loop", extra={"fields": {"longest_turn_ms": round(longest * 1000, 1)}})


class FaultyWorker(EncoderWorker):
    """A worker that gives its batches to a faulty pipeline, once it has warmed up."""

    async def start(self, limits: Limits) -> DevicePlan:
        """As the real one."""
        plan = await super().start(limits)
        if os.environ.get("FAULTS_WATCH_LOOP"):
            self._watching = asyncio.create_task(watch_loop())
        return plan

    def _start(self, limits: Limits) -> DevicePlan:
        if os.environ.get("FAULTS_HANG_START"):
            threading.Event().wait()
        plan = super()._start(limits)
        tokenizer = TextTokenizer.load(self._folder, read_manifest(self._folder))
        share = float(os.environ.get("FAULTS_SHARE", "0"))
        seconds_per_token = 1 / float(os.environ.get("FAULTS_TOKENS_PER_SECOND", "inf"))
        encoder: Encoder = self._pipeline.encoder
        self._pipeline = FaultyPipeline(encoder, self._pipeline.replays, tokenizer, share, seconds_per_token)
        return plan


def faulty_worker(assignment: Assignment, metrics: Metrics) -> FaultyWorker:
    """What an engine process has for a worker here."""
    folder: Path = assignment.folder
    settings: Settings = assignment.settings
    return FaultyWorker(folder, settings, metrics)


def main() -> int:
    """The command, or, for a module that is run with one number, an engine: as its supervisor starts it."""
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        from service.processes.engine import main as engine_main

        return engine_main(faulty_worker)

    import service.device.worker
    from service import cli
    from service.processes import supervisor

    service.device.worker.EncoderWorker = FaultyWorker  # type: ignore[misc]
    supervisor.supervise = partial(supervisor.supervise, engine="tests.faults.faulty_server")
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
