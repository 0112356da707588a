"""The HTTP path alone: what the server spends on a request beside the encoder, on one core.

    python -m bench.http_path [--seconds 3] [--connections 32] [--cases SUBSTRING …] [--save]
    python -m bench.http_path --front-ends 1 2 4 --clients 2 --connections 64 --cases 640/base64/1 [--save]

The server is `bench.stand_in`, which answers at once. It has one core to itself, the clients have another: connections
in closed loop. A case is WIDTH/ENCODING/INPUTS, such as 4096/base64/1; `--cases` picks those with one of these in their
names. The longest stall is the latest that a timer of 1 ms came on the server's event loop. Tokenizer threads share the
server's core here, so what they hold up counts too, and so does whatever else runs on the machine.

The second command has several front ends before one engine; one front end is the server of one process. Every process
has all cores but those of the clients, which have a core each. So it needs about as many cores as front ends, clients
and one more: with fewer, processes wait for each other and the figures say little.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.client import ask, percentiles, requests_of
from bench.report import finish, options_of, tell
from bench.server import Server, serving, stored
from bench.texts import distinct_texts

# Distinct texts: a case goes round them in as many requests as they make.
_TEXTS = 32768
# With all connections in work, answers to 2048 inputs would fill the memory of a small machine.
_MOST_INPUTS_IN_WORK = 8192

# The token budget is the default on a GPU: there the HTTP path is what can be too slow. Cases share their texts.
_SETTINGS = {
    "LLM2VEC_BATCH_TOKENS": 16384,
    "LLM2VEC_CACHE_BYTES": 0,
    "LLM2VEC_DEVICE": "cpu",
    "LLM2VEC_TOKEN_BUDGET": 16384,
}


@dataclass(frozen=True)
class Case:
    """One kind of request."""

    width: int
    encoding: str
    inputs: int

    def __str__(self) -> str:
        return f"{self.width}/{self.encoding}/{self.inputs}"


CASES = [Case(*parts) for parts in itertools.product((640, 4096), ("float", "base64"), (1, 64, 2048))]


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", seconds=3.0, connections=32, cases=[""], clients=1, front_ends=[0])
    cases = [case for case in CASES if any(part in str(case) for part in options.cases)]
    if not cases:
        raise SystemExit(f"no such case; there are {', '.join(map(str, CASES))}")
    cores = sorted(os.sched_getaffinity(0))
    own = cores[1:][-options.clients :]
    servers = cores[: -len(own)] if any(options.front_ends) else cores[:1]
    folder, manifest = stored(options.model)
    texts = distinct_texts(_TEXTS)
    results = []
    for case, front_ends in itertools.product(cases, options.front_ends):
        requests = requests_of(texts, case.inputs, manifest.name, case.encoding)
        connections = min(options.connections, max(1, _MOST_INPUTS_IN_WORK // case.inputs))
        settings = {**_SETTINGS, "BENCH_WIDTH": case.width, "LLM2VEC_FRONTENDS": front_ends or 1}
        with serving(folder, settings, "bench.stand_in", (servers, own)) as server:
            check(server, case, requests)
            shares = [requests[client :: options.clients] for client in range(options.clients)]
            found = measure(server, case, shares, connections, options.seconds, stalls=not front_ends)
        results.append({"case": str(case), **({"front_ends": front_ends} if front_ends else {}), **found})
        tell("", results[-1])
    name = "front_ends" if any(options.front_ends) else "http_path"
    finish(name, {"seconds": options.seconds, "clients": options.clients, "cases": results}, options.save)


def check(server: Server, case: Case, requests: Sequence[bytes]) -> None:
    """An answer has a unit vector of the right width for each input."""
    vectors = ask(server.url, requests[:1], 1, keeps=True).answers[0].vectors
    assert vectors.shape == (case.inputs, case.width), f"{case}: {vectors.shape}"
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-3, f"{case}: a vector's length is not 1"


def measure(
    server: Server, case: Case, shares: Sequence[Sequence[bytes]], connections: int, seconds: float, stalls: bool
) -> dict[str, Any]:
    """The figures of one case, of all clients together; `stalls` for a server of one process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(shares), context, initializer=gc.disable) as pool:
        for duration in (0.2, seconds):  # the first so that nobody pays for a first time
            if stalls:
                longest_stall_ms(server)
            asked = [pool.submit(ask, server.url, share, connections // len(shares), duration) for share in shares]
            found = [one.result() for one in asked]
    latencies = [latency for one in found for latency in one.latencies]
    rate = sum(one.per_second for one in found)
    return {
        "connections": connections,
        "requests": len(latencies),
        "requests_per_second": round(rate, 1),
        "texts_per_second": round(rate * case.inputs),
        **percentiles(latencies, digits=2),
        **({"longest_stall_ms": longest_stall_ms(server)} if stalls else {}),
    }


def longest_stall_ms(server: Server) -> float:
    """The longest stall of the server's event loop since the last look."""
    count = len(server.said("event loop"))
    server.process.send_signal(signal.SIGUSR1)
    while len(lines := server.said("event loop")) == count:
        time.sleep(0.01)
    return float(lines[-1]["longest_ms"])


if __name__ == "__main__":
    main()
