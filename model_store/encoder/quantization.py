"""The decoder's linear layers in 8-bit floats, for GPUs that multiply them: half the memory, more tokens a second.

It must be asked for, because the vectors move: they are near the bfloat16 vectors but not equal to them, and have their
own embedding space. Its speed depends on torch.compile, which quantises an input in one kernel, and on merged layers
(merged_linear), which share that input.

Knows decoders and their linear layers; nothing of attention, files or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_store.errors import UserError

# T packed tokens, K inputs and N outputs of a layer

Quantization = Literal["none", "fp8", "int8"]

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max  # 448

# The kernel needs multiples of this as numbers of inputs and outputs.
_MULTIPLE = 16

WAY_OUT = "set LLM2VEC_QUANTIZATION=none"


class QuantizationError(UserError):
    """The model, its dtype or the device does not allow this quantisation."""


class Fp8Linear(nn.Module):
    """nn.Linear with weight and input in float8 e4m3 (Micikevicius et al. 2022), bfloat16 out; inference only.

    The weight has one float32 scale for each output, computed once. The input has one for each token, computed on the
    device in each forward pass: a token's scale depends on its own numbers alone.
    """

    weight: Tensor  # (N, K) float8
    weight_scale: Tensor  # (1, N) float32
    bias: Tensor | None  # (N,)

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        """Quantise a layer on any device. Takes 7 bytes for each weight on `device` meanwhile, and 1 afterwards.

        Raises:
            QuantizationError: if a size of the layer is no multiple of 16.
        """
        super().__init__()
        _require_sizes("the layer", linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach().to(device))
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale.t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(device))

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        x8, scale = quantize_rows(x.flatten(0, -2))
        return self.product(x8, scale, x.dtype).view(*x.shape[:-1], -1)

    def product(self, x8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, K) float8 and its (T, 1) scales → (T, N) bfloat16."""
        # With fast accumulation sums stay in the tensor cores and lose a few bits, which float8 lacks anyway.
        out: Tensor = torch._scaled_mm(
            x8,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out


class EmulatedFp8Linear(Fp8Linear):
    """The slow twin, for tests and benchmarks on any device; `quantize_fp8` never makes one."""

    def product(self, x8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The same numbers multiplied in `dtype`: every float8 e4m3 value is exact in bfloat16 and in float32."""
        out = F.linear(x8.to(dtype), self.weight.to(dtype)) * scale * self.weight_scale
        return (out if self.bias is None else out + self.bias).to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) → float8 (R, K) and float32 scales (R, 1), with x ≈ float8 · scale; a row's largest number becomes ±448.

    The error is at most 1/16 of a number (3 bits after the leading one) or, near 0, scale / 1024. A row with NaN or
    infinity gets NaN in its numbers or its scale, so the product shows it.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / _LARGEST).clamp(min=1e-12)
    # The quotient may be one float32 step above 448, which still rounds to 448.
    return (x / scale).to(_FP8), scale


def quantize_fp8(model: Any, device: torch.device) -> None:
    """Replace the linear layers of `model`, a bare decoder, by quantised ones on `device`; the rest stays as it is.

    Call this before the model goes to the device: then at most one large weight is on the device at a time.

    Raises:
        QuantizationError: if the device, the model's dtype or a layer's size does not allow it.
    """
    _require_kernel(device)
    for name, linear in linears_of(model).items():
        _require_sizes(name, linear)
        if linear.weight.dtype != torch.bfloat16:
            dtype = str(linear.weight.dtype).removeprefix("torch.")
            raise QuantizationError(
                f"fp8 layers give bfloat16, but the encoder is {dtype}: set LLM2VEC_DTYPE=bfloat16, or {WAY_OUT}"
            )
    replace_linears(model, lambda linear: Fp8Linear(linear, device))


def emulate_fp8(model: Any) -> None:
    """Do as `quantize_fp8` with the slow twin, on the model's own device: for tests and benchmarks only."""
    replace_linears(model, lambda linear: EmulatedFp8Linear(linear, linear.weight.device))


def replace_linears(model: Any, make: Callable[[nn.Linear], nn.Module], within: str = "") -> None:
    """Put make(linear) in the place of each linear layer inside the decoder's layers; each old weight is freed in turn.

    Only layers whose names contain `within`, such as ".mlp.", are replaced.
    """
    for name in [name for name in linears_of(model) if within in name]:
        model.set_submodule(name, make(model.get_submodule(name)))


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """The linear layers inside the decoder's layers, by name: not the embedding table, and no norm."""
    modules = model.layers.named_modules(prefix="layers")
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def _require_sizes(name: str, linear: nn.Linear) -> None:
    if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
        raise QuantizationError(
            f"fp8 needs layer sizes that are multiples of {_MULTIPLE}, but {name} has {linear.in_features} inputs "
            f"and {linear.out_features} outputs: {WAY_OUT}"
        )


def _require_kernel(device: torch.device) -> None:
    """Try the kernel itself: some builds of torch lack it for GPUs whose compute capability is high enough."""
    needs = "fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper and newer)"
    if device.type != "cuda":
        raise QuantizationError(f"{needs}, but the device is the {device.type}: {WAY_OUT}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        raise QuantizationError(f"{needs}, but {found}: {WAY_OUT}")
    try:
        layer = Fp8Linear(nn.Linear(256, 256, dtype=torch.bfloat16), device)
        layer(torch.ones(16, 256, dtype=torch.bfloat16, device=device)).cpu()
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        raise QuantizationError(f"this torch can't multiply fp8 on {name} ({error}): {WAY_OUT}") from error
