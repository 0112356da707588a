"""The decoder's linear layers in 8-bit integers, for CPUs that multiply them: more tokens a second, half the memory.

It must be asked for, because the vectors move, as with fp8 (quantization). An input gets one scale a token; a weight
gets one scale an output. Decoders have a few input channels that are many times larger than the others, and would leave
those only a few of the 255 steps. So each channel of an input is divided by a factor, by which the weight's column is
multiplied (SmoothQuant, Xiao et al. 2023); the factors come from the largest inputs that a calibration saw. Sums of
integers are exact: a token's result has the same bits in every batch.

Knows decoders and their linear layers; nothing of attention or requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from model_store.encoder.cpu_linear import keep, kept
from model_store.encoder.quantization import WAY_OUT, QuantizationError, linears_of

# T packed tokens, K inputs and N outputs of a layer

_LARGEST = 127

# oneDNN's products take an unsigned input: 128 stands for 0.
_ZERO = 128

# How far the factors even out the inputs' channels (1) rather than the weight's columns (0). On the demo 0.6 and 0.65
# lost least, of 0.3 to 0.75.
_EVENNESS = 0.6


class Int8Linear(nn.Module):
    """nn.Linear with weight and input in 8-bit integers; inference only, on a CPU."""

    inverse_factors: Tensor  # (K,) float32
    weight_scale: Tensor  # (N,) float32
    zeros: Tensor  # (N,) int32
    number: Tensor
    bias: Tensor | None  # (N,)

    def __init__(self, linear: nn.Linear, largest_inputs: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        factors = smoothing_factors(linear.weight, largest_inputs)
        steps, scale = in_steps(linear.weight.detach() * factors)
        self._weight = torch.ops.onednn.qlinear_prepack(steps.to(torch.int8), None)
        for name, tensor in {
            "inverse_factors": 1 / factors,
            "weight_scale": scale[:, 0],
            "zeros": torch.zeros(len(steps), dtype=torch.int32),
            "number": keep(self._weight),
            "bias": None if linear.bias is None else linear.bias.detach(),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        steps, scale = in_steps(x * self.inverse_factors)
        out: Tensor = _product((steps + _ZERO).to(torch.uint8), self.number, self.weight_scale, self.zeros) * scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class EmulatedInt8Linear(nn.Module):
    """The slow twin, in float32 on any device; `quantize_int8` never makes one."""

    def __init__(self, linear: nn.Linear, largest_inputs: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.factors, self.bias = smoothing_factors(linear.weight, largest_inputs), linear.bias
        steps, scale = in_steps(linear.weight.detach() * self.factors)
        self.weight = steps * scale

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        steps, scale = in_steps(x * (1 / self.factors))
        out = F.linear(steps * scale, self.weight)
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def in_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 (…, K) → whole numbers in float32 (…, K) and scales (…, 1), with x ≈ number · scale.

    A row's largest number becomes ±127, and the error is at most half a scale. A row with NaN or infinity gets such a
    scale, so the product shows it.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp(min=1e-12)
    return (x / scale).round(), scale


def smoothing_factors(weight: Tensor, largest_inputs: Tensor) -> Tensor:
    """The (K,) factors for a weight (N, K) whose inputs were at most this large, (K,), as absolute numbers.

    Their geometric mean is 1. A channel that was always 0, or whose weights are, gets the factor of a tiny number.
    """
    inputs = largest_inputs.float().clamp(min=1e-5)
    weights = weight.detach().float().abs().amax(dim=0).clamp(min=1e-5)
    factors = inputs**_EVENNESS / weights ** (1 - _EVENNESS)
    evened: Tensor = factors / factors.log().mean().exp()
    return evened


def quantize_int8(model: Any, device: torch.device, largest_inputs: Mapping[str, Tensor]) -> None:
    """Replace the linear layers of `model`, a bare decoder, in place, by the largest inputs of each layer.

    Layers that have none stay as they are.

    Raises:
        QuantizationError: if the device does not multiply 8-bit integers.
    """
    _require_products(device)
    for name in linears_of(model):
        if (found := largest_inputs.get(layers_input(name))) is not None:
            model.set_submodule(name, Int8Linear(model.get_submodule(name), found))


def layers_input(name: str) -> str:
    """The name under which a layer's input stands in a calibration: layers that read the same input have one name.

    A merged product (merged_linear) goes by the first layer that it serves. Up goes by gate, which may not be merged.
    """
    name = name.removesuffix(".product.linear")
    return f"{name.removesuffix('up_proj')}gate_proj" if name.endswith(".up_proj") else name


def read_calibration(folder: Path) -> dict[str, Tensor]:
    """The largest inputs, (K,), of each layer to quantise, by name; build.calibration makes them.

    Raises:
        QuantizationError: if the folder has no calibration.
    """
    from model_store.manifest import CALIBRATION_FILE  # needs pydantic, and an encoder made in memory does not

    path = folder / CALIBRATION_FILE
    if not path.is_file():
        raise QuantizationError(
            f"int8 needs a calibration, and {folder} was stored before there was one: remove the folder and build it "
            f"again, or {WAY_OUT}"
        )
    return load_file(path)


def _require_products(device: torch.device) -> None:
    """Try the product itself, with the largest numbers: CPUs without VNNI or AMX would round sums to 16 bits."""
    if device.type != "cpu":
        raise QuantizationError(f"int8 is for CPUs, but the device is {device}: set LLM2VEC_QUANTIZATION=fp8 or none")
    needs = "int8 needs a CPU that multiplies 8-bit integers (AVX-VNNI, AVX-512-VNNI or AMX)"
    x = torch.full((16, 256), 255, dtype=torch.uint8)
    weight = torch.full((64, 256), _LARGEST, dtype=torch.int8)
    ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        found = _product(x, keep(packed), ones, zeros)
    except RuntimeError as error:
        raise QuantizationError(f"{needs}, but here torch says: {error}: {WAY_OUT}") from error
    if not torch.all(found == 256 * (255 - _ZERO) * _LARGEST):
        raise QuantizationError(f"{needs}, and this one gives other sums: {WAY_OUT}")


@torch.library.custom_op("llm2vec::int8_product", mutates_args=())
def _product(x: Tensor, number: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """uint8 (…, K) → (x − 128) · weight · scale, float32 (…, N)."""
    arguments: Any = (x, 1.0, _ZERO, kept(number), scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(*arguments)  # type: ignore[no-any-return]


@_product.register_fake
def _(x: Tensor, number: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(scale), dtype=torch.float32)
