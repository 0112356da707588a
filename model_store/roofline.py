"""What the arithmetic of an encoder comes to, and what a device can do at most: the two sides of its utilisation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# S tokens of one text

# Rows and columns of the square product whose rate counts as the device's limit: large enough to fill it.
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
_GEMM_ROUNDS = 5


def linear_flops_per_token(model: Any) -> int:
    """2 for each weight of the layers' matrix products; the embedding table is only looked up."""
    modules = (module for layer in model.layers for module in layer.modules())
    return 2 * sum(
        int(module.in_features * module.out_features) for module in modules if hasattr(module, "in_features")
    )


def attention_flops(config: Any, lengths: Iterable[int]) -> int:
    """4·S·S·(heads · head width) for each text and layer: scores and their product with the values.

    In layers with a sliding window a token meets at most 2·window + 1 others.
    """
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or _even_head_width(config))
    windows = [_window(config, layer) for layer in range(config.num_hidden_layers)]
    texts = list(lengths)
    return sum(
        4 * length * min(length, 2 * window + 1 if window else length) * width * windows.count(window)
        for window in set(windows)
        for length in texts
    )


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few large square matrix products, in operations a second."""
    size = _GEMM_SIZE[device.type]
    # Random numbers, as the multiplication of equal ones takes less power, and a GPU then runs faster than it will.
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = min(_seconds(left, right) for _ in range(_GEMM_ROUNDS))
    return float(2 * size**3 / best)


def _seconds(left: Tensor, right: Tensor) -> float:
    began = time.perf_counter()
    product = left @ right
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - began


def _window(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    return window if window and (kinds is None or kinds[layer] == "sliding_attention") else None


def _even_head_width(config: Any) -> int:
    return int(config.hidden_size // config.num_attention_heads)
