"""What a batching policy costs whom: short queries beside bulk requests, on a device that is only a cost model.

    python -m bench.simulate [--seconds N] [--queries N] [--model 8B|1.3B|270M | --model fitted FLOOR BASE PER_TOKEN]
                             [--loads …] [--seed N] [--save]

`lanes` is the server's own `service.batching.scheduling`; the others are what it is compared with. Bulk loads:

    published  a request of 2048 passages every 10 s, each done before the next: about three quarters of an 8B's H100
    saturated  three clients with such requests, each sending its next as soon as it has its answer
    small      128 clients with 16 passages a request
    unequal    saturated, but one client's passages are ten times shorter, and a fourth client asks for 16 at a time
    long       three clients with 64 texts of 4096 to 8192 tokens a request
    mixed      one of these, and one with 2048 passages
    none       no bulk

Then what `llm2vec-service plan` promises is held against the same policy, for a GPU's share of each of `PLANS`: other
queries than it has seen itself, and bulk in requests of 2048 texts.

Simulated time only: a batch takes exactly what the cost model says and composing it takes nothing, so a lead can only
cost here. Padding is ignored, which flatters the time window. Every policy meets the same requests of the same seed.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from bench.report import finish
from model_store.build.sources import shape_of
from service.batching.cost_model import CostModel
from service.batching.scheduling import Lane
from service.planning.gpus import gpu_named
from service.planning.plan import Asked, Bulk, Plan, Serving, spread
from service.planning.simulation import LEAD_SECONDS, QUERY, Client, Input, Lanes, Policy, percentile, simulate
from service.settings import TOKEN_BUDGET

# Texts of the length that a server times itself with, in its defaults on an H100, as `llm2vec-service plan` has them.
_BASES = {
    "8B": "meta-llama/Meta-Llama-3-8B-Instruct",
    "1.3B": "princeton-nlp/Sheared-LLaMA-1.3B",
    "270M": "demo:",
}
MODELS = {name: Plan(shape_of(base), gpu_named("h100-sxm"), Asked()).cost for name, base in _BASES.items()}

_LINE = "{:40} {:>9} {:>8} {:>9} {:>8} {:>8} {:>8} {:>8} {:>6}"


LOADS: dict[str, tuple[Client, ...]] = {
    "published": (Client(2048, (50, 225), period=10),),
    "saturated": (Client(2048, (50, 225)),) * 3,
    "small": (Client(16, (100, 500)),) * 128,
    "unequal": (Client(2048, (50, 225)),) * 2 + (Client(2048, (5, 22)), Client(16, (50, 225))),
    "long": (Client(64, (4096, 8192)),) * 3,
    "mixed": (Client(64, (4096, 8192)), Client(2048, (50, 225))),
    "none": (),
}


_WEEK = 7 * 86400.0

# Those of docs/capacity.md: a base, a GPU, and what is asked of it.
PLANS: dict[str, tuple[str, str, Asked]] = {
    "8B, 2,000 queries/s": (_BASES["8B"], "h100-sxm", Asked(serving=Serving(2000))),
    "8B, 2,000 queries/s in 20 ms": (_BASES["8B"], "h100-sxm", Asked(serving=Serving(2000, p99=0.02))),
    "8B, 10⁹ texts in a week beside 2,000 queries/s": (
        _BASES["8B"],
        "h100-sxm",
        Asked(Bulk(10**9, 256, _WEEK), Serving(2000)),
    ),
    "8B on L4, 50 queries/s in 400 ms": (_BASES["8B"], "l4", Asked(serving=Serving(50, p99=0.4))),
    "1.3B, 50,000 queries/s": (_BASES["1.3B"], "h100-sxm", Asked(serving=Serving(50_000))),
    "1.3B, 10⁹ texts in a week beside 50,000 queries/s": (
        _BASES["1.3B"],
        "h100-sxm",
        Asked(Bulk(10**9, 256, _WEEK), Serving(50_000)),
    ),
}


@dataclass
class Fifo:
    """In order of arrival, up to so many rows or tokens: at once if the rows are there, else after `window`."""

    rows: float = inf
    tokens: float = inf
    window: float = 0.0
    lead: float = 0.0
    waiting: deque[Input] = field(default_factory=deque)

    def add(self, items: list[Input], lane: Lane) -> None:
        self.waiting.extend(items)

    def ready(self) -> float:
        if not self.waiting:
            return inf
        return 0.0 if len(self.waiting) >= self.rows else self.waiting[0].request.sent + self.window

    def take(self) -> list[Input]:
        batch = [self.waiting.popleft()]
        tokens = batch[0].tokens
        while self.waiting and len(batch) < self.rows and tokens + self.waiting[0].tokens <= self.tokens:
            batch.append(self.waiting.popleft())
            tokens += batch[-1].tokens
        return batch


def policies(cost: CostModel) -> dict[str, Callable[[], Policy]]:
    """Those compared, by name; the last is about what the server settles on with a GPU."""
    efficient = min(cost.efficient_tokens(), TOKEN_BUDGET["cuda"])
    return {
        "5 ms window, 32 rows, FIFO": lambda: Fifo(rows=32, window=5e-3),
        "continuous FIFO, 16384 tokens": lambda: Fifo(tokens=16384),
        "lanes, 16384": lambda: Lanes(16384),
        "lanes, 2048": lambda: Lanes(2048),
        "lanes, 2048, one batch ahead": lambda: Lanes(2048, inf),
        "lanes, 2048, 5 ms ahead": lambda: Lanes(2048, LEAD_SECONDS),
        f"lanes, {efficient} (efficient), 5 ms ahead": lambda: Lanes(efficient, LEAD_SECONDS),
    }


def main() -> None:
    """Simulate and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--queries", type=float, default=150, help="a second")
    parser.add_argument("--model", nargs="+", default=["8B"], help="a preset, or `fitted` and seconds")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=["published", "saturated"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    try:
        cost = cost_model(*options.model)
    except (KeyError, TypeError, ValueError):
        parser.error(f"--model is one of {', '.join(MODELS)}, or `fitted` and three numbers")

    loads: dict[str, dict[str, dict[str, float | None]]] = {}
    for load in options.loads:
        print(_LINE.format(load, "query p50", "p99 ms", "bulk p50", "p99", "max s", "tokens/s", "a batch", "jain"))
        loads[load] = {}
        for name, policy in policies(cost).items():
            outcome = simulate(policy(), cost, options.queries, LOADS[load], options.seconds, options.seed)
            loads[load][name] = summary = outcome.summary()
            print(_LINE.format(name, *("-" if value is None else f"{value:g}" for value in summary.values())))
    plans = {
        name: held_to_it(Plan(shape_of(base), gpu_named(gpu), asked), options.seconds, options.seed + 1)
        for name, (base, gpu, asked) in PLANS.items()
    }
    print(plans_table(plans))
    finish(
        "simulate",
        {
            "model": {"name": options.model[0], **vars(cost)},
            "seconds": options.seconds,
            "queries_per_second": options.queries,
            "seed": options.seed,
            "loads": loads,
            "plans": plans,
        },
        options.save,
    )


def held_to_it(plan: Plan, seconds: float, seed: int) -> dict[str, float]:
    """What a plan promises of one GPU, and what the policy makes of that GPU's share of the load."""
    bulk, serving, gpus = plan.asked.bulk, plan.asked.serving, plan.gpus
    assert serving is not None
    clients = (Client(2048, spread(bulk.tokens)),) * 2 if bulk else ()
    policy = Lanes(plan.batch_tokens, LEAD_SECONDS)
    share = serving.per_second / gpus
    found = simulate(policy, plan.cost, share, clients, seconds, seed, spread(serving.tokens))
    queries = found.tokens[QUERY]
    return {
        "gpus": gpus,
        "queries_per_second": share,
        "p99_ms_asked": serving.p99 * 1000,
        "p99_ms_at_cap": plan.p99_at_cap * 1000,
        "p99_ms": percentile(found.queries, 99, 1000) or 0.0,
        "utilization_planned": round(plan.utilization, 3),
        "utilization": round(queries * plan.cost.per_token / found.seconds, 3),
        "bulk_tokens_per_second_planned": round(bulk.texts * bulk.tokens / bulk.within / gpus) if bulk else 0,
        "bulk_tokens_per_second": round((sum(found.batches) - queries) / found.seconds),
    }


def plans_table(plans: dict[str, dict[str, float]]) -> str:
    """As Markdown, for docs/capacity.md."""
    lines = [
        "| plan, of one GPU | GPUs | p99 asked · at the cap · found | queries' share, planned · found | bulk, tokens a "
        "second, planned · found |",
        "|---|---|---|---|---|",
    ]
    for name, found in plans.items():
        waits = (found[f"p99_ms{which}"] for which in ("_asked", "_at_cap", ""))
        bulk = (found[f"bulk_tokens_per_second{which}"] for which in ("_planned", ""))
        cells = [
            name,
            f"{found['gpus']:g}",
            " · ".join(f"{wait:.3g}" for wait in waits) + " ms",
            f"{found['utilization_planned']:.1%} · {found['utilization']:.1%}",
            " · ".join(f"{rate:,.0f}" for rate in bulk) if found["bulk_tokens_per_second"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_model(name: str, *fitted: str) -> CostModel:
    """A preset, or a model of three numbers."""
    return CostModel(*map(float, fitted)) if name == "fitted" else MODELS[" ".join((name, *fitted))]


if __name__ == "__main__":
    main()
