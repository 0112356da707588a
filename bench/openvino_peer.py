"""A stored encoder in OpenVINO, in the environment of its own in which bench/peers.py runs this.

    python -m bench.openvino_peer DIR

transformers reads the weights, torch traces the model and OpenVINO converts it, to compute in bfloat16 on every core.
Each line of the input is a list of rows (token ids, and the first of them that is pooled). A line of the output has
their vectors, and the seconds from the rows to the vectors; a first empty line says that the encoder is ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel

# With padding. Of 512, 1024 and 2048 the fastest for mixed texts, and faster than any number of texts from 1 to 32.
_BATCH_TOKENS = 512
_MAX_LENGTH = 2048  # tokens: more than any text in bench/texts.py has

# B texts, L tokens of the longest, D width


class ConstantAngles(nn.Module):
    """A model's rotary angles, of positions that are constants.

    OpenVINO computes with positions that are no constants in bfloat16, which has no odd numbers above 256: vectors of
    long texts then differ by up to 0.02 in cosine.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, position_ids: Tensor, *layer_type: str) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(hidden, torch.arange(_MAX_LENGTH).unsqueeze(0), *layer_type)
        return cos[:, : position_ids.shape[1]], sin[:, : position_ids.shape[1]]


class MeanPooled(nn.Module):
    """Unit vectors (B, D) of texts padded to (B, L)."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.model.rotary_emb = ConstantAngles(self.model.rotary_emb)

    def forward(self, token_ids: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        hidden = self.model(input_ids=token_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return nn.functional.normalize((hidden * pooled.to(hidden.dtype).unsqueeze(-1)).sum(1), dim=-1)


def main() -> None:
    """Answer line by line."""
    compiled = compiled_encoder(sys.argv[1])
    print(flush=True)
    for line in sys.stdin:
        rows = json.loads(line)
        began = time.perf_counter()
        vectors = vectors_of(compiled, rows)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "vectors": vectors.tolist()}), flush=True)


def compiled_encoder(folder: str) -> Any:
    """The encoder, ready for batches of any shape."""
    inputs = dict.fromkeys(("token_ids", "mask", "pooled"), torch.ones(2, 8, dtype=torch.int64))
    shapes = [(name, [-1, -1]) for name in inputs]
    with torch.no_grad():
        converted = openvino.convert_model(MeanPooled(folder).eval(), example_input=inputs, input=shapes)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
    }
    return openvino.compile_model(converted, "CPU", settings)


def vectors_of(compiled: Any, rows: Sequence[tuple[list[int], int]]) -> NDArray[np.float32]:
    """Unit vectors of rows in their order, from batches sorted by length."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
    batches: list[list[tuple[list[int], int]]] = [[]]
    for place in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(batches[-1][0][0]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(rows[place])
    found = []
    for batch in batches:
        token_ids, mask, pooled = (np.zeros((len(batch), len(batch[0][0])), dtype=np.int64) for _ in range(3))
        for text, (tokens, first) in enumerate(batch):
            token_ids[text, : len(tokens)] = tokens
            mask[text, : len(tokens)] = 1
            pooled[text, first : len(tokens)] = 1
        found.append(compiled([token_ids, mask, pooled])[0])
    return np.concatenate(found)[np.argsort(order)]


if __name__ == "__main__":
    main()
