"""What 8-bit layers cost in fidelity and give in speed on a CPU, on a real encoder; bench.gpu has them on a GPU.

    python -m bench.quantization [--model DIR|RECIPE] [--texts 1000] [--timed 48] [--rounds 5] [--save]

Fidelity is the cosine of each text's vector to the bfloat16 one. Everybody encodes the same batches in turn, round by
round, with compiled layers on all cores; what counts are the ratios.

    bfloat16       what the others are compared with
    int8           model_store.encoder.int8: smoothed, and the worse half of one projection stays in bfloat16
    fp8_emulated   model_store.encoder.quantization's slow twin; its speed is not measured
"""

from __future__ import annotations

from functools import partial

import torch

from bench.cpu import pack
from bench.report import by_turns, finish, medians, options_of, ratio, seconds_of
from bench.server import stored
from bench.texts import mixed_texts, tokenized
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.encoder.quantization import Quantization, emulate_fp8
from model_store.text.tokenizer import TokenizedText

# B texts, D width

_LONE_TOKENS = 13


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", texts=1000, timed=48, rounds=5)
    folder, manifest = stored(options.model)
    kinds: dict[str, Quantization] = {"bfloat16": "none", "int8": "int8", "fp8_emulated": "none"}
    encoders = {name: Encoder.load(folder, "cpu", "bfloat16", quantization=kind) for name, kind in kinds.items()}
    emulate_fp8(encoders["fp8_emulated"].model)
    timed = {name: encoders[name] for name in ("bfloat16", "int8")}
    for encoder in timed.values():
        encoder.pack_weights()
        encoder.compile_layers()
    rows = tokenized(mixed_texts(options.texts), folder)
    batches = pack(sorted(rows, key=len), manifest.pooling)
    vectors = {name: encode(encoder, batches) for name, encoder in encoders.items()}
    cosines = {name: torch.cosine_similarity(found, vectors["bfloat16"]) for name, found in vectors.items()}

    mixed = pack(rows[: options.timed], manifest.pooling)
    lone = pack([TokenizedText([1000 + place for place in range(_LONE_TOKENS)], 0)], manifest.pooling)
    rates, lone_ms = (speeds(timed, case, options.rounds) for case in (mixed, lone))
    tokens = sum(map(len, rows[: options.timed]))
    result = {
        "model": manifest.name,
        "texts": options.texts,
        "tokens": sum(map(len, rows)),
        "cosine_to_bfloat16": {
            name: {"mean": round(float(found.mean()), 5), "min": round(float(found.min()), 5)}
            for name, found in cosines.items()
        },
        "tokens_per_second": {name: round(tokens / seconds) for name, seconds in medians(rates).items()},
        "lone_query_ms": {name: round(1000 * seconds, 1) for name, seconds in medians(lone_ms, 4).items()},
        "times_the_tokens": ratio(rates["bfloat16"], rates["int8"]),
        "times_the_lone_queries": ratio(lone_ms["bfloat16"], lone_ms["int8"]),
    }
    finish("quantization", result, options.save)


def encode(encoder: Encoder, batches: list[PackedBatch]) -> torch.Tensor:
    """(B, D) vectors of all batches."""
    return torch.cat([encoder.encode(batch) for batch in batches])


def speeds(encoders: dict[str, Encoder], batches: list[PackedBatch], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; small batches are taken ten times."""
    times = 10 if len(batches) == 1 else 1
    ways = {
        name: partial(lambda encoder: seconds_of(lambda: encode(encoder, batches * times)) / times, encoder)
        for name, encoder in encoders.items()
    }
    return {name: found[1:] for name, found in by_turns(rounds + 1, ways).items()}  # the first round warms up


if __name__ == "__main__":
    main()
