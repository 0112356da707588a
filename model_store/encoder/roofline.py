"""A device's highest rate of arithmetic, measured: the limit with which an encoder's rate is compared."""

from __future__ import annotations

import time

import torch
from torch import Tensor

# Rows and columns of the square matrix product whose rate counts as the device's limit. They grow until a product takes
# _ENOUGH_SECONDS, and so fills the device.
_GEMM_SIZES = (1024, 2048, 4096, 8192)
_ENOUGH_SECONDS = 1e-3
_GEMM_ROUNDS = 5


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few large square matrix products, in operations a second."""
    for size in _GEMM_SIZES:
        # Random numbers: multiplying equal ones takes less power, and a GPU then runs faster than it can for long.
        left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        best = min(_seconds(left, right) for _ in range(_GEMM_ROUNDS))
        if best >= _ENOUGH_SECONDS:
            break
    return float(2 * size**3 / best)


def _seconds(left: Tensor, right: Tensor) -> float:
    began = time.perf_counter()
    product = left @ right
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - began
