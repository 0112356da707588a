"""A job killed before each of its changes to files: python -m tests.model_store.training.killed_mining FOLDER

The job is then done to its end. Prints how many places there were, and how many outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from model_store.training.mining import Blocks, Miner, Pool
from model_store.training.negatives import Rules
from model_store.training.texts import read_contrastive
from tests.kills import dies
from tests.model_store.training.mined import vectors_of


def main() -> None:
    """Do the job again and again, until it comes to its end unharmed."""
    folder = Path(sys.argv[1])
    point, outputs = 0, set()
    while _dies(folder, out := folder / f"{point}.jsonl", point):
        if not out.exists():
            assert not _dies(folder, out, None)
        outputs.add(out.read_bytes())
        point += 1
    outputs.add(out.read_bytes())
    print(point, len(outputs))


def _dies(folder: Path, out: Path, point: int | None) -> bool:
    """Whether a run was killed, before its change number `point`, or came to its end."""

    def mine() -> None:
        pool = Pool.of(read_contrastive(folder / "pairs.jsonl"), [])
        rules = Rules(sampling_strategy="random", range_max=8, relative_margin=0.1)
        Miner(vectors_of, "fake", rules, torch.device("cpu"), True, Blocks(7, 5, 4)).mine(pool, out)

    return dies(mine, lambda path: out.name in path, point)


if __name__ == "__main__":
    main()
