"""Bidirectional attention over packed texts: one function, registered with transformers under a name per kernel.

The function takes one row of T tokens holding B texts end to end, and lets each token see every token of
its own text and none of another's. transformers builds no mask for its names, because none is registered for
them; a sliding window and soft-capping are honoured here, anything else that would change the result is refused.

A window of w means |i − j| ≤ w. That is what transformers' own bidirectional mask does (a causal one sees w
tokens with its own), so the stored encoder gives the same vectors when it is opened with AutoModel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

# T packed tokens, B texts, S tokens of one text, H query heads, G key/value heads, d head width

Kernel = Literal["sdpa", "torch-flash", "flash-attn"]

# Queries of one text are taken in blocks of this many where a mask or scores must be held in memory.
_QUERY_BLOCK = 512

# Keywords that reach an attention function and say nothing about what it computes over packed texts.
_HARMLESS = frozenset({"is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"})


class AttentionError(ValueError):
    """The model asks of attention what these kernels don't do; serving it would give wrong vectors."""


def implementation_name(kernel: Kernel) -> str:
    """The name to give to transformers as `attn_implementation`.

    A name with "sdpa" or "flash" in it would be checked against what transformers itself can do with that.
    """
    return {
        "sdpa": "llm2vec_loop",
        "torch-flash": "llm2vec_torch_varlen",
        "flash-attn": "llm2vec_package_varlen",
    }[kernel]


@dataclass(frozen=True)
class Layout:
    """Where texts begin in the row, and what the model asks of attention; None where it asks nothing."""

    cu_seqlens: Tensor  # (B + 1,) int32
    longest: int  # tokens of the longest text
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


def packed_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Any device, any dtype: torch's scaled-dot-product attention, one call a text."""
    bounds = layout.cu_seqlens.tolist()
    out = torch.empty_like(query)
    for start, end in pairwise(bounds):
        text = slice(start, end)
        out[:, :, text] = _attend_one_text(query[:, :, text], key[:, :, text], value[:, :, text], layout)
    return out.transpose(1, 2)


def packed_torch_flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """CUDA, sm80 and later, bf16 or fp16: the varlen FlashAttention-2 kernel (Dao 2023) that torch ships."""
    if layout.softcap is not None:
        raise AttentionError("torch's flash kernel has no soft-capping: set LLM2VEC_ATTENTION to flash-attn or sdpa")
    # A longest text of 1 would choose another kernel, for decoding; more than the true length costs nothing.
    max_seqlen = max(layout.longest, 8)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query[0].transpose(0, 1),  # (T, H, d); only the last dimension has to be contiguous
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.cu_seqlens,
        layout.cu_seqlens,
        max_seqlen,
        max_seqlen,
        0.0,
        False,
        False,
        scale=layout.scale,
        window_size_left=layout.window,
        window_size_right=layout.window,
    )[0]
    return out[None]


def packed_flash_attn(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """CUDA, bf16 or fp16: the flash-attn package (FlashAttention-2), which has soft-capping too."""
    from flash_attn import flash_attn_varlen_func

    reach = -1 if layout.window is None else layout.window
    out: Tensor = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens_q=layout.cu_seqlens,
        cu_seqlens_k=layout.cu_seqlens,
        max_seqlen_q=layout.longest,
        max_seqlen_k=layout.longest,
        softmax_scale=layout.scale,
        causal=False,
        window_size=(reach, reach),
        softcap=layout.softcap or 0.0,
    )
    return out[None]


_KERNELS: dict[Kernel, Callable[..., Tensor]] = {
    "sdpa": packed_sdpa,
    "torch-flash": packed_torch_flash,
    "flash-attn": packed_flash_attn,
}


def packed_bidirectional(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """The attention function that transformers calls in each layer, on one kernel.

    `query` is (1, H, T, d), `key` and `value` (1, G, T, d); the result is (1, T, H, d). `cu_seqlens` (B + 1,) and
    `longest` come from the packed batch, as keywords of the model's forward.
    """

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        cu_seqlens: Tensor,
        longest: int,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        **others: Any,
    ) -> tuple[Tensor, None]:
        unknown = {name for name, value in others.items() if value is not None} - _HARMLESS
        if attention_mask is not None or dropout or unknown:
            asked = ", ".join(sorted(unknown)) or ("a mask" if attention_mask is not None else "dropout")
            raise AttentionError(f"the model passes {asked} to attention, which packed attention would ignore")
        return kernel(query, key, value, Layout(cu_seqlens, longest, scaling, sliding_window, softcap)), None

    return attention


for _name, _kernel in _KERNELS.items():
    AttentionInterface.register(implementation_name(_name), packed_bidirectional(_kernel))


def choose_kernel(asked: Kernel | Literal["auto"], device: torch.device, dtype: torch.dtype, softcap: bool) -> Kernel:
    """The kernel for a model on a device: the one asked for if it can serve, else the fastest that can.

    Raises:
        AttentionError: if the kernel asked for can't serve this model here.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    flash_device = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    lacks = {
        "sdpa": "",
        "torch-flash": ""
        if flash_device and half and not softcap
        else "needs CUDA (sm80 or later), a 16-bit dtype and a model without soft-capping",
        "flash-attn": ""
        if flash_device and half and _has_flash_attn()
        else "needs CUDA (sm80 or later), a 16-bit dtype and the flash-attn package",
    }
    if asked != "auto":
        if lacks[asked]:
            raise AttentionError(f"the attention kernel {asked} {lacks[asked]}: set LLM2VEC_ATTENTION=auto")
        return asked
    order: tuple[Kernel, ...] = ("torch-flash", "flash-attn", "sdpa")
    return next(kernel for kernel in order if not lacks[kernel])


def _has_flash_attn() -> bool:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    return True


def _attend_one_text(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """(1, H, S, d) for one text. Cost in memory: one block of queries' scores where there is a mask or a cap."""
    length, window = query.shape[2], layout.window
    if layout.softcap is None and (window is None or length <= window + 1):
        return F.scaled_dot_product_attention(query, key, value, scale=layout.scale, enable_gqa=True)
    out = torch.empty_like(query)
    reach = length if window is None else window
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        first, last = max(start - reach, 0), min(end + reach, length)
        seen = None if window is None else _window_mask(end - start, last - first, start - first, window, query.device)
        block, keys, values = query[:, :, start:end], key[:, :, first:last], value[:, :, first:last]
        if layout.softcap is None:
            out[:, :, start:end] = F.scaled_dot_product_attention(
                block, keys, values, attn_mask=seen, scale=layout.scale, enable_gqa=True
            )
        else:
            out[:, :, start:end] = _soft_capped(block, keys, values, seen, layout.scale, layout.softcap)
    return out


@lru_cache(maxsize=8)
def _window_mask(queries: int, keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: which keys each query sees, where query 0 stands at key `offset`."""
    at = torch.arange(queries, device=device)[:, None] + offset
    return (at - torch.arange(keys, device=device)).abs() <= window


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attention with scores softcap·tanh(score / softcap), as Gemma 2 has them; softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.float().softmax(-1).to(query.dtype) @ value.repeat_interleave(groups, 1)
