"""How many requests a second several front ends carry, before one engine that answers at once.

    python -m bench.front_ends [--front-ends 1 2 4] [--seconds 3] [--connections 64] [--clients 2] [--cases …] [--save]

The server is what `llm2vec-service serve` starts, real tokenizer included, but for the encoder. One front end is the
server of one process. Every process has all cores but those of the clients, so it needs about as many cores as front
ends, clients and one more; with fewer, processes wait for each other and the figures say little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from bench.http_path import CASES, Case, ReadyWorker, check_answer, distinct_texts, load, request_bytes
from bench.report import finish
from model_store.manifest import Manifest
from service.metrics import Metrics
from service.processes.child import Assignment
from service.server.startup import prepare_store
from service.settings import Settings

_TEXTS = 8192
_BATCH_TOKENS = 16384
_START_SECONDS = 60.0


def main() -> None:
    """Measure every case with each number of front ends."""
    parser = argparse.ArgumentParser("bench.front_ends")
    parser.add_argument("--model", default="demo", help="a stored encoder or recipe, for its tokenizer")
    parser.add_argument("--front-ends", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    parser.add_argument("--connections", type=int, default=64, help="of all clients together")
    parser.add_argument("--clients", type=int, default=2, help="processes that send, on a core each")
    parser.add_argument("--cases", nargs="+", default=["640/base64/1"], help="parts of WIDTH/ENCODING/INPUTS")
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()

    cases = [case for case in CASES if any(part in str(case) for part in options.cases)]
    cores = sorted(os.sched_getaffinity(0))
    own = cores[-options.clients :] if len(cores) > options.clients else cores
    folder, manifest = prepare_store(Settings(model=options.model), lambda done, total: None)
    texts = distinct_texts(_TEXTS)
    results = []
    for case, count in itertools.product(cases, options.front_ends):
        served = manifest.model_copy(update={"width": case.width})
        with running_server(folder, served, count, sorted(set(cores) - set(own)) or cores) as port:
            results.append(measure(port, case, request_bytes(case, texts, manifest.name), own, options))
        results[-1] |= {"front_ends": count}
        print(
            "{case:16} {front_ends:2} front ends {requests_per_second:8.1f} requests/s  p50 {p50_ms:7.2f}  "
            "p99 {p99_ms:7.2f}".format(**results[-1]),
            flush=True,
        )
    finish("front_ends", {"seconds": options.seconds, "clients": options.clients, "cases": results}, options.save)


def measure(
    port: int, case: Case, requests: Sequence[bytes], cores: Sequence[int], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one case, of all clients together."""
    connections = max(options.connections // options.clients, 1)
    with ProcessPoolExecutor(options.clients, multiprocessing.get_context("spawn")) as pool:
        shares = [requests[client :: options.clients] for client in range(options.clients)]
        given = [(port, share, connections, case, cores) for share in shares]
        list(pool.map(run_client, given, itertools.repeat(0.2)))  # so that nobody pays for a first time
        measured = list(pool.map(run_client, given, itertools.repeat(options.seconds)))
    latencies = np.concatenate([latency for latency, _ in measured])
    median, slow = np.percentile(latencies, (50, 99)) * 1000
    return {
        "case": str(case),
        "connections": connections * options.clients,
        "requests": len(latencies),
        "requests_per_second": round(sum(len(latency) / seconds for latency, seconds in measured), 1),
        "p50_ms": round(median, 2),
        "p99_ms": round(slow, 2),
    }


def run_client(
    given: tuple[int, Sequence[bytes], int, Case, Sequence[int]], seconds: float
) -> tuple[list[float], float]:
    """One client process's latencies, and for how long it asked."""
    port, requests, connections, case, cores = given
    os.sched_setaffinity(0, cores)
    measured = uvloop.run(load(port, requests, connections, seconds))
    for answer in measured.kept:
        check_answer(answer, case)
    return measured.latencies, measured.seconds


@contextmanager
def running_server(folder: Path, manifest: Manifest, front_ends: int, cores: Sequence[int]) -> Iterator[int]:
    """The port of a server on these cores, ready, until the block is left."""
    context = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile() as log:
        process = context.Process(target=serve, args=(folder, manifest, front_ends, cores, log.name))
        process.start()
        try:
            yield _port(Path(log.name), process)
        finally:
            process.terminate()
            process.join(60)
            process.kill()


def _port(log: Path, process: multiprocessing.process.BaseProcess) -> int:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.is_alive():
        said = {line["message"]: line for line in map(json.loads, log.read_text().splitlines())}
        if "ready" in said:
            return int(said["listening"]["port"])
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-5000:]}")


def serve(folder: Path, manifest: Manifest, front_ends: int, cores: Sequence[int], log: str) -> None:
    """The server's first process: the real one, but for the encoder."""
    os.sched_setaffinity(0, cores)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the command does

    import service.server.process
    from service.processes import supervisor

    for module in (service.server.process, supervisor):
        module.prepare_store = lambda settings, progress: (folder, manifest)  # type: ignore[attr-defined]
    settings = Settings(
        model=str(folder),
        port=0,
        device="cpu",
        frontends=front_ends,
        token_budget=_BATCH_TOKENS,
        batch_tokens=_BATCH_TOKENS,
        cache_bytes=0,  # cases share their texts
        log_level="info",
    )
    if front_ends == 1:
        import service.device.worker

        service.device.worker.EncoderWorker = lambda *_: ReadyWorker(manifest.width)  # type: ignore[assignment, misc]
    sys.exit(supervisor.supervise(settings, lambda done, total: None, engine="bench.front_ends"))


def ready_worker(assignment: Assignment, metrics: Metrics) -> ReadyWorker:
    """What an engine has for an encoder here."""
    return ReadyWorker(assignment.manifest.width)


if __name__ == "__main__":
    # Its supervisor runs an engine as a module with one number, as it does with service.processes.engine.
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        from service.processes.engine import main as engine_main

        sys.exit(engine_main(ready_worker))
    main()
