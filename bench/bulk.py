"""`llm2vec-service embed` over many sentences on the CPU: killed twice, gone on with, checked, and timed.

    python -m bench.bulk [--texts FILE] [--limit 100000] [--model DIR|RECIPE] [--save]

The command runs in a process of its own. Whenever it has finished a shard it is stopped for a moment, and the encoder
alone embeds a share of that shard's texts in this process, already tokenized and sorted by length: so both are timed
by turns, on the same texts, on a machine whose speed drifts, and the shard's vectors are held to the encoder's own. At
a third and at two thirds the command is killed at a random moment. In the end every row must be there once, in order.
Each life of the command is timed from behind its third shard, as three windows of texts are begun at once; the
job's last three shards are left out, since nothing is computed behind them.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import parquet

from bench.cpu import load_encoder, pack
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
    parser = options_of(__doc__, model=True)
    parser.add_argument("--texts", type=Path, help="a text a line, may be .gz; by default made of packaged sentences")
    parser.add_argument("--limit", type=int, default=100_000, help="of texts (default %(default)s)")
    options = parser.parse_args()
    texts = read_texts(options.texts, options.limit)
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


def read_texts(path: Path | None, limit: int) -> list[str]:
    """Texts of a file, or packaged sentences with a number each."""
    if path is None:
        return [f"{number}. {text}" for number, text in enumerate(islice(cycle(sentences()), limit), 1)]
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        found = [line.rstrip("\r\n") for line in islice(file, limit)]
    if len(found) < limit:
        raise SystemExit(f"{path} has {len(found)} texts: give --limit {len(found)}")
    return found


class Alone:
    """The encoder with nothing around it, its tokens and seconds so far, and how near the vectors held to it were."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._encoder = folder, load_encoder(folder)
        self._embed(sentences()[:200])  # the first batches are not typical
        self.least_cosine, self.checked = 1.0, 0
        self.tokens, self.seconds = 0, 0.0

    def check(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Embed the texts, and hold vectors to theirs."""
        own, tokens, seconds = self._embed(texts)
        self.least_cosine = min(self.least_cosine, float((own * vectors).sum(1).min()))
        self.checked += len(texts)
        self.tokens += tokens
        self.seconds += seconds

    def _embed(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], int, float]:
        """(n, D) vectors in the texts' order, their tokens, and the seconds for batches alone."""
        rows = tokenized(texts, self._folder)
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        batches = pack([rows[place] for place in order], self._encoder.manifest.pooling)
        pooled: list[torch.Tensor] = []
        seconds = seconds_of(lambda: pooled.extend(map(self._encoder.encode, batches)))
        vectors = np.empty((len(rows), self._encoder.manifest.width), np.float32)
        vectors[order] = torch.nn.functional.normalize(torch.cat(pooled), dim=1).numpy()
        return vectors, sum(map(len, rows)), seconds


class Command:
    """The command in a process of its own; `seconds` is how long it has been running, in all its lives."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self.starts, self.seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """Once more."""
        self.starts += 1
        self.process = subprocess.Popen(self._command)
        self._since = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It does nothing until the block is left."""
        self.process.send_signal(signal.SIGSTOP)
        self.seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """And be sure that it was running."""
        self.process.kill()
        status = self.process.wait()
        assert status == -signal.SIGKILL, f"the command ended with status {status} before it was killed"
        self.seconds += time.perf_counter() - self._since


@dataclass
class Life:
    """The command from a start to its end: tokens and seconds behind the first shards, and the encoder's rate then."""

    shards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    alone: float = 0.0


def run(command: Sequence[str], out: Path, texts: Sequence[str], alone: Alone) -> dict[str, Any]:
    """The whole job; what came of it."""
    chance = random.Random(0)
    kills = [round(share * len(texts)) for share in _KILLS_AT]
    killed_at: list[int] = []
    lives = [life := Life()]
    began = (0.0, 0, 0.0)  # of this life, behind its first shards: the command's seconds, the encoder's tokens, seconds
    seen = 0
    job = Command(command)
    try:
        while len(shards := wait_for_shards(job, out, seen)) > seen:
            new, seen = shards[seen:], len(shards)
            with job.stopped():
                for shard in new:
                    rows = shard["rows"]
                    places = chance.sample(range(rows), min(max(round(_SHARE * rows), _LEAST_TEXTS), rows))
                    numbers, vectors = read_shard(out / shard["file"])
                    alone.check([texts[numbers[place]] for place in places], vectors[places])
            done = sum(shard["read"] for shard in shards)
            life.shards += len(new)
            if life.shards - len(new) < _BEGUN_AT_ONCE:
                began = (job.seconds, alone.tokens, alone.seconds)
            elif done < len(texts) - _BEGUN_AT_ONCE * shards[0]["read"]:
                life.tokens += sum(shard["tokens"] for shard in new)
                life.seconds = job.seconds - began[0]
                life.alone = (alone.tokens - began[1]) / (alone.seconds - began[2])
                tell(f"{done} rows", {"tokens/s": round(life.tokens / life.seconds), "alone": round(life.alone)})
            if kills and done >= kills[0]:
                kills.pop(0)
                time.sleep(chance.uniform(0, job.seconds / max(done, 1) * new[-1]["rows"]))
                job.kill()
                seen = len(shards_in(out))  # one more may have been written
                killed_at.append(done)
                print(f"killed after {done} rows", flush=True)
                job.start()
                lives.append(life := Life())
    finally:
        job.process.kill()
        job.process.wait()
    return {**verdict(out, texts), **figures(lives, alone), "killed_after_rows": killed_at, "starts": job.starts}


def wait_for_shards(job: Command, out: Path, seen: int) -> list[dict[str, Any]]:
    """The shards, once there are more than were seen, or the command has ended well."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        status, shards = job.process.poll(), shards_in(out)
        if len(shards) > seen:
            return shards
        if status is not None:
            assert status == 0, f"the command ended with status {status}"
            return shards
        time.sleep(_LOOK_SECONDS)
    raise AssertionError("the command has done nothing for long")


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


def figures(lives: Sequence[Life], alone: Alone) -> dict[str, Any]:
    """Rates, and how near the vectors are to the encoder's own."""
    assert alone.least_cosine > _LEAST_COSINE, f"a vector's cosine to the encoder's own is {alone.least_cosine}"
    timed = [life for life in lives if life.seconds]
    if not timed:
        raise SystemExit("no two shards were written in one life: give more texts, or fewer rows to a shard")
    seconds = sum(life.seconds for life in timed)
    embed = sum(life.tokens for life in timed) / seconds
    own = sum(life.alone * life.seconds for life in timed) / seconds
    return {
        "embed_tokens_per_second": round(embed),
        "encoder_tokens_per_second": round(own),
        "ratio": round(embed / own, 3),
        "ratios": [round(life.tokens / life.seconds / life.alone, 3) for life in timed],
        "rows_held_to_the_encoder": alone.checked,
        "least_cosine": round(alone.least_cosine, 6),
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
