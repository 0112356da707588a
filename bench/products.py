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

from bench.report import finish, options_of, ratio, seconds_of, tell
from bench.server import stored
from model_store.encoder.cpu_linear import can_pack
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TokenizedText

_BATCHES = {"1 of 28": [28], "128 of 8": [8] * 128, "16 of 60": [60] * 16, "2 of 500": [500] * 2}


def main() -> None:
    """Measure and report."""
    parser = options_of(__doc__, model=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, manifest = stored(options.model)
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    speeds = {
        dtype: relative_speeds(folder, dtype, options.rounds)
        for dtype in dtypes
        if can_pack(torch.device("cpu"), getattr(torch, dtype))
    }
    finish("products", {"model": manifest.name, "tokens a second / plain": speeds}, options.save)


def relative_speeds(folder: Path, dtype: Literal["bfloat16", "float32"], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second of each way as a multiple of plain products', by batch."""
    ways = {name: Encoder.load(folder, "cpu", dtype) for name in ("plain", "packed", "blocks")}
    ways["packed"].pack_weights()
    ways["blocks"].pack_weights(equal_bits=True)
    found: dict[str, dict[str, float]] = {}
    for name, lengths in _BATCHES.items():
        batch = PackedBatch.pack([TokenizedText([1000 + place for place in range(n)], 0) for n in lengths], "mean")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds + 1):
            for way, encoder in ways.items():
                seconds[way].append(seconds_of(partial(encoder.encode, batch), time.process_time))
        found[name] = {way: ratio(seconds["plain"][1:], times[1:]) for way, times in seconds.items() if way != "plain"}
        tell(f"{dtype}, {name}", found[name])
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
