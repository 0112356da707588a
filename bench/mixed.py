"""Single queries beside bulk requests: how long they wait, and what they cost the bulk.

    python -m bench.mixed [--model DIR|RECIPE] [--seconds 20] [--rounds 3] [--queries 1.0] [--bulk-clients 4] [--save]

Three loads in turn, for the same time and in several rounds, since a shared machine's speed changes: bulk alone; bulk
with short queries arriving at random, so many a second; and that again before a server that serves its queue first
come, first served, in batches of as many tokens.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from bench.load import Client
from bench.report import finish
from bench.texts import mixed_texts, sentences
from model_store.text.tokenizer import TextTokenizer
from service.server.startup import prepare_store
from service.settings import Settings
from tests.e2e.process import ServerProcess

_BULK_INPUTS = 64
_WARM_UP_SECONDS = 5.0


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=float, default=1.0, help="a second")
    parser.add_argument("--bulk-clients", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    folder, manifest = prepare_store(Settings(model=options.model), lambda done, total: None)
    tokenizer = TextTokenizer.load(folder, manifest)
    environment = {"LLM2VEC_COMPILE": "auto"}
    rounds: dict[str, list[Load]] = {"bulk_alone": [], "lanes": [], "fifo": []}
    with (
        ServerProcess(folder, environment) as lanes,
        ServerProcess(folder, environment, module="bench.fifo_server") as fifo,
    ):
        batch_tokens = {server: server.wait_for("calibrated")["batch_tokens"] for server in (lanes, fifo)}
        loads = {"bulk_alone": (lanes, 0.0), "lanes": (lanes, options.queries), "fifo": (fifo, options.queries)}
        for number in range(options.rounds):
            for name, (server, queries) in loads.items():
                seen = measure(server, manifest.name, tokenizer, queries, options.bulk_clients, options.seconds, number)
                rounds[name].append(seen)
                print(name, figures([seen], batch_tokens[server]), flush=True)
    found = {name: figures(rounds[name], batch_tokens[server]) for name, (server, _) in loads.items()}
    alone = [load.tokens_per_second for load in rounds["bulk_alone"]]

    def beside_alone(name: str) -> float:
        """The median round's."""
        return round(median(load.tokens_per_second / rate for load, rate in zip(rounds[name], alone, strict=True)), 3)

    ratios = {
        "query p99 / time of a batch": round(found["lanes"]["query_p99_ms"] / found["lanes"]["batch_ms"], 2),
        "tokens, with queries / bulk alone": beside_alone("lanes"),
        "tokens, with queries and fifo / bulk alone": beside_alone("fifo"),
        "query p50, fifo / lanes": round(found["fifo"]["query_p50_ms"] / found["lanes"]["query_p50_ms"], 1),
    }
    bulk = f"{options.bulk_clients} clients of {_BULK_INPUTS} texts"
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
    found = {f"query_p{p}_ms": round(float(np.percentile(latencies, p)) * 1000) for p in (50, 99) if latencies}
    batch = {"batch_ms": round(1000 * batch_tokens / rate)}
    return {"tokens_per_second": round(rate), "queries": len(latencies), **found, **batch}


def measure(
    server: ServerProcess,
    model: str,
    tokenizer: TextTokenizer,
    queries: float,
    bulk_clients: int,
    seconds: float,
    seed: int,
) -> Load:
    """Tokens a second of everything that was answered in the time, and the queries' latencies."""
    url = f"{server.base_url}/v1"
    stop = time.perf_counter() + _WARM_UP_SECONDS + seconds
    latencies: list[float] = []

    def bulk(number: int) -> None:
        client, round_number = Client(url, model), 0
        while time.perf_counter() < stop:
            client.embed(mixed_texts(_BULK_INPUTS, seed=100_000 * seed + 1000 * number + round_number))
            round_number += 1

    def query(text: str) -> None:
        asked = time.perf_counter()
        Client(url, model).embed([text])
        latencies.append(time.perf_counter() - asked)

    with ThreadPoolExecutor(bulk_clients + 64) as pool:
        work = [pool.submit(bulk, number) for number in range(bulk_clients)]
        time.sleep(_WARM_UP_SECONDS)
        tokens, at = _computed_tokens(server), time.perf_counter()
        generator = random.Random(seed)
        short = [text for text in sentences() if len(text) < 120]
        while queries and (left := stop - time.perf_counter()) > 0:
            time.sleep(min(generator.expovariate(queries), left))
            work.append(pool.submit(query, f"{seed}.{len(work)}: {generator.choice(short)}"))
        time.sleep(max(stop - time.perf_counter(), 0))
        rate = (_computed_tokens(server) - tokens) / (time.perf_counter() - at)
        for one in work:
            one.result()
    return Load(rate, latencies)


def _computed_tokens(server: ServerProcess) -> float:
    """Tokens of the batches so far: those of requests still under way count too."""
    return server.metric("llm2vec_batch_tokens_sum")


if __name__ == "__main__":
    main()
