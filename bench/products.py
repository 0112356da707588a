"""The linear layers' products on one CPU core: plain, of packed weights, and over blocks of rows for equal bits.

    python -m bench.products [--model DIR|RECIPE] [--rounds 7] [--save]

Times are CPU seconds, the ways take turns, and each figure is the median of the rounds' own ratios to the first way. A
dtype that the CPU does not multiply packed is left out.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from bench.report import by_turns, finish, options_of, ratio, seconds_of, tell
from bench.server import stored
from model_store.encoder.cpu_linear import can_pack
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TokenizedText

_BATCHES = {"1 of 28": [28], "128 of 8": [8] * 128, "16 of 60": [60] * 16, "2 of 500": [500] * 2}
_DTYPES: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", rounds=7)
    torch.set_num_threads(1)
    folder, manifest = stored(options.model)
    packed = [dtype for dtype in _DTYPES if can_pack(torch.device("cpu"), getattr(torch, dtype))]
    speeds = {dtype: by_batch(folder, dtype, options.rounds) for dtype in packed}
    finish("products", {"model": manifest.name, "tokens a second / plain": speeds}, options.save)


def by_batch(folder: Path, dtype: Literal["bfloat16", "float32"], rounds: int) -> dict[str, dict[str, float]]:
    """The speeds of packed weights and of blocks beside plain products, by batch."""
    encoders = {name: Encoder.load(folder, "cpu", dtype) for name in ("plain", "packed", "blocks")}
    encoders["packed"].pack_weights()
    encoders["blocks"].pack_weights(equal_bits=True)
    found: dict[str, dict[str, float]] = {}
    for name, lengths in _BATCHES.items():
        batch = PackedBatch.pack([TokenizedText([1000 + place for place in range(n)], 0) for n in lengths], "mean")
        found[name] = relative_speeds(encoders, [batch], rounds)
        tell(f"{dtype}, {name}", found[name])
    return found


def relative_speeds(encoders: dict[str, Encoder], batches: list[PackedBatch], rounds: int) -> dict[str, float]:
    """Tokens a CPU second of each encoder but the first, as a multiple of the first one's."""

    def seconds(encoder: Encoder) -> float:
        return seconds_of(lambda: [encoder.encode(batch) for batch in batches], time.process_time)

    found = by_turns(rounds + 1, {name: partial(seconds, encoder) for name, encoder in encoders.items()})
    first, *others = encoders
    return {name: ratio(found[first][1:], found[name][1:]) for name in others}  # the first round warms up


if __name__ == "__main__":
    main()
