"""What a server does with more than it can: goodput, refusals and waits from half of its capacity to twenty times.

    python -m bench.overload [--model DIR|RECIPE] [--seconds 8] [--save]

A server process as `llm2vec-service serve` starts it, real tokenizer included, before a stand-in device of fixed speed,
so that what refusing costs the HTTP side is seen and not how a CPU is shared. It has one core, the clients the other.
Requests arrive at random (Poisson), whatever was answered; a client of so many connections sends them, and counts what
finds none of them free as unsent. Capacity is what that device could do, were all else free.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import httptools
import numpy as np
import uvloop

from bench.http_path import Case, ReadyWorker, distinct_texts, request_bytes
from bench.report import finish
from model_store.manifest import Manifest
from model_store.text.tokenizer import TextTokenizer
from service.batching.contract import DevicePlan
from service.batching.cost_model import CostModel
from service.batching.limits import Limits
from service.embedding.rows import EmbedRow, Vector
from service.server.startup import prepare_store
from service.settings import Settings

FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 5.0, 10.0, 20.0)
INPUTS = 16

# So many that none waits twice at once, which would be computed once.
_TEXTS = 65536
_TOKENS_PER_SECOND = 10_000.0
_BATCH_TOKENS = 1024
# About two seconds' work: what is admitted is answered in that time.
_QUEUED_TOKENS = 20_000
_CONNECTIONS = 400
_WARM_UP_SECONDS = 4.0
_PATIENCE_SECONDS = 30.0
_PICTURE = Path(__file__).parents[1] / "docs" / "overload.svg"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="the encoder whose tokenizer is used (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load (default %(default)s)")
    parser.add_argument("--save", action="store_true", help="keep the figures and draw docs/overload.svg")
    options = parser.parse_args()
    folder, manifest = prepare_store(Settings(model=options.model), lambda done, total: None)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("the server and its clients need a core each")
    texts = distinct_texts(_TEXTS)
    requests = itertools.cycle(request_bytes(Case(manifest.width, "base64", INPUTS), texts, manifest.name))
    tokens = sum(map(len, TextTokenizer.load(folder, manifest).encode_batch(texts, [""] * _TEXTS)))
    capacity = _TOKENS_PER_SECOND / (tokens / _TEXTS * INPUTS)
    print(f"capacity: {capacity:.1f} requests of {INPUTS} texts a second", flush=True)
    context = multiprocessing.get_context("spawn")
    control, theirs = context.Pipe()
    process = context.Process(target=serve, args=(folder, manifest, cores[0], theirs), daemon=True)
    process.start()
    os.sched_setaffinity(0, {cores[1]})
    try:
        port = control.recv()
        rows = []
        for factor in FACTORS:
            rows.append({"factor": factor, **uvloop.run(offer(port, requests, factor * capacity, options.seconds))})
            print(line(rows[-1]), flush=True)
            time.sleep(1)
    finally:
        process.terminate()
        process.join(10)
        process.kill()
    best = max(row["goodput"] for row in rows)
    result = {
        "capacity": round(capacity, 1),
        "inputs": INPUTS,
        "loads": rows,
        "goodput at the highest load / best": round(rows[-1]["goodput"] / best, 3),
    }
    os.sched_setaffinity(0, cores)
    finish("overload", result, options.save)
    if options.save:
        draw(rows, result["capacity"])


def line(row: dict[str, Any]) -> str:
    """A load's figures for people."""
    return (
        "{factor:5.1f}x offered {offered:7.1f}/s  goodput {goodput:6.1f}/s  refused {refused:7.1f}/s  "
        "unsent {unsent:6.1f}/s  others {others}  admitted p50 {p50_ms:7.1f}  p99 {p99_ms:7.1f} ms  "
        "refused p50 {refused_p50_ms:6.1f} ms"
    ).format(**row)


@dataclass
class Seen:
    """What came of the requests of one load: status and seconds of each in the measured time."""

    answers: list[tuple[int, float]] = field(default_factory=list)
    unsent: int = 0


class Pooled(asyncio.BufferedProtocol):
    """One connection that is free or has one request under way."""

    def __init__(self, free: list[Pooled], seen: Seen, since: float, until: float) -> None:
        self._free, self._seen, self._since, self._until = free, seen, since, until
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = memoryview(bytearray(1 << 16))
        self._asked = 0.0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self.transport = cast(asyncio.Transport, transport)
        self._free.append(self)

    def ask(self, request: bytes) -> None:
        """Send a request."""
        self._asked = time.perf_counter()
        self.transport.write(request)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by asyncio."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio."""
        self._parser.feed_data(self._buffer[:nbytes])

    def on_message_complete(self) -> None:
        """Called by the parser."""
        now = time.perf_counter()
        if self._since <= now < self._until:
            self._seen.answers.append((self._parser.get_status_code(), now - self._asked))
        self._parser = httptools.HttpResponseParser(self)
        self._free.append(self)


