"""Step 3: what the device can do at most, in products of large matrices and in copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.gpu.clocks import device_seconds
from bench.gpu.report import Report
from model_store.encoder.quantization import quantize_rows

# M × K by K × N a matrix product


def ceilings(report: Report) -> dict[str, float]:
    """Operations a second of large products, bytes read and written by a copy; NaN where they can't be measured."""
    device = report.device

    def copy() -> dict[str, float]:
        source = torch.ones((1 << 22) if report.tiny else (1 << 32), dtype=torch.uint8, device=device)
        seconds = device_seconds(partial(torch.empty_like(source).copy_, source), device)
        return {"bytes_per_second": float(f"{2 * source.numel() / seconds:.4g}")}

    def product() -> dict[str, float]:
        return {"bf16_flops": best_product(report, plain_product)}

    # What could not be measured leaves its shares NaN, and the times as they are.
    found = {"bf16_flops": math.nan, "bytes_per_second": math.nan}
    return {
        **found,
        **(report.step("ceiling bf16", 10, product) or {}),
        **(report.step("ceiling copy", 10, copy) or {}),
    }


def best_product(report: Report, prepare: Callable[[Tensor, Tensor], Callable[[], Tensor]]) -> float:
    """The highest rate of several sizes, on random numbers: constants are multiplied faster."""
    best = 0.0
    for m, k, n in [(64, 64, 64)] if report.tiny else [(8192, 8192, 8192), (8192, 4096, 14336), (16384, 4096, 4096)]:
        left, right = (torch.randn(rows, k, device=report.device, dtype=torch.bfloat16) for rows in (m, n))
        best = max(best, 2 * m * k * n / device_seconds(prepare(left, right), report.device))
    return float(f"{best:.4g}")


def plain_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ as it is."""
    return partial(torch.matmul, left, right.t())


def fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ in 8 bits, quantised before."""
    (left8, scale_a), (right8, scale_b) = quantize_rows(left), quantize_rows(right)
    scales = {"scale_a": scale_a, "scale_b": scale_b.t().contiguous()}
    return partial(torch._scaled_mm, left8, right8.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
