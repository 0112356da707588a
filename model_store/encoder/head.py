"""The linear layer that some encoders have behind pooling, such as EmbeddingGemma's two folded into one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_store.encoder.cpu_linear import ROW_BLOCK, by_blocks

# V vectors, D width of the decoder, W width of a vector

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class Head:
    """`weight` (W, D) and `bias` (W,), both float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def read(cls, folder: Path) -> Head | None:
        """The head in a stored encoder's folder; None if it has none."""
        path = folder / HEAD_FILE
        return cls(**load_file(path)) if path.is_file() else None

    def write(self, folder: Path) -> None:
        """Store the head in a stored encoder's folder."""
        path = folder / HEAD_FILE
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, path)
        path.chmod(0o644)

    def to(self, device: torch.device) -> Head:
        """The same head on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def __call__(self, pooled: Tensor) -> Tensor:
        """(V, D) → (V, W). On a CPU a vector has the same bits whatever V is."""
        product = partial(F.linear, weight=self.weight, bias=self.bias)
        return by_blocks(product, pooled, ROW_BLOCK if pooled.device.type == "cpu" else 0)
