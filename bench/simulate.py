"""What a batching policy costs whom: short queries beside bulk requests, on a device that is only a cost model.

    python -m bench.simulate [--seconds N] [--save]
    python -m bench.simulate --table

The device is an H100 with an 8B model, 150 queries arrive a second, and the bulk loads are

    published  a request of 2048 passages every 10 s, each done before the next: about three quarters of the device
    saturated  three clients with such requests, each sending its next as soon as it has its answer

`lanes` is the server's own `service.batching.scheduling`; the others are what it is compared with. Then what
`llm2vec-service plan` promises is held against the same policy, for a GPU's share of each of `PLANS`: other queries
than it has seen itself, and bulk in requests of 2048 texts. `--table` prints the kept figures of these plans, as
docs/capacity.md has them.

Simulated time only: a batch takes exactly what the cost model says and composing it takes nothing, so a lead can only
cost here. Padding is ignored, which flatters the time window. Every policy meets the same requests of the same seed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from bench.report import RESULTS, finish, options_of, tell
from model_store.build.sources import shape_of
from service.batching.cost_model import CostModel
from service.batching.scheduling import Lane
from service.planning.gpus import gpu_named
from service.planning.plan import Asked, Bulk, Plan, Serving, spread
from service.planning.simulation import LEAD_SECONDS, QUERY, Client, Input, Lanes, Outcome, Policy, percentile, simulate
from service.settings import TOKEN_BUDGET

_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
_SMALL = "princeton-nlp/Sheared-LLaMA-1.3B"
_QUERIES_PER_SECOND = 150.0
_SEED = 0

LOADS: dict[str, tuple[Client, ...]] = {
    "published": (Client(2048, (50, 225), period=10),),
    "saturated": (Client(2048, (50, 225)),) * 3,
}

_IN_A_WEEK = Bulk(10**9, 256, 7 * 86400.0)

# Those of docs/capacity.md: a base, a GPU, and what is asked of it.
PLANS: dict[str, tuple[str, str, Asked]] = {
    "8B, 2,000 queries/s": (_8B, "h100-sxm", Asked(serving=Serving(2000))),
    "8B, 2,000 queries/s in 20 ms": (_8B, "h100-sxm", Asked(serving=Serving(2000, p99=0.02))),
    "8B, 10⁹ texts in a week beside 2,000 queries/s": (_8B, "h100-sxm", Asked(_IN_A_WEEK, Serving(2000))),
    "8B on L4, 50 queries/s in 400 ms": (_8B, "l4", Asked(serving=Serving(50, p99=0.4))),
    "1.3B, 50,000 queries/s": (_SMALL, "h100-sxm", Asked(serving=Serving(50_000))),
    "1.3B, 10⁹ texts in a week beside 50,000 queries/s": (_SMALL, "h100-sxm", Asked(_IN_A_WEEK, Serving(50_000))),
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
    options = options_of(__doc__, seconds=120.0, table=False)
    if options.table:
        print(plans_table(json.loads((RESULTS / "simulate.json").read_text())["plans"]))
        return
    # Texts of the length that a server times itself with, in its defaults.
    cost = Plan(shape_of(_8B), gpu_named("h100-sxm"), Asked()).cost
    loads: dict[str, dict[str, dict[str, float | None]]] = {}
    for load, clients in LOADS.items():
        loads[load] = {}
        for name, policy in policies(cost).items():
            outcome = simulate(policy(), cost, _QUERIES_PER_SECOND, clients, options.seconds, _SEED)
            assert all(request.missing == 0 for request in outcome.requests), f"{name} lost or doubled an input"
            loads[load][name] = summary(outcome)
            tell(f"{load}: {name}", loads[load][name])
    plans = {
        name: held_to_it(Plan(shape_of(base), gpu_named(gpu), asked), options.seconds)
        for name, (base, gpu, asked) in PLANS.items()
    }
    print(plans_table(plans))
    about = {"seconds": options.seconds, "queries_per_second": _QUERIES_PER_SECOND, "seed": _SEED}
    finish("simulate", {"model": {"name": "8B", **vars(cost)}, **about, "loads": loads, "plans": plans}, options.save)


def summary(outcome: Outcome) -> dict[str, float | None]:
    """A policy's figures. `jain` is Jain's fairness index: 1 if all clients got equal tokens, 1/n if one got all."""
    queries, batches = outcome.queries, outcome.batches
    bulk = [request.seconds for request in outcome.requests if request.client != QUERY]
    shares = [tokens for client, tokens in outcome.tokens.items() if client != QUERY]
    jain = sum(shares) ** 2 / len(shares) / sum(share**2 for share in shares) if shares else None
    return {
        "interactive_p50_ms": percentile(queries, 50, 1000),
        "interactive_p99_ms": percentile(queries, 99, 1000),
        "bulk_p50_s": percentile(bulk, 50),
        "bulk_p99_s": percentile(bulk, 99),
        "bulk_longest_s": percentile(bulk, 100),
        "tokens_per_second": round(sum(batches) / outcome.seconds),
        "mean_batch_tokens": round(sum(batches) / max(len(batches), 1)),
        "jain": jain and round(jain, 3),
    }


def held_to_it(plan: Plan, seconds: float) -> dict[str, float]:
    """What a plan promises of one GPU, and what the policy makes of that GPU's share of the load."""
    bulk, serving, gpus = plan.asked.bulk, plan.asked.serving, plan.gpus
    assert serving is not None
    clients = (Client(2048, spread(bulk.tokens)),) * 2 if bulk else ()
    policy = Lanes(plan.batch_tokens, LEAD_SECONDS)
    share = serving.per_second / gpus
    found = simulate(policy, plan.cost, share, clients, seconds, _SEED + 1, spread(serving.tokens))
    queries = found.tokens[QUERY]
    return {
        "gpus": gpus,
        "queries_per_second": share,
        "p99_ms_asked": serving.p99 * 1000,
        "p99_ms_at_cap": plan.p99_at_cap * 1000,
        "p99_ms": percentile(found.queries, 99, 1000) or 0.0,
        "utilization_planned": round(plan.utilization, 3),
        "utilization_cap": round(plan.utilization_cap, 3),
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


if __name__ == "__main__":
    main()
