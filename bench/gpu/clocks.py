"""How long a call takes the device and whoever waits for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.gpu.inputs import Row
from bench.gpu.report import sync
from model_store.encoder.pipeline import Pipeline
from model_store.encoder.pooling import Wanted

# What an event can tell apart.
_GRAIN_SECONDS = 5e-7


@torch.inference_mode()
def device_seconds(run: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """The median time of one of many calls queued behind each other, after two that don't count."""
    run()
    sync(device)
    began = time.perf_counter()
    run()
    sync(device)
    rounds = min(max(int(budget / max(time.perf_counter() - began, _GRAIN_SECONDS)), 3), 100)
    if device.type == "cpu":
        return statistics.median(host_seconds(run) for _ in range(rounds))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    sync(device)
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in marks]
    return max(statistics.median(milliseconds) / 1000, _GRAIN_SECONDS)


def host_seconds(run: Callable[[], object]) -> float:
    """The time until a call returns."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def launch_seconds(pipeline: Pipeline, rows: Sequence[Row], rounds: int) -> tuple[list[float], list[float]]:
    """Times until vectors are there, and until `launch` returns, one batch at a time."""
    wanted = [Wanted(pipeline.encoder.manifest.width)] * len(rows)
    whole, launched = [], []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        pending = pipeline.launch(rows, wanted)
        launched.append(time.perf_counter() - began)
        pending.wait()
        whole.append(time.perf_counter() - began)
    return whole[2:], launched[2:]


def pipelined(pipeline: Pipeline, batches: Sequence[Sequence[Row]]) -> tuple[float, Tensor]:
    """Seconds for all batches, each queued before the one before it is awaited, and their vectors."""
    width = pipeline.encoder.manifest.width
    began, found, before = time.perf_counter(), [], None
    for batch in [*batches, None]:
        pending = pipeline.launch(batch, [Wanted(width)] * len(batch)) if batch else None
        if before is not None:
            found.append(before.wait())
        before = pending
    return time.perf_counter() - began, torch.from_numpy(np.concatenate(found))


def packed_batches(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """In their order, as full as so many tokens allow."""
    batches: list[list[Row]] = [[]]
    for row in rows:
        if batches[-1] and sum(map(len, batches[-1])) + len(row) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def ms(seconds: float) -> float:
    """Milliseconds for people."""
    return float(f"{seconds * 1000:.4g}")
