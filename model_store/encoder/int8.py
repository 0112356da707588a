"""The decoder's linear layers in 8-bit integers, for CPUs that multiply them: more tokens a second, half the memory.

It must be asked for, because the vectors move, as with fp8 (quantization). An input gets one scale a token; a weight
gets one scale an output. Decoders have a few input channels that are many times larger than the others, and would leave
those only a few of the 255 steps. So each channel of an input is divided by a factor, by which the weight's column is
multiplied (SmoothQuant, Xiao et al. 2023); the factors come from the largest inputs that a calibration saw. Sums of
integers are exact: a token's result has the same bits in every batch.

Knows decoders and their linear layers; nothing of attention or requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_store.encoder.cpu_linear import keep, kept
from model_store.encoder.quantization import WAY_OUT, QuantizationError, linears_of

# T packed tokens, K inputs and N outputs of a layer

CALIBRATION_FILE = "int8.safetensors"

_LARGEST = 127

# oneDNN's products take an unsigned input: 128 stands for 0.
_ZERO = 128

# How far the factors even out the inputs' channels (1) rather than the weight's columns (0). On the demo 0.55 to 0.65
# are alike, and 0.5 and 0.75 lose more.
_EVENNESS = 0.6

# Tokens with which the calibration computes a layer's error.
_SAMPLE = 64


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

    Layers that have none lose most, and stay as they are.

    Raises:
        QuantizationError: if the device does not multiply 8-bit integers.
    """
    _require_products(device)
    for name in linears_of(model):
        if (found := largest_inputs.get(_stored_name(name))) is not None:
            model.set_submodule(name, Int8Linear(model.get_submodule(name), found))


@contextmanager
def calibrating(model: Any, folder: Path) -> Iterator[None]:
    """Watch the inputs of a bare decoder's linear layers within the block, and store what int8 needs in the folder.

    Of the projection that loses most, such as the MLP's last one, the worse half of the layers is left out: those stay
    in the model's dtype. To leave out others would make more kinds of layers, and each is compiled by itself.
    """
    largest: dict[str, Tensor] = {}
    samples: dict[str, Tensor] = {}
    hooks = []
    for name, linear in linears_of(model).items():

        def watch(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].detach().flatten(0, -2)
            most = x.abs().amax(dim=0).float()
            largest[name] = torch.maximum(largest[name], most) if name in largest else most
            samples[name] = x[torch.linspace(0, len(x) - 1, min(_SAMPLE, len(x))).long()]

        hooks.append(linear.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    errors = {name: int8_error(linear, largest[name], samples[name]) for name, linear in linears_of(model).items()}
    chosen = {_stored_name(name): largest[name].cpu() for name in largest.keys() - _left_out(errors)}
    save_file(chosen, folder / CALIBRATION_FILE)
    (folder / CALIBRATION_FILE).chmod(0o644)  # save_file makes it private, and a server may run as another user


def int8_error(linear: nn.Linear, largest_inputs: Tensor, x: Tensor) -> float:
    """The relative error of the layer's products in 8-bit integers, on any device, for inputs (T, K)."""
    factors = smoothing_factors(linear.weight, largest_inputs)
    (weight, weight_scale), (steps, scale) = in_steps(linear.weight * factors), in_steps(x / factors)
    exact = F.linear(x.float(), linear.weight.float())
    return float((F.linear(steps * scale, weight * weight_scale) - exact).norm() / exact.norm().clamp(min=1e-12))


def _left_out(errors: dict[str, float]) -> set[str]:
    """The worse half of the layers' projections of one name: of that name whose errors are largest on average."""
    by_projection: dict[str, dict[str, float]] = defaultdict(dict)
    for name, error in errors.items():
        by_projection[_stored_name(name).rpartition(".")[2]][name] = error
    worst = max(by_projection.values(), key=lambda found: fmean(found.values()))
    return set(sorted(worst, key=worst.__getitem__, reverse=True)[: (len(worst) + 1) // 2])


def _stored_name(name: str) -> str:
    """A layer's name in the calibration: a merged product (merged_linear) goes by the first layer that it serves."""
    return name.removesuffix(".product.linear")


def read_calibration(folder: Path) -> dict[str, Tensor]:
    """The largest inputs, (K,), of each layer to quantise, by name.

    Raises:
        QuantizationError: if the folder has no calibration.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        raise QuantizationError(
            f"int8 needs a calibration, and {folder} has none: it was stored before there was one; build it again into "
            f"a new folder, or {WAY_OUT}"
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
