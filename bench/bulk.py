"""`llm2vec-service embed` over many sentences on the CPU: killed twice, gone on with, checked, and timed.

    python -m bench.bulk [--limit 100000] [--model DIR|RECIPE] [--save]

The command runs in a process of its own. Whenever it has finished a shard it is stopped for a moment, and the encoder
alone embeds a share of that shard's texts in this process, already tokenized and sorted by length: so both are timed
by turns, on the same texts, on a machine whose speed drifts, and the shard's vectors are held to the encoder's own. At
a third and at two thirds the command is killed at a random moment. In the end every row must be there once, in order.
Each life of the command is timed from behind its third shard, as three windows of texts are begun at once; the
job's last three shards are left out, since nothing is computed behind them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from bench.cpu import load_encoder, pack, vectors_of
from bench.report import finish, options_of, seconds_of, tell
from bench.server import stored
from bench.texts import sentences, tokenized
from service.bulk.pipeline import SIZES
from service.settings import Settings

# Of each shard's texts, as many are embedded by the encoder alone; and no fewer, if there are, since after a pause the
# first batches are slow.
_SHARE = 0.2
_LEAST_TEXTS = 400

# Shards that the command works at when it has just started: its windows, one of which is a shard at most.
_BEGUN_AT_ONCE = 1 + SIZES.windows_ahead

_KILLS_AT = (1 / 3, 2 / 3)
_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 1800.0

# bfloat16 in batches of other sizes; 0.9998 was the lowest seen (docs/fidelity.md).
_LEAST_COSINE = 0.999


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", limit=100_000)
    pool = islice(cycle(sentences()), options.limit)
    texts = [f"{number}. {text}" for number, text in enumerate(pool, 1)]
    rows_per_shard = max(len(texts) // 50, 200)
    folder, _ = stored(options.model)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Settings().models_dir.expanduser() / "compiled"))
    alone = Alone(folder)
    with tempfile.TemporaryDirectory(prefix="bench-bulk-") as scratch:
        path, out = Path(scratch) / "texts.txt", Path(scratch) / "out"
        path.write_text("".join(text + "\n" for text in texts))
        command = [sys.executable, "-m", "service", "embed", str(path), "--model", str(folder), "--out", str(out)]
        command += ["--device", "cpu", "--dtype", "bfloat16", "--rows-per-shard", str(rows_per_shard)]
        result = run(command, out, texts, alone)
    about = {"model": folder.name, "dtype": "bfloat16", "rows_per_shard": rows_per_shard}
    finish("bulk", {**about, **result}, options.save)


class Alone:
    """The encoder with nothing around it, and how near the vectors held to its own were."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._encoder = folder, load_encoder(folder)
        self.least_cosine, self.checked = 1.0, 0
        vectors_of(self._encoder, tokenized(sentences()[:200], folder))  # the first batches are not typical

    def check(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> tuple[int, float]:
        """Hold vectors of the texts to the encoder's own; its tokens, and the seconds for batches alone."""
        rows = tokenized(texts, self._folder)
        order = np.argsort([-len(row) for row in rows])
        batches = pack([rows[place] for place in order], self._encoder.manifest.pooling)
        own: list[torch.Tensor] = []
        seconds = seconds_of(lambda: own.extend(map(self._encoder.encode, batches)))
        cosines = torch.cosine_similarity(torch.cat(own), torch.from_numpy(vectors[order]))
        self.least_cosine = min(self.least_cosine, cosines.min().item())
        self.checked += len(texts)
        return sum(map(len, rows)), seconds


class Timed(NamedTuple):
    """Tokens and seconds of the command, and of the encoder alone in the pause after it."""

    tokens: int
    seconds: float
    own_tokens: int
    own_seconds: float


def rates(timed: Sequence[Timed]) -> tuple[float, float]:
    """Tokens a second of the command and of the encoder alone."""
    tokens, seconds, own_tokens, own_seconds = map(sum, zip(*timed, strict=True))
    return tokens / seconds, own_tokens / own_seconds


def run(command: Sequence[str], out: Path, texts: Sequence[str], alone: Alone) -> dict[str, Any]:
    """The whole job; what came of it."""
    chance = random.Random(0)
    kills = [round(share * len(texts)) for share in _KILLS_AT]
    killed_at: list[int] = []
    lives: list[list[Timed]] = [[]]
    seen, in_this_life = 0, 0
    process = subprocess.Popen(command)
    try:
        while True:
            began = time.perf_counter()
            shards = wait_for_shards(process, out, seen)
            seconds = time.perf_counter() - began
            new, seen, done = shards[seen:], len(shards), sum(shard["read"] for shard in shards)
            if not new:
                break
            process.send_signal(signal.SIGSTOP)
            own = [check_shard(alone, out, shard, texts, chance) for shard in new]
            if in_this_life >= _BEGUN_AT_ONCE and done < len(texts) - _BEGUN_AT_ONCE * shards[0]["read"]:
                own_tokens, own_seconds = map(sum, zip(*own, strict=True))
                lives[-1].append(Timed(sum(shard["tokens"] for shard in new), seconds, own_tokens, own_seconds))
                tell(f"{done} rows", dict(zip(("tokens/s", "alone"), map(round, rates(lives[-1])), strict=True)))
            in_this_life += len(new)
            process.send_signal(signal.SIGCONT)
            if kills and done >= kills[0]:
                kills.pop(0)
                time.sleep(chance.uniform(0, seconds / len(new)))
                process.kill()
                assert process.wait() == -signal.SIGKILL, "the command had ended before it was killed"
                seen = len(shards_in(out))  # one more may have been written
                killed_at.append(done)
                print(f"killed after {done} rows", flush=True)
                process = subprocess.Popen(command)
                lives.append([])
                in_this_life = 0
    finally:
        process.kill()
        process.wait()
    return {**verdict(out, texts), **figures(lives, alone), "killed_after_rows": killed_at, "starts": len(lives)}


def wait_for_shards(process: subprocess.Popen[bytes], out: Path, seen: int) -> list[dict[str, Any]]:
    """The shards, once there are more than were seen, or the command has ended well."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        status, shards = process.poll(), shards_in(out)
        if len(shards) > seen:
            return shards
        if status is not None:
            assert status == 0, f"the command ended with status {status}"
            return shards
        time.sleep(_LOOK_SECONDS)
    raise AssertionError("the command has done nothing for long")


def check_shard(
    alone: Alone, out: Path, shard: dict[str, Any], texts: Sequence[str], chance: random.Random
) -> tuple[int, float]:
    """Hold a share of a shard's vectors to the encoder's own; its tokens and seconds."""
    rows = shard["rows"]
    places = chance.sample(range(rows), min(max(round(_SHARE * rows), _LEAST_TEXTS), rows))
    numbers, vectors = read_shard(out / shard["file"])
    return alone.check([texts[numbers[place]] for place in places], vectors[places])


def shards_in(out: Path) -> list[dict[str, Any]]:
    """What the manifest says of shards."""
    path = out / "manifest.json"
    shards: list[dict[str, Any]] = json.loads(path.read_text())["shards"] if path.exists() else []
    return shards


def read_shard(path: Path) -> tuple[list[int], NDArray[np.float32]]:
    """Row numbers, and (n, D) vectors."""
    table = parquet.read_table(path)
    lists = table["embedding"].combine_chunks()
    return table["row"].to_pylist(), lists.values.to_numpy().reshape(table.num_rows, -1)


def verdict(out: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Whether every row is there once, in order, and nothing else."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"], "the job is not complete"
    names = [shard["file"] for shard in manifest["shards"]]
    assert sorted(names) == sorted(path.name for path in out.glob("part-*")), "other files than the manifest's"
    numbers = [number for name in names for number in read_shard(out / name)[0]]
    assert numbers == list(range(len(texts))), "rows are lost, doubled or out of order"
    return {"rows": len(numbers), "tokens": sum(shard["tokens"] for shard in manifest["shards"])}


def figures(lives: Sequence[Sequence[Timed]], alone: Alone) -> dict[str, Any]:
    """Rates, and how near the vectors are to the encoder's own."""
    assert alone.least_cosine > _LEAST_COSINE, f"a vector's cosine to the encoder's own is {alone.least_cosine}"
    if not any(lives):
        raise SystemExit("no two shards were written in one life: give more texts, or fewer rows to a shard")
    embed, own = rates([timed for life in lives for timed in life])
    return {
        "embed_tokens_per_second": round(embed),
        "encoder_tokens_per_second": round(own),
        "ratio": round(embed / own, 3),
        "ratios": [round(of / own, 3) for of, own in (rates(life) for life in lives if life)],
        "rows_held_to_the_encoder": alone.checked,
        "least_cosine": round(alone.least_cosine, 6),
    }


if __name__ == "__main__":
    main()