async def offer(port: int, requests: Iterator[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """Offer so many requests a second; what was answered in the time after the warm-up."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    since, until = began + _WARM_UP_SECONDS, began + _WARM_UP_SECONDS + seconds
    free: list[Pooled] = []
    seen = Seen()
    for _ in range(_CONNECTIONS):
        await loop.create_connection(partial(Pooled, free, seen, since, until), "127.0.0.1", port)
    chance = random.Random(0)
    offered, due = 0, time.perf_counter()
    while due < until:
        now = time.perf_counter()
        if due > now:
            await asyncio.sleep(due - now)
        elif offered % 32 == 0:
            await asyncio.sleep(0)
        if due >= since:
            offered += 1
        if free:
            free.pop().ask(next(requests))
        elif due >= since:
            seen.unsent += 1
        due += chance.expovariate(rate)
    end = time.perf_counter() + _PATIENCE_SECONDS
    while len(free) < _CONNECTIONS and time.perf_counter() < end:  # noqa: ASYNC110  looked at a few times
        await asyncio.sleep(0.01)
    lost = _CONNECTIONS - len(free)
    for connection in free:
        connection.transport.close()
    good = [took for status, took in seen.answers if status == 200]
    refused = [took for status, took in seen.answers if status == 429]

    def percentile(latencies: list[float], p: int) -> float:
        return round(float(np.percentile(latencies, p)) * 1000, 1) if latencies else 0.0

    return {
        "offered": round(offered / seconds, 1),
        "goodput": round(len(good) / seconds, 1),
        "refused": round(len(refused) / seconds, 1),
        "unsent": round(seen.unsent / seconds, 1),
        "others": len(seen.answers) - len(good) - len(refused) + lost,
        "p50_ms": percentile(good, 50),
        "p99_ms": percentile(good, 99),
        "refused_p50_ms": percentile(refused, 50),
    }


def draw(rows: Sequence[dict[str, Any]], capacity: float, picture: Path = _PICTURE) -> None:
    """docs/overload.svg: of the same figures the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    factors = [row["factor"] for row in rows]
    with pyplot.rc_context({"svg.hashsalt": "overload", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
        left.plot(factors, [row["goodput"] / capacity for row in rows], marker="o", label="answered")
        left.plot(factors, [min(factor, 1.0) for factor in factors], linestyle=":", color="grey", label="ideal")
        left.set(ylabel="goodput / capacity", ylim=(0, 1.2))
        for name, style in (("p50_ms", "o-"), ("p99_ms", "o-"), ("refused_p50_ms", "x-")):
            found = [(row["factor"], row[name]) for row in rows if row[name]]
            label = ("refused, " if name.startswith("refused") else "answered, ") + name.removeprefix("refused_")[:3]
            right.plot(*zip(*found, strict=True), style, label=label)
        right.set(yscale="log", ylabel="ms from sending to answer")
        right.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        for axes in (left, right):
            axes.set(xscale="log", xlabel="offered load / capacity")
            axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend()
        figure.tight_layout()
        figure.savefig(picture, metadata={"Date": None})


# The server.


class PacedWorker(ReadyWorker):
    """A device of a fixed speed, one batch at a time."""

    async def start(self, limits: Limits) -> DevicePlan:
        """A plan that knows the speed."""
        cost = CostModel(floor=1e-3, base=1e-3, per_token=1 / _TOKENS_PER_SECOND)
        return DevicePlan(cost, limits.for_batches(cost))

    async def run_batch(self, rows: list[EmbedRow]) -> list[Vector]:
        """The next vectors, after the time that so many tokens take."""
        await asyncio.sleep(sum(map(len, rows)) / _TOKENS_PER_SECOND)
        return await super().run_batch(rows)


def serve(folder: Path, manifest: Manifest, core: int, control: Connection) -> None:
    """The server process: the real one, but for the device. All that this file knows of its inside is here."""
    os.sched_setaffinity(0, {core})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the command does
    import service.device.worker
    import service.server.process
    import service.server.startup

    service.server.startup.prepare_store = lambda settings, progress: (folder, manifest)
    service.device.worker.EncoderWorker = lambda *_: PacedWorker(manifest.width)  # type: ignore[assignment, misc]
    settle, listen = service.server.startup.settle, service.server.process.listen
    ports: list[int] = []

    def listening(host: str, port: int, shared: bool = False) -> Any:
        listener = listen(host, port, shared)
        ports.append(listener.getsockname()[1])
        return listener

    def settled() -> None:
        settle()
        control.send(ports[0])

    vars(service.server.process).update(listen=listening, settle=settled)
    settings = Settings(
        model=str(folder),
        port=0,
        device="cpu",
        batch_tokens=_BATCH_TOKENS,
        max_queued_tokens=_QUEUED_TOKENS,
        log_level="warning",
    )
    sys.exit(service.server.process.serve(settings, lambda done, total: None))


if __name__ == "__main__":
    main()
