"""How many requests a second several front ends carry, before one engine that answers at once.

    python -m bench.front_ends [--front-ends 1 2 4] [--seconds 3] [--clients 2] [--cases SUBSTRING …] [--save]

The server is `bench.stand_in`; one front end is the server of one process. Every process has all cores but those of the
clients, so it needs about as many cores as front ends, clients and one more. With fewer, processes wait for each other
and the figures say little.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from bench.client import ask, percentiles, requests_of
from bench.http_path import SETTINGS, check, chosen
from bench.report import finish, options_of, tell
from bench.server import serving, stored
from bench.texts import distinct_texts

_TEXTS = 8192
_CONNECTIONS = 64  # of all clients together


def main() -> None:
    """Measure every case with each number of front ends."""
    parser = options_of(__doc__, model=True)
    parser.add_argument("--front-ends", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    parser.add_argument("--clients", type=int, default=2, help="processes that send, on a core each")
    parser.add_argument("--cases", nargs="+", metavar="SUBSTRING", default=["640/base64/1"], help="see bench.http_path")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    own = cores[-options.clients :] if len(cores) > options.clients else cores
    others = cores[: -options.clients] or cores
    folder, manifest = stored(options.model)
    texts = distinct_texts(_TEXTS)
    results: list[dict[str, Any]] = []
    for case, count in itertools.product(chosen(options.cases), options.front_ends):
        requests = requests_of(texts, case.inputs, manifest.name, case.encoding)
        shares = [requests[client :: options.clients] for client in range(options.clients)]
        settings = {**SETTINGS, "LLM2VEC_FRONTENDS": count, "BENCH_WIDTH": case.width}
        with serving(folder, settings, "bench.stand_in", (others, own)) as server:
            check(server, case, requests)
            results.append({"case": str(case), "front_ends": count, **measure(server.url, shares, options.seconds)})
        tell(f"{count} front ends", results[-1])
    finish("front_ends", {"seconds": options.seconds, "clients": options.clients, "cases": results}, options.save)


def measure(url: str, shares: Sequence[Sequence[bytes]], seconds: float) -> dict[str, Any]:
    """The figures of one case, of all clients together."""
    connections = max(_CONNECTIONS // len(shares), 1)
    with ProcessPoolExecutor(len(shares), multiprocessing.get_context("spawn")) as pool:
        for duration in (0.2, seconds):  # the first so that nobody pays for a first time
            asked = [pool.submit(ask, url, share, connections, duration) for share in shares]
            measured = [one.result() for one in asked]
    latencies = [latency for one in measured for latency in one.latencies]
    return {
        "connections": connections * len(shares),
        "requests": len(latencies),
        "requests_per_second": round(sum(one.per_second for one in measured), 1),
        **percentiles(latencies, digits=2),
    }


if __name__ == "__main__":
    main()
