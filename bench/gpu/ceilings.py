"""What the device can do at most: products of large matrices, and copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.gpu.clocks import device_seconds
from bench.gpu.report import Report
from model_store.quantization import quantize_rows
from model_store.roofline import gemm_flops_per_second

# M × K by K × N a matrix product


def ceilings(report: Report) -> dict[str, float]:
    """Operations a second of large matrix products, and bytes read and written by a copy; what is missing failed."""
    device, real = report.device, report.shapes == "real"

    def copy_and_roofline() -> dict[str, float]:
        source = torch.ones((1 << 32) if real else (1 << 22), dtype=torch.uint8, device=device)
        copy = partial(torch.empty_like(source).copy_, source)
        found = {"bytes_per_second": 2 * source.numel() / device_seconds(copy, device)}
        return found | ({"flops_by_roofline.py": gemm_flops_per_second(device, torch.bfloat16)} if real else {})

    fp8_lacks = report.needs_cuda()
    return {
        **(report.step("ceiling bf16", 10, lambda: {"bf16_flops": best_product(device, real, plain_product)}) or {}),
        **(report.step("ceiling copy", 10, copy_and_roofline) or {}),
        **(
            report.step("ceiling fp8", 10, lambda: {"fp8_flops": best_product(device, real, fp8_product)}, fp8_lacks)
            or {}
        ),
    }


def best_product(device: torch.device, real: bool, prepare: Callable[[Tensor, Tensor], Callable[[], Tensor]]) -> float:
    """The highest rate of several sizes, on random numbers: constants are multiplied faster."""
    best = 0.0
    for m, k, n in [(8192, 8192, 8192), (8192, 4096, 14336), (16384, 4096, 4096)] if real else [(64, 64, 64)]:
        left, right = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
        best = max(best, 2 * m * k * n / device_seconds(prepare(left, right), device))
    return float(f"{best:.4g}")


def plain_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ as it is."""
    return partial(torch.matmul, left, right.t())


def fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ in 8 bits, quantised before."""
    (left8, scale_a), (right8, scale_b) = quantize_rows(left), quantize_rows(right)
    scales = {"scale_a": scale_a, "scale_b": scale_b.t().contiguous()}
    return partial(torch._scaled_mm, left8, right8.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
