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

from model_store.encoder.packing import to_device
from model_store.errors import UserError

# T packed tokens, B texts, S tokens of one text, H query heads, G key/value heads, d head width

Kernel = Literal["sdpa", "torch-flash", "flash-attn"]

# Where scores are held in memory, the queries of one text are taken in blocks of this many: they stay in the cache.
_QUERY_BLOCK = 128

# Texts of up to this many tokens are taken together, padded to a multiple of the second.
_SHORT = 64
_SHORT_STEP = 16

# What the flash kernels take: this compute capability and later, and heads of a multiple of so many numbers at most.
_FLASH_CAPABILITY = (8, 0)
_FLASH_WIDEST = 256
_FLASH_STEP = 8

# Major compute capability → what `torch.nn.attention.activate_flash_attention_impl` calls kernels made for such GPUs.
_NEWER_FLASH = {9: ("FA3", "FA4"), 10: ("FA4",)}

# Keywords that reach an attention function and say nothing about what it computes over packed texts.
_HARMLESS = frozenset({"is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"})


class AttentionError(UserError):
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
    longest: int  # at least the tokens of the longest text, and never 1: that would choose a kernel for decoding
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0  # of attention weights, while training


def packed_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Any device, any dtype: each text on its own, through torch's scaled-dot-product attention or matrix products."""
    scale = query.shape[-1] ** -0.5 if layout.scale is None else layout.scale
    if layout.dropout or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return _attend_differentiably(query[0], key[0], value[0], layout, scale)[None]
    attended: Tensor = _attend_each_text(query, key, value, layout.cu_seqlens, scale, layout.window, layout.softcap)
    return attended


def packed_torch_flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """CUDA, sm80 and later, bf16 or fp16: the varlen FlashAttention-2 kernel (Dao 2023) that torch ships.

    Or a later one, where `torch.nn.attention.activate_flash_attention_impl` has put it in that kernel's place.
    """
    if layout.softcap is not None:
        raise AttentionError("torch's flash kernel has no soft-capping: set LLM2VEC_ATTENTION to flash-attn or sdpa")
    width = query.shape[-1]
    scale = width**-0.5 if layout.scale is None else layout.scale
    if width % _FLASH_STEP:  # zeros behind a head change no product
        query, key, value = (F.pad(part, (0, -width % _FLASH_STEP)) for part in (query, key, value))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query[0].transpose(0, 1),  # (T, H, d); only the last dimension has to be contiguous
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.cu_seqlens,
        layout.cu_seqlens,
        layout.longest,
        layout.longest,
        layout.dropout,
        False,
        False,
        scale=scale,
        window_size_left=layout.window,
        window_size_right=layout.window,
    )[0]
    return out[None, ..., :width]


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
        dropout_p=layout.dropout,
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
        if attention_mask is not None or unknown:
            asked = ", ".join(sorted(unknown)) or "a mask"
            raise AttentionError(f"the model passes {asked} to attention, which packed attention would ignore")
        return kernel(query, key, value, Layout(cu_seqlens, longest, scaling, sliding_window, softcap, dropout)), None

    return attention


for _name, _kernel in _KERNELS.items():
    AttentionInterface.register(implementation_name(_name), packed_bidirectional(_kernel))


def newer_flash(device: torch.device) -> tuple[str, ...]:
    """FlashAttentions that torch can put in the place of its own on this GPU, the fastest first, installed or not."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):  # before torch 2.11
        return ()
    return _NEWER_FLASH.get(torch.cuda.get_device_capability(device)[0], ())


@dataclass(frozen=True)
class Demand:
    """What a kernel has to serve, and where: `capability` is a GPU's, None on the CPU."""

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_width: int
    softcap: bool = False
    package: bool = False  # whether flash-attn is installed

    @classmethod
    def of(cls, config: Any, device: torch.device, dtype: torch.dtype) -> Demand:
        """Of a decoder with this transformers configuration."""
        return cls(
            torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            dtype,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            getattr(config, "attn_logit_softcapping", None) is not None,
            _has_flash_attn(),
        )


def kernel_lacks(kernel: Kernel, demand: Demand) -> str:
    """Why a kernel can't serve; empty if it can. A sliding window is no matter: all kernels have it."""
    if kernel == "sdpa":
        return ""
    if demand.capability is None or demand.capability < _FLASH_CAPABILITY:
        found = "a CPU" if demand.capability is None else f"compute capability {'.'.join(map(str, demand.capability))}"
        return f"a GPU of compute capability 8.0 or later, not {found}"
    if demand.dtype not in (torch.bfloat16, torch.float16):
        return f"a 16-bit dtype, not {str(demand.dtype).removeprefix('torch.')}"
    if demand.head_width > _FLASH_WIDEST:
        return f"heads of at most {_FLASH_WIDEST} numbers, not {demand.head_width}"
    if kernel == "torch-flash" and demand.softcap:
        return "a model without soft-capping of attention"
    if kernel == "flash-attn" and not demand.package:
        return "the flash-attn package"
    return ""


