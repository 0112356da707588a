"""How long a call takes the device and whoever waits for it, and what the device can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.gpu.inputs import Row
from bench.gpu.report import Report
from model_store.encoder.pipeline import Pipeline
from model_store.encoder.pooling import Wanted
from model_store.encoder.quantization import quantize_rows

# M × K by K × N a matrix product; B texts, D width


@torch.inference_mode()
def device_seconds(run: Callable[[], object]) -> float:
    """The median time of one of many calls queued behind each other."""
    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=0.5).median


def launch_seconds(pipeline: Pipeline, rows: Sequence[Row], rounds: int) -> tuple[list[float], list[float]]:
    """Times until vectors are there, and until `launch` returns, one batch at a time."""
    wanted = full_width(pipeline, rows)
    whole, launched = [], []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        pending = pipeline.launch(rows, wanted)
        launched.append(time.perf_counter() - began)
        pending.wait()
        whole.append(time.perf_counter() - began)
    return whole[2:], launched[2:]


def pipelined(pipeline: Pipeline, batches: Sequence[Sequence[Row]]) -> tuple[float, Tensor]:
    """Seconds for all batches, each queued before the one before it is awaited, and their (B, D) vectors."""
    began, found, before = time.perf_counter(), [], None
    for batch in [*batches, None]:
        pending = pipeline.launch(batch, full_width(pipeline, batch)) if batch else None
        if before is not None:
            found.append(before.wait())
        before = pending
    return time.perf_counter() - began, torch.from_numpy(np.concatenate(found))


def full_width(pipeline: Pipeline, rows: Sequence[Row]) -> list[Wanted]:
    """Whole vectors for each of the rows."""
    return [Wanted(pipeline.encoder.manifest.width)] * len(rows)


def ms(seconds: float) -> float:
    """Milliseconds for people."""
    return float(f"{seconds * 1000:.4g}")


def ceilings(report: Report) -> None:
    """Step 1: what the device can do at most, in products of large matrices and in copies."""

    def copy() -> dict[str, float]:
        source = torch.ones((1 << 22) if report.tiny else (1 << 32), dtype=torch.uint8, device=report.device)
        seconds = device_seconds(partial(torch.empty_like(source).copy_, source))
        report.bytes_per_second = float(f"{2 * source.numel() / seconds:.4g}")
        return {"bytes_per_second": report.bytes_per_second}

    def product() -> dict[str, float]:
        report.bf16_flops = best_product(report, plain_product)
        return {"bf16_flops": report.bf16_flops}

    report.step("ceiling bf16", 10, product)
    report.step("ceiling copy", 10, copy)


def best_product(report: Report, prepare: Callable[[Tensor, Tensor], Callable[[], Tensor]]) -> float:
    """The highest rate of several sizes, on random numbers: constants are multiplied faster."""
    best = 0.0
    for m, k, n in [(64, 64, 64)] if report.tiny else [(8192, 8192, 8192), (8192, 4096, 14336), (16384, 4096, 4096)]:
        left, right = (torch.randn(rows, k, device=report.device, dtype=torch.bfloat16) for rows in (m, n))
        best = max(best, 2 * m * k * n / device_seconds(prepare(left, right)))
    return float(f"{best:.4g}")


def plain_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ as it is."""
    return partial(torch.matmul, left, right.t())


def fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ in 8 bits, quantised before."""
    (left8, scale_a), (right8, scale_b) = quantize_rows(left), quantize_rows(right)
    scales = {"scale_a": scale_a, "scale_b": scale_b.t().contiguous()}
    return partial(torch._scaled_mm, left8, right8.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
