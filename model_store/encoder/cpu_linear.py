"""Linear layers for CPUs: weights packed once, an MLP's activation applied within the product.

oneDNN packs a weight for each product unless it gets the weight packed. A separate activation reads and writes once
more the numbers that the product just had in cache. Products may also be taken over blocks of a fixed number of rows,
so that the kernel, and with it a row's last bits, never depends on the batch. Knows decoders' linear layers and gated
MLPs; nothing of attention or files.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# T packed tokens, K inputs and N outputs of a layer

# oneDNN packs a weight for this number of rows; the packed weight serves any other number as well.
_TYPICAL_ROWS = 512

# Rows of a block where products are taken over blocks. Larger ones gain little, and a short text fills one to its end.
ROW_BLOCK = 32

# transformers' names of activations → oneDNN's name and algorithm.
_ACTIVATIONS = {
    "silu": ("swish", ""),
    "swish": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
}

# torch.compile can't handle the layout of a packed weight, so a compiled layer holds the weight's number in this table.
_weights: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_numbers = count()


class PackedLinear(nn.Module):
    """nn.Linear on a CPU, with its weight packed; inference only."""

    number: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, block: int = 0) -> None:
        super().__init__()
        self.block = block
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)
        self.register_buffer("number", keep(self._weight), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        product: Tensor = _linear(x, self.number, self.bias, self.out_features, self.block)
        return product


class PackedGatedMlp(nn.Module):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020); the products apply the activation and the factor themselves."""

    def __init__(self, mlp: Any, activation: str, block: int = 0) -> None:
        super().__init__()
        parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.gate, self.up, self.down = (PackedLinear(part, block) for part in parts)
        self.activation, self.algorithm = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        gate, up = self.gate, self.up
        weights = (gate.number, gate.bias, up.number, up.bias)
        inner: Tensor = _gated(x, *weights, up.out_features, self.activation, self.algorithm, gate.block)
        return self.down(inner)  # type: ignore[no-any-return]


def keep(weight: Tensor) -> Tensor:
    """A number by which `kept` finds a packed weight for as long as the weight lives.

    It is a tensor: torch.compile would make a graph for each int.
    """
    number = next(_numbers)
    _weights[number] = weight
    return torch.tensor(number)


def kept(number: Tensor) -> Tensor:
    """The packed weight of that number."""
    return _weights[int(number)]


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies packed weights of this dtype, and is faster with them."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: Any, block: int = 0) -> None:
    """Replace linear layers and gated MLPs of `model`, a bare decoder, in place; each old weight is freed in turn.

    With a `block`, products are taken over so many rows at a time.
    """
    activation = getattr(model.config, "hidden_activation", None) or model.config.hidden_act
    parts = ("gate_proj", "up_proj", "down_proj")
    for layer in model.layers:
        if activation in _ACTIVATIONS and all(isinstance(getattr(layer.mlp, name, None), nn.Linear) for name in parts):
            layer.mlp = PackedGatedMlp(layer.mlp, activation, block)
        linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name in linears:
            layer.set_submodule(name, PackedLinear(layer.get_submodule(name), block))


@torch.library.custom_op("llm2vec::packed_linear", mutates_args=())
def _linear(x: Tensor, number: Tensor, bias: Tensor | None, outputs: int, block: int) -> Tensor:
    def product(rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, kept(number), bias, "none", [], "")  # type: ignore[no-any-return]

    return by_blocks(product, x, block)


@torch.library.custom_op("llm2vec::packed_gated", mutates_args=())
def _gated(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    outputs: int,
    activation: str,
    algorithm: str,
    block: int,
) -> Tensor:
    """activation(x·gate) · (x·up), rounded to 16 bits once for each factor."""
    pointwise = torch.ops.mkldnn._linear_pointwise

    def product(rows: Tensor) -> Tensor:
        gated = pointwise(rows, kept(gate), gate_bias, activation, [], algorithm)
        return pointwise.binary(rows, gated, kept(up), up_bias, "mul")  # type: ignore[no-any-return]

    return by_blocks(product, x, block)


def by_blocks(product: Callable[[Tensor], Tensor], x: Tensor, block: int) -> Tensor:
    """`product` of x (…, K), of all rows at once or of blocks of so many rows, the last one filled up with zeros."""
    if not block:
        return product(x)
    rows = x.flatten(0, -2)
    filled = F.pad(rows, (0, 0, 0, -len(rows) % block))
    return torch.cat([product(part) for part in filled.split(block)])[: len(rows)].view(*x.shape[:-1], -1)


@_linear.register_fake
def _(x: Tensor, number: Tensor, bias: Tensor | None, outputs: int, block: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@_gated.register_fake
def _(x: Tensor, gate: Tensor, gate_bias: Any, up: Tensor, up_bias: Any, outputs: int, *others: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
