"""Single queries beside bulk requests: how long they wait, and what they cost the bulk.

    python -m bench.mixed [--model DIR|RECIPE] [--seconds 60] [--queries 1.0] [--bulk-clients 4] [--save]

The same server three times, for the same time: bulk alone; bulk with short queries arriving at random, so many a
second; and that again with the queue served first come, first served, in batches of as many tokens.
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bench.load import Client
from bench.report import finish
from bench.texts import mixed_texts, sentences
from model_store.tokenizer import TextTokenizer
from service.server import prepare_store
from service.settings import Settings
from tests.e2e.process import ServerProcess

_BULK_INPUTS = 64
_WARM_UP_SECONDS = 5.0


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--queries", type=float, default=1.0, help="a second")
    parser.add_argument("--bulk-clients", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    folder, manifest = prepare_store(Settings(model=options.model), lambda done, total: None)
    tokenizer = TextTokenizer.load(folder, manifest)
    result: dict[str, Any] = {"model": manifest.name, "bulk": f"{options.bulk_clients} clients of {_BULK_INPUTS} texts"}
    for name, queries, module in (
        ("bulk_alone", 0.0, "service"),
        ("lanes", options.queries, "service"),
        ("fifo", options.queries, "bench.fifo_server"),
    ):
        with ServerProcess(folder, {"LLM2VEC_COMPILE": "auto"}, module=module) as server:
            calibrated = server.wait_for("calibrated")
            result[name] = measure(server, manifest.name, tokenizer, queries, options.bulk_clients, options.seconds)
            result[name]["batch_ms"] = round(1000 * calibrated["batch_tokens"] / result[name]["tokens_per_second"])
        print(name, result[name], flush=True)
    lanes = result["lanes"]
    result["ratios"] = {
        "query p99 / time of a batch": round(lanes["query_p99_ms"] / lanes["batch_ms"], 2),
        "tokens, with queries / bulk alone": round(
            lanes["tokens_per_second"] / result["bulk_alone"]["tokens_per_second"], 3
        ),
        "query p50, fifo / lanes": round(result["fifo"]["query_p50_ms"] / lanes["query_p50_ms"], 1),
    }
    finish("mixed", result, options.save)


def measure(
    server: ServerProcess, model: str, tokenizer: TextTokenizer, queries: float, bulk_clients: int, seconds: float
) -> dict[str, Any]:
    """Tokens a second of everything that was answered in the time, and the queries' latencies."""
    url = f"{server.base_url}/v1"
    stop = time.perf_counter() + _WARM_UP_SECONDS + seconds
    latencies: list[float] = []

    def bulk(number: int) -> None:
        client, round_number = Client(url, model), 0
        while time.perf_counter() < stop:
            client.embed(mixed_texts(_BULK_INPUTS, seed=1000 * number + round_number))
            round_number += 1

    def query(text: str) -> None:
        asked = time.perf_counter()
        Client(url, model).embed([text])
        latencies.append(time.perf_counter() - asked)

    with ThreadPoolExecutor(bulk_clients + 64) as pool:
        work = [pool.submit(bulk, number) for number in range(bulk_clients)]
        time.sleep(_WARM_UP_SECONDS)
        tokens, at = _computed_tokens(server), time.perf_counter()
        generator = random.Random(0)
        short = [text for text in sentences() if len(text) < 120]
        while queries and (left := stop - time.perf_counter()) > 0:
            time.sleep(min(generator.expovariate(queries), left))
            work.append(pool.submit(query, f"{len(work)}: {generator.choice(short)}"))
        time.sleep(max(stop - time.perf_counter(), 0))
        rate = (_computed_tokens(server) - tokens) / (time.perf_counter() - at)
        for one in work:
            one.result()
    found = {f"query_p{p}_ms": round(float(np.percentile(latencies, p)) * 1000) for p in (50, 99) if latencies}
    return {"tokens_per_second": round(rate), "queries": len(latencies), **found}


def _computed_tokens(server: ServerProcess) -> float:
    """Tokens of the batches so far: those of requests still under way count too."""
    return server.metric("llm2vec_batch_tokens_sum")


if __name__ == "__main__":
    main()
