"""Single queries beside bulk requests: how long they wait, and what they cost the bulk.

    python -m bench.mixed [--model DIR|RECIPE] [--seconds 20] [--rounds 3] [--save]

Three loads in turn, for the same time and in several rounds, since a shared machine's speed changes: bulk alone; bulk
with short queries arriving at random, so many a second; and that again before a server that serves its queue first
come, first served, in batches of as many tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import uvloop

from bench.client import closed_loop, open_loop, percentiles, request_bytes
from bench.report import finish, options_of, ratio, tell
from bench.server import Server, serving, stored
from bench.texts import mixed_texts, sentences

_BULK_CLIENTS = 4
_BULK_INPUTS = 64
_QUERIES_PER_SECOND = 1.0
_WARM_UP_SECONDS = 5.0


def main() -> None:
    """Measure and report."""
    options = options_of(__doc__, model="demo", seconds=20.0, rounds=3)
    folder, manifest = stored(options.model)
    rounds: dict[str, list[Load]] = {"bulk_alone": [], "lanes": [], "fifo": []}
    with serving(folder, {}) as lanes, serving(folder, {}, "bench.fifo_server") as fifo:
        loads = {"bulk_alone": (lanes, 0.0), "lanes": (lanes, _QUERIES_PER_SECOND), "fifo": (fifo, _QUERIES_PER_SECOND)}
        batch_tokens = {name: server.said("calibrated")[0]["batch_tokens"] for name, (server, _) in loads.items()}
        for number in range(options.rounds):
            for name, (server, queries) in loads.items():
                rounds[name].append(uvloop.run(measure(server, manifest.name, queries, options.seconds, number)))
                tell(name, figures(rounds[name][-1:], batch_tokens[name]))
    found = {name: figures(rounds[name], batch_tokens[name]) for name in loads}
    rates = {name: [load.tokens_per_second for load in each] for name, each in rounds.items()}
    ratios = {
        "query p99 / time of a batch": round(found["lanes"]["query_p99_ms"] / found["lanes"]["batch_ms"], 2),
        "tokens, with queries / bulk alone": ratio(rates["lanes"], rates["bulk_alone"]),
        "tokens, with queries and fifo / bulk alone": ratio(rates["fifo"], rates["bulk_alone"]),
        "query p50, fifo / lanes": round(found["fifo"]["query_p50_ms"] / found["lanes"]["query_p50_ms"], 1),
    }
    bulk = f"{_BULK_CLIENTS} clients of {_BULK_INPUTS} texts"
    finish("mixed", {"model": manifest.name, "bulk": bulk, **found, "ratios": ratios}, options.save)


@dataclass(frozen=True)
class Load:
    """What came of one load: tokens computed, and the seconds that each query took."""

    tokens_per_second: float
    latencies: list[float]


def figures(loads: Sequence[Load], batch_tokens: int) -> dict[str, Any]:
    """What loads of one kind came to together."""
    rate = mean(load.tokens_per_second for load in loads)
    latencies = [latency for load in loads for latency in load.latencies]
    waits = {f"query_{name}": round(value) for name, value in percentiles(latencies).items() if latencies}
    batch = {"batch_ms": round(1000 * batch_tokens / rate)}
    return {"tokens_per_second": round(rate), "queries": len(latencies), **waits, **batch}


async def measure(server: Server, model: str, queries: float, seconds: float, seed: int) -> Load:
    """Tokens a second of everything that was computed in the time, and the queries' latencies."""

    def bulk() -> Iterator[bytes]:
        for number in itertools.count():
            yield request_bytes(mixed_texts(_BULK_INPUTS, seed=100_000 * seed + number), model)

    def short() -> Iterator[bytes]:
        generator = random.Random(seed)
        pool = [text for text in sentences() if len(text) < 120]
        for number in itertools.count():
            yield request_bytes(f"{seed}.{number}: {generator.choice(pool)}", model)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(closed_loop(server.url, bulk(), _BULK_CLIENTS, _WARM_UP_SECONDS + seconds))
        await asyncio.sleep(_WARM_UP_SECONDS)
        # Tokens of the batches so far: those of requests still under way count too.
        tokens, began = server.metric("llm2vec_batch_tokens_sum"), time.perf_counter()
        asked = tasks.create_task(open_loop(server.url, short(), queries, seconds, 64, seed)) if queries else None
        await asyncio.sleep(seconds)
        rate = (server.metric("llm2vec_batch_tokens_sum") - tokens) / (time.perf_counter() - began)
    found = asked.result() if asked else []
    assert all(answer.status == 200 for answer in found), "a query was not answered"
    return Load(rate, [answer.seconds for answer in found])


if __name__ == "__main__":
    main()
