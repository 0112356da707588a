"""Attention over packed texts: one function, registered with transformers under one name per kernel.

transformers calls the function in each layer with the whole batch as one row: T tokens that hold B texts end to end.
Positions restart for each text, and `cu_seqlens` tells where texts begin, so that each token sees the tokens of its own
text and none of another's: all of them, or with `is_causal` in the model's configuration those up to itself.
transformers builds no mask, because none is registered under these names. A sliding window and soft-capping are applied
here; any other request that would change the result is refused.

A window of w means what it means in transformers' own masks, so the stored encoder gives the same vectors when
AutoModel opens it: |i − j| ≤ w if attention is bidirectional; w tokens, the token itself included, if it is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from model_store.encoder.attention_cpu import Scores, attend
from model_store.errors import UserError

# T packed tokens, B texts, H query heads, G key/value heads, d head width

Kernel = Literal["sdpa", "torch-flash", "flash-attn"]

# The flash kernels need this compute capability or a later one, and heads of a multiple of _FLASH_STEP numbers, at most
# _FLASH_WIDEST.
_FLASH_CAPABILITY = (8, 0)
_FLASH_WIDEST = 256
_FLASH_STEP = 8

# Major compute capability → the names by which `torch.nn.attention.activate_flash_attention_impl` knows the kernels
# made for such GPUs.
_NEWER_FLASH = {9: ("FA3", "FA4"), 10: ("FA4",)}

# Keywords that reach an attention function but change nothing about attention over packed texts.
_HARMLESS = frozenset({"is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"})


class AttentionError(UserError):
    """The model needs a kind of attention that these kernels don't compute; serving it would give wrong vectors."""


@dataclass(frozen=True)
class Layout:
    """Where texts begin in the row, and the model's options of attention; None stands for an option not in use."""

    cu_seqlens: Tensor  # (B + 1,) int32
    longest: int  # at least the tokens of the longest text, and never 1, which would choose a kernel for decoding
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0  # of attention weights, in training only
    causal: bool = False

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How many tokens before itself and after itself a token sees, None for all."""
        if self.causal:
            return None if self.window is None else self.window - 1, 0
        return self.window, self.window


def packed_attention(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """The attention function that transformers calls in each layer, computed by one kernel.

    `query` is (1, H, T, d), `key` and `value` are (1, G, T, d), and the result is (1, T, H, d). `cu_seqlens` (B + 1,)
    and `longest` belong to the packed batch, and are given to the model's forward as keywords.
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
        causal = getattr(module.config, "is_causal", True)
        layout = Layout(cu_seqlens, longest, scaling, sliding_window, softcap, dropout, causal)
        return kernel(query, key, value, layout), None

    return attention


def packed_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Any device, any dtype, gradients too: torch's own operations, text by text."""
    scale = query.shape[-1] ** -0.5 if layout.scale is None else layout.scale
    return attend(query, key, value, layout.cu_seqlens, Scores(scale, *layout.reach, layout.softcap), layout.dropout)


def packed_torch_flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """CUDA, sm80 and later, bf16 or fp16: the varlen FlashAttention-2 kernel (Dao 2023) that torch ships.

    `torch.nn.attention.activate_flash_attention_impl` can put a later kernel in its place.
    """
    if layout.softcap is not None:
        raise AttentionError("torch's flash kernel has no soft-capping: set LLM2VEC_ATTENTION to flash-attn or sdpa")
    width = query.shape[-1]
    scale = width**-0.5 if layout.scale is None else layout.scale
    left, right = layout.reach
    if width % _FLASH_STEP:  # zeros behind a head change no product
        query, key, value = (F.pad(part, (0, -width % _FLASH_STEP)) for part in (query, key, value))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query[0].transpose(0, 1),  # (T, H, d); only its last dimension has to be contiguous
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.cu_seqlens,
        layout.cu_seqlens,
        layout.longest,
        layout.longest,
        layout.dropout,
        layout.causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out[None, ..., :width]


def packed_flash_attn(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """CUDA, bf16 or fp16: the flash-attn package (FlashAttention-2), which has soft-capping as well."""
    from flash_attn import flash_attn_varlen_func

    left, right = (-1 if reach is None else reach for reach in layout.reach)
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
        causal=layout.causal,
        window_size=(left, right),
        softcap=layout.softcap or 0.0,
    )
    return out[None]


# Each kernel behind its name in transformers. That contains neither "sdpa" nor "flash": transformers would apply the
# checks of its own kernels to such names.
_KERNELS: dict[Kernel, tuple[str, Callable[..., Tensor]]] = {
    "sdpa": ("llm2vec_loop", packed_sdpa),
    "torch-flash": ("llm2vec_torch_varlen", packed_torch_flash),
    "flash-attn": ("llm2vec_package_varlen", packed_flash_attn),
}

for _name, _kernel in _KERNELS.values():
    AttentionInterface.register(_name, packed_attention(_kernel))


def implementation_name(kernel: Kernel) -> str:
    """The name to give to transformers as `attn_implementation`."""
    return _KERNELS[kernel][0]


def kernel_lacks(
    kernel: Kernel,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_width: int,
    softcap: bool = False,
    package: bool = False,
) -> str:
    """What a kernel that can't serve would need; empty if it can serve. Every kernel has sliding windows.

    `capability` is the GPU's, None on the CPU; `package` says whether flash-attn is installed.
    """
    if kernel == "sdpa":
        return ""
    if capability is None or capability < _FLASH_CAPABILITY:
        found = "a CPU" if capability is None else f"compute capability {'.'.join(map(str, capability))}"
        return f"a GPU of compute capability 8.0 or later, not {found}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"a 16-bit dtype, not {str(dtype).removeprefix('torch.')}"
    if head_width > _FLASH_WIDEST:
        return f"heads of at most {_FLASH_WIDEST} numbers, not {head_width}"
    if kernel == "torch-flash" and softcap:
        return "a model without soft-capping of attention"
    if kernel == "flash-attn" and not package:
        return "the flash-attn package"
    return ""


def choose_kernel(asked: Kernel | Literal["auto"], device: torch.device, dtype: torch.dtype, config: Any) -> Kernel:
    """The kernel for a decoder's configuration on a device: the one asked for; with `auto` the fastest that can serve.

    Raises:
        AttentionError: if the kernel asked for can't serve this model on this device.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softcap, package = getattr(config, "attn_logit_softcapping", None) is not None, _has_flash_attn()
    order: tuple[Kernel, ...] = ("torch-flash", "flash-attn", "sdpa") if asked == "auto" else (asked,)
    for kernel in order:
        if not (lacks := kernel_lacks(kernel, capability, dtype, head_width, softcap, package)):
            return kernel
    raise AttentionError(f"the attention kernel {asked} needs {lacks}: set LLM2VEC_ATTENTION=auto")


def _has_flash_attn() -> bool:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    return True


def newer_flash(device: torch.device) -> tuple[str, ...]:
    """The later FlashAttentions that torch could use on this GPU, the fastest first, installed or not."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):  # before torch 2.11
        return ()
    return _NEWER_FLASH.get(torch.cuda.get_device_capability(device)[0], ())
