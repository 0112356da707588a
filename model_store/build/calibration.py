"""What int8 needs to know of an encoder: the largest inputs of its layers, and the layers that lose most.

A few texts suffice. On the demo the inputs of 807 tokens gave vectors as near as those of 5,866, and 88 tokens found
the same worst layers as 60 texts of bench-quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model_store.encoder.encoder import Encoder
from model_store.encoder.int8 import EmulatedInt8Linear, layers_input
from model_store.encoder.packing import PackedBatch
from model_store.encoder.quantization import linears_of
from model_store.text.tokenizer import TokenizedText

# T packed tokens, K inputs of a layer, D width

# One in so many decoder layers stays as it is, rounded up: those that lose most. A layer stays as a whole, since
# torch.compile makes a graph for each mixture.
_LEFT_OUT_OF = 8

# Tokens of each text with which a layer's loss is computed.
_SAMPLE_TOKENS = 48


def write_calibration(encoder: Encoder, rows: list[TokenizedText], folder: Path) -> None:
    """Store the largest inputs, (K,), of each linear layer that int8 may replace."""
    from model_store.manifest import CALIBRATION_FILE  # needs pydantic, and checks of an encoder in memory do not

    largest = largest_inputs(encoder, rows)
    short = [TokenizedText(row.token_ids[:_SAMPLE_TOKENS], 0) for row in rows]
    states = partial(_states, encoder, PackedBatch.pack(short, "mean"))
    exact, losses = states(), []
    for number in range(len(encoder.model.layers)):
        mine = [name for name in linears_of(encoder.model) if name.startswith(f"layers.{number}.")]
        losses.append(_loss(encoder.model, {name: largest[layers_input(name)] for name in mine}, exact, states))
    worst = sorted(range(len(losses)), key=losses.__getitem__, reverse=True)[: -(-len(losses) // _LEFT_OUT_OF)]
    left_out = tuple(f"layers.{number}." for number in worst)
    path = folder / CALIBRATION_FILE
    save_file({name: tensor.cpu() for name, tensor in largest.items() if not name.startswith(left_out)}, path)
    path.chmod(0o644)  # save_file makes it private, and a server may run as another user


def largest_inputs(encoder: Encoder, rows: list[TokenizedText]) -> dict[str, Tensor]:
    """The largest absolute number, (K,), in each channel of each linear layer's input."""
    largest: dict[str, Tensor] = {}

    def watch(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        most = inputs[0].flatten(0, -2).abs().amax(dim=0).float()
        largest[name] = torch.maximum(largest[name], most) if name in largest else most

    hooks = [
        linear.register_forward_pre_hook(partial(watch, layers_input(name)))
        for name, linear in linears_of(encoder.model).items()
    ]
    try:
        encoder.encode(PackedBatch.pack(rows, "mean"))
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _states(encoder: Encoder, batch: PackedBatch) -> Tensor:
    """(T, D)."""
    return encoder.hidden(encoder.place(batch)).float()


def _loss(model: Any, largest: dict[str, Tensor], exact: Tensor, states: Callable[[], Tensor]) -> float:
    """How far the tokens' states move if these layers are in 8 bits: the mean of 1 − cosine."""
    linears = {name: model.get_submodule(name) for name in largest}
    try:
        for name, linear in linears.items():
            model.set_submodule(name, EmulatedInt8Linear(linear, largest[name]))
        return float((1 - torch.cosine_similarity(states(), exact, dim=-1)).mean())
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
