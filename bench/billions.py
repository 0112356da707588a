"""What a CPU does with models of 1.3 and 8 billion parameters: random weights in their shapes, a few layers of them.

    python -m bench.billions [--rounds 5] [--save]

Decoders of two and of four layers are timed in turn, compiled, in bfloat16 and in int8. What two layers more take is
taken once for each further pair: all layers of these families cost the same.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu.inputs import SHAPES, random_encoder, random_model, rows_of
from bench.report import by_turns, finish, medians, options_of, seconds_of, tell
from model_store.build.calibration import largest_inputs
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.encoder.quantization import Quantization

_CPU = torch.device("cpu")
_FEW, _MORE = 2, 4
_KINDS: tuple[Quantization, ...] = ("none", "int8")

# A query, and a batch of sentences and passages.
_LONE, _BULK = [16], [30] * 20 + [212] * 2


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, rounds=5)
    found = {name: {kind: scaled(name, kind, options.rounds) for kind in _KINDS} for name in ("1.3B", "8B")}
    finish("billions", {"lone_tokens": sum(_LONE), "bulk_tokens": sum(_BULK), "shapes": found}, options.save)


def scaled(name: str, kind: Quantization, rounds: int) -> dict[str, float]:
    """Milliseconds of a lone query and tokens a second of a batch, with all of the shape's layers."""
    family, sizes = SHAPES["real"][name]
    encoders = {layers: encoder_of((family, {**sizes, "num_hidden_layers": layers}), kind) for layers in (_FEW, _MORE)}
    seconds = []
    for lengths in (_LONE, _BULK):
        batch = PackedBatch.pack(rows_of(lengths), "mean")
        ways = {
            str(layers): partial(seconds_of, partial(encoder.encode, batch)) for layers, encoder in encoders.items()
        }
        took = medians({way: times[2:] for way, times in by_turns(rounds + 2, ways).items()}, 6)  # two warm up
        few, more = took[str(_FEW)], took[str(_MORE)]
        seconds.append(few + (more - few) * (sizes["num_hidden_layers"] - _FEW) / (_MORE - _FEW))
    lone, bulk = seconds
    figures = {"lone_query_ms": round(1000 * lone), "tokens_per_second": round(sum(_BULK) / bulk, 1)}
    tell(f"{name}, {kind}", figures)
    return figures


def encoder_of(shape: tuple[str, dict[str, int]], kind: Quantization) -> Encoder:
    """An encoder with packed weights and compiled layers."""
    encoder = random_encoder(shape, _CPU)
    if kind == "int8":
        largest = largest_inputs(encoder, rows_of(_BULK))
        model = random_model(shape, _CPU)
        encoder = Encoder.of(model, encoder.manifest, _CPU, quantization="int8", largest_inputs=largest)
    encoder.pack_weights()
    encoder.compile_layers()
    return encoder


if __name__ == "__main__":
    main()
