"""The HTTP path alone: what the server spends on a request beside the encoder, on one core.

    python -m bench.http_path [--seconds 3] [--connections 32] [--cases SUBSTRING …] [--save]

The server is `bench.stand_in`, which answers at once. It has one core to itself, the clients have another: connections
in closed loop. A case is WIDTH/ENCODING/INPUTS, such as 4096/base64/1.

The longest stall is the latest that a timer of 1 ms came on the server's event loop. Tokenizer threads share the
server's core here, so what they hold up counts too, and so does whatever else runs on the machine: `others` is the
part of the server's core that other processes took, and a line with more than 5 % of that is marked.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.client import ask, percentiles, requests_of
from bench.report import finish, options_of, tell
from bench.server import Server, serving, stored, two_cores
from bench.texts import distinct_texts

# Distinct texts: a case goes round them in as many requests as they make.
_TEXTS = 32768
# With all connections in work, answers to 2048 inputs would fill the memory of a small machine.
_MOST_INPUTS_IN_WORK = 8192
_NOISY_SHARE = 0.05
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# The token budget is the default on a GPU: there the HTTP path is what can be too slow. Cases share their texts.
SETTINGS = {
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
    parser = options_of(__doc__, model=True)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case (default %(default)s)")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--cases", nargs="+", metavar="SUBSTRING", default=[""], help="only those with one of these")
    options = parser.parse_args()
    cases = chosen(options.cases)
    if not cases:
        parser.error("no such case")
    cores = two_cores()
    folder, manifest = stored(options.model)
    texts = distinct_texts(_TEXTS)
    gc.disable()  # here, where the clients are
    results = []
    for width, group in itertools.groupby(cases, lambda case: case.width):
        with serving(folder, {**SETTINGS, "BENCH_WIDTH": width}, "bench.stand_in", cores) as server:
            for case in group:
                requests = requests_of(texts, case.inputs, manifest.name, case.encoding)
                connections = min(options.connections, max(1, _MOST_INPUTS_IN_WORK // case.inputs))
                results.append(measure(server, cores[0][0], case, requests, connections, options.seconds))
                tell("NOISY" if results[-1]["others"] > _NOISY_SHARE else "", results[-1])
    finish("http_path", {"seconds": options.seconds, "cases": results}, options.save)


def chosen(parts: Sequence[str]) -> list[Case]:
    """The cases with one of these in their names."""
    return [case for case in CASES if any(part in str(case) for part in parts)]


def measure(
    server: Server, core: int, case: Case, requests: Sequence[bytes], connections: int, seconds: float
) -> dict[str, Any]:
    """The figures of one case."""
    check(server, case, requests)
    ask(server.url, requests, connections, 0.0)  # so that nobody pays for a first time
    before = look(server)
    began, busy, own = time.perf_counter(), core_seconds(core), time.process_time()
    found = ask(server.url, requests, connections, seconds)
    after = look(server)
    wall = time.perf_counter() - began
    busy, own = core_seconds(core) - busy, time.process_time() - own
    cpu_seconds = after["cpu_seconds"] - before["cpu_seconds"]
    return {
        "case": str(case),
        "connections": connections,
        "requests": len(found.answers),
        "requests_per_second": round(found.per_second, 1),
        "texts_per_second": round(found.per_second * case.inputs),
        **percentiles(found.latencies, digits=2),
        "longest_stall_ms": after["longest_ms"],
        "server_cpu_ms": round(cpu_seconds * 1000 / len(found.answers), 3),
        "server_busy": round(cpu_seconds / wall, 2),
        "clients_busy": round(own / wall, 2),
        "others": round(max(busy - cpu_seconds, 0.0) / wall, 2),
    }


def check(server: Server, case: Case, requests: Sequence[bytes]) -> None:
    """An answer has a unit vector of the right width for each input."""
    (vectors,) = ask(server.url, requests[:1], 1, keeps=True).vectors
    assert vectors.shape == (case.inputs, case.width), f"{case}: {vectors.shape}"
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-3, f"{case}: a vector's length is not 1"


def look(server: Server) -> dict[str, Any]:
    """The longest stall of the server's event loop since the last look, and its CPU seconds so far."""
    count = len(server.said("event loop"))
    server.process.send_signal(signal.SIGUSR1)
    while len(lines := server.said("event loop")) == count:
        time.sleep(0.01)
    return lines[-1]


def core_seconds(core: int) -> float:
    """What processes, and other guests of the same host, have had of a core since the machine started."""
    fields = next(row for row in Path("/proc/stat").read_text().splitlines() if row.startswith(f"cpu{core} ")).split()
    user, nice, system, steal = (int(fields[place]) for place in (1, 2, 3, 8))
    return (user + nice + system + steal) / _TICKS_PER_SECOND


if __name__ == "__main__":
    main()