def choose_kernel(asked: Kernel | Literal["auto"], device: torch.device, dtype: torch.dtype, config: Any) -> Kernel:
    """The kernel for a decoder's configuration on a device: the one asked for, or the fastest that can serve it.

    Raises:
        AttentionError: if the kernel asked for can't serve this model here.
    """
    demand = Demand.of(config, device, dtype)
    if asked == "auto":
        order: tuple[Kernel, ...] = ("torch-flash", "flash-attn", "sdpa")
        return next(kernel for kernel in order if not kernel_lacks(kernel, demand))
    if lacks := kernel_lacks(asked, demand):
        raise AttentionError(f"the attention kernel {asked} needs {lacks}: set LLM2VEC_ATTENTION=auto")
    return asked


def _has_flash_attn() -> bool:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    return True


def attend_each_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(1, T, H, d) for packed texts. With `cu_seqlens` on the host it waits for no device."""
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    # Where several heads share their keys, one matrix product serves them all, and on a CPU with 16-bit
    # products that is up to twice as fast as the fused kernel, which takes each head by itself.
    by_products = query.device.type == "cpu" and query.dtype != torch.float32 and query.shape[1] > key.shape[1]
    short: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(cu_seqlens.tolist()):
        masked = window is not None and end - start > window + 1
        special = masked or softcap is not None
        if end - start <= _SHORT and not special:
            short.setdefault(-(-(end - start) // _SHORT_STEP) * _SHORT_STEP, []).append((start, end))
            continue
        text = (slice(None), slice(start, end))
        block = (query[0][text], key[0][text], value[0][text])
        if special or by_products:
            out[0, start:end] = _scored(*block, scale, window if masked else None, softcap).transpose(0, 1)
        else:
            rows, keys, values = (part[None] for part in block)
            attended = F.scaled_dot_product_attention(rows, keys, values, scale=scale, enable_gqa=True)
            out[0, start:end] = attended[0].transpose(0, 1)
    for length, texts in short.items():
        _attend_short(query[0], key[0], value[0], out[0], length, texts, scale, by_products)
    return out


# One operation to torch.compile, so that the loop over texts does not break the layer's graph.
_attend_each_text = torch.library.custom_op("llm2vec::attend_each_text", mutates_args=())(attend_each_text)


@_attend_each_text.register_fake
def _(query: Tensor, *others: object) -> Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def _attend_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    length: int,
    texts: list[tuple[int, int]],
    scale: float,
    by_products: bool,
) -> None:
    """Fill `out` (T, H, d) for n texts of at most `length` tokens, all of them at once.

    Dozens of short texts fit into a batch, and a call for each costs more than its arithmetic: above all where a core
    is shared, as every parallel step then waits for the thread that was interrupted. Each text is padded to a length
    that depends on its own alone, so that its products have the same shapes in every batch: see docs/fidelity.md.
    """
    heads, width, groups = query.shape[0], query.shape[2], key.shape[0]
    plan = _short_plan(tuple(texts), length, query.device)
    queries, keys, values = (
        part.index_select(1, plan["places"]).unflatten(1, (len(texts), length)).transpose(0, 1)
        for part in (query, key, value)
    )  # (n, H or G, length, d)
    there = plan["there"].view(len(texts), length)
    if by_products:
        by_group = queries.reshape(len(texts) * groups, -1, width)  # (n·G, H/G · length, d)
        keys, values = keys.reshape(-1, length, width), values.reshape(-1, length, width)
        scores = torch.baddbmm(query.new_empty(1), by_group, keys.transpose(1, 2), beta=0, alpha=scale)
        scores.view(len(texts), -1, length).masked_fill_(~there[:, None], float("-inf"))
        attended = torch.bmm(scores.softmax(-1), values).view(len(texts), heads, length, width)
    else:
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=there[:, None, None], scale=scale, enable_gqa=True
        )
    out[plan["taken"]] = attended.transpose(1, 2).flatten(0, 1)[plan["filled"]]


@lru_cache(maxsize=8)
def _short_plan(texts: tuple[tuple[int, int], ...], length: int, device: torch.device) -> dict[str, Tensor]:
    """Where n texts, padded to `length`, come from and go to, made on the host: a device would have to be waited for.

    `places` (n·length,) are the tokens to take, `there` which of them are not padding, and `filled` and `taken` these
    tokens' places among the padded and in the row. All layers of a forward pass ask for the same.
    """
    bounds = torch.tensor(texts)
    at = bounds[:, :1] + torch.arange(length)  # (n, length)
    there = at < bounds[:, 1:]
    places = at.minimum(bounds[:, 1:] - 1)  # padding repeats the last token, and is not seen
    filled = there.flatten().nonzero()[:, 0]
    plan = {"places": places.flatten(), "filled": filled, "taken": at[there], "there": there.flatten()}
    return to_device(plan, device)


def _scored(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """(H, S, d) for one text, by scores in memory: those of one block of queries at a time.

    With `softcap` scores are softcap·tanh(score / softcap), as Gemma 2 has them; softmax sums in float32.
    """
    heads, length, width = query.shape
    groups = key.shape[0]
    by_group = query.view(groups, heads // groups, length, width)
    out = torch.empty_like(by_group, memory_format=torch.contiguous_format)
    reach = length if window is None else window
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        first, last = max(start - reach, 0), min(end + reach, length)
        block = by_group[:, :, start:end].reshape(groups, -1, width)  # (G, H/G · queries, d)
        keys = key[:, first:last].transpose(1, 2)
        scores = torch.baddbmm(query.new_empty(1), block, keys, beta=0, alpha=scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if window is not None:
            unseen = _window_mask(end - start, last - first, start - first, window, query.device)
            scores.view(groups, -1, end - start, last - first).masked_fill_(unseen, float("-inf"))
        attended = torch.bmm(scores.softmax(-1), value[:, first:last])
        out[:, :, start:end] = attended.view(groups, -1, end - start, width)
    return out.view(heads, length, width)


@lru_cache(maxsize=8)
def _window_mask(queries: int, keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: which keys each query must not see, where query 0 stands at key `offset`."""
    at = torch.arange(queries, device=device)[:, None] + offset
    return (at - torch.arange(keys, device=device)).abs() > window


