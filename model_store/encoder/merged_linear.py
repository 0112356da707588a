"""Linear layers that read the same input, as one matrix product: query, key and value; gate and up.

A product with more outputs keeps a device busier, and its input is quantised only once. transformers' modules stay as
they are: each of these layers is replaced by one that takes its own outputs from the shared product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The linear layers of one decoder layer that read the same input, in the order in which transformers calls them.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")


class SharedProduct(nn.Module):
    """One linear layer that computes the outputs of several; the first of them that is called computes all."""

    def __init__(self, linear: nn.Linear, sizes: list[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = sizes
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def part(self, x: Tensor, number: int) -> Tensor:
        """(…, K) → (…, N) of the layer with this number; computes the product if `x` is a new input."""
        if self._input is not x:
            self._outputs = []  # free what a failed forward pass has left
            self._input, self._outputs = x, list(self.linear(x).split(self.sizes, dim=-1))
        found = self._outputs[number]
        self._outputs[number] = None
        if not any(output is not None for output in self._outputs):
            self._input, self._outputs = None, []
        assert found is not None, "a layer was called twice with one input"
        return found


class PartOfProduct(nn.Module):
    """nn.Linear as one part of a shared product; inference only."""

    def __init__(self, product: SharedProduct, number: int) -> None:
        super().__init__()
        self.product = product
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        return self.product.part(x, self._number)

    def alone(self) -> nn.Linear:
        """The layer by itself, as it was before it was merged."""
        merged, number = self.product.linear, self._number
        with torch.device("meta"):
            linear = nn.Linear(merged.in_features, self.product.sizes[number], bias=merged.bias is not None)
        linear.weight = nn.Parameter(merged.weight.split(self.product.sizes)[number], requires_grad=False)
        if merged.bias is not None:
            linear.bias = nn.Parameter(merged.bias.split(self.product.sizes)[number], requires_grad=False)
        return linear


def merge_projections(model: Any, device: torch.device, gated: bool) -> None:
    """Merge query, key and value in each layer of a bare decoder, in place, on `device`; with `gated` gate and up too.

    Each layer's old weights are freed in turn, so the peak is one layer's weights above the model's. Linear layers that
    a family has merged itself stay as they are, and so do those of which only some have a bias.
    """
    for layer in model.layers:
        for names in (_QKV, _GATED) if gated else (_QKV,):
            _merge(layer, names, device)


def _merge(layer: nn.Module, names: tuple[str, ...], device: torch.device) -> None:
    modules = dict(layer.named_modules())
    linears = [modules[name] for name in names if isinstance(modules.get(name), nn.Linear)]
    if len(linears) < len(names) or len({linear.bias is None for linear in linears}) > 1:
        return
    weights = [linear.weight.detach().to(device) for linear in linears]
    sizes = [len(weight) for weight in weights]
    with torch.device("meta"):
        merged = nn.Linear(weights[0].shape[1], sum(sizes), bias=linears[0].bias is not None)
    merged.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if merged.bias is not None:
        biases = [linear.bias.detach().to(device) for linear in linears]
        merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    product = SharedProduct(merged, sizes)
    for number, name in enumerate(names):
        layer.set_submodule(name, PartOfProduct(product, number))