def _attend_differentiably(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """(T, H, d) with gradients and dropout, of (H, T, d): texts of about one length together, by scores in memory."""
    heads, tokens, width = query.shape
    groups = key.shape[0]
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(layout.cu_seqlens.tolist()):
        by_length.setdefault(-(-(end - start) // _SHORT_STEP) * _SHORT_STEP, []).append((start, end))
    parts, places = [], []
    for length, texts in by_length.items():
        bounds = torch.tensor(texts, device=query.device)
        at = bounds[:, :1] + torch.arange(length, device=query.device)  # (n, length)
        there = at < bounds[:, 1:]
        filled, taken = there.flatten().nonzero()[:, 0], at[there]
        queries, keys, values = (
            _spread_rows(part.transpose(0, 1), taken, filled, at.numel()).view(*at.shape, -1, width).transpose(1, 2)
            for part in (query, key, value)
        )  # (n, H or G, length, d)
        by_group = queries.reshape(len(texts) * groups, -1, width)  # (n·G, H/G · length, d)
        keys, values = keys.reshape(-1, length, width), values.reshape(-1, length, width)
        scores = torch.baddbmm(query.new_empty(1), by_group, keys.transpose(1, 2), beta=0, alpha=scale)
        if layout.softcap is not None:
            scores = layout.softcap * torch.tanh(scores / layout.softcap)
        unseen = ~there[:, None, :]  # (n, 1 or queries, keys)
        if layout.window is not None and length > layout.window + 1:
            # Padding sees the whole text: what sees nothing is NaN, and its gradient everyone's.
            far = _window_mask(length, length, 0, layout.window, query.device) & there[:, :, None]
            unseen = unseen | far
        scores = scores.view(len(texts), -1, unseen.shape[1], length).masked_fill(unseen[:, None], float("-inf"))
        weights = F.dropout(scores.softmax(-1), layout.dropout).view(len(texts) * groups, -1, length)
        attended = torch.bmm(weights, values).view(len(texts), heads, length, width)
        parts.append(_spread_rows(attended.transpose(1, 2).flatten(0, 1), filled, None, len(filled)))
        places.append(taken)
    return _spread_rows(torch.cat(parts), None, torch.cat(places), tokens)


class _Spread(torch.autograd.Function):
    """Rows `taken` of x, put at rows `filled` of zeros (rows, …); all of them where None.

    Its gradient is itself with the two exchanged; that of indexing allows for repeated rows, and is much slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor | None, filled: Tensor | None, rows: int) -> Tensor:
        ctx.rows, ctx.taken, ctx.filled = len(x), taken, filled
        return _spread(x, taken, filled, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _spread(gradients[0], ctx.filled, ctx.taken, ctx.rows), None, None, None


_spread_rows: Callable[..., Tensor] = _Spread.apply


def _spread(x: Tensor, taken: Tensor | None, filled: Tensor | None, rows: int) -> Tensor:
    picked = x if taken is None else x[taken]
    if filled is None:
        return picked
    out = x.new_zeros(rows, *x.shape[1:])
    out[filled] = picked
    return out
