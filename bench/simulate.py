"""What a batching policy costs whom: short queries beside bulk requests, on a device that is only a cost model.

    python -m bench.simulate [--seconds N] [--queries N] [--model 8B|1.3B|270M | --model fitted FLOOR BASE PER_TOKEN]
                             [--loads …] [--seed N] [--save]

`lanes` is the server's own `service.scheduling`; the others are what it is compared with. Bulk loads:

    published  a request of 2048 passages every 10 s, each done before the next: about three quarters of an 8B's H100
    saturated  three clients with such requests, each sending its next as soon as it has its answer
    small      128 clients with 16 passages a request
    unequal    saturated, but one client's passages are ten times shorter, and a fourth client asks for 16 at a time
    long       three clients with 64 texts of 4096 to 8192 tokens a request
    mixed      one of these, and one with 2048 passages
    none       no bulk

Simulated time only: a batch takes exactly what the cost model says and composing it takes nothing, so a lead can only
cost here. Padding is ignored, which flatters the time window. Every policy meets the same requests of the same seed.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import numpy as np

from bench.report import finish
from service.cost_model import CostModel
from service.scheduling import BatchLimits, Lane, Queue, take_batch

# Rooflines of an H100 with compiled layers, as far as large batches come near them in practice: estimates.
MODELS = {
    "8B": CostModel(floor=5.4e-3, base=1e-3, per_token=1 / 42_500),
    "1.3B": CostModel(floor=0.95e-3, base=0.5e-3, per_token=1 / 220_000),
    "270M": CostModel(floor=0.45e-3, base=0.45e-3, per_token=1 / 1_250_000),
}

QUERY = -1
QUERY_TOKENS = (16, 40)
TOKEN_BUDGET = 16384
LEAD_SECONDS = 5e-3

_LINE = "{:40} {:>9} {:>8} {:>9} {:>8} {:>8} {:>8} {:>8} {:>6}"


@dataclass(frozen=True)
class Client:
    """Sends requests of so many inputs one after another, the next no earlier than `period` after the last."""

    inputs: int
    tokens: tuple[int, int]  # of an input: the shortest and the longest
    period: float = 0.0


LOADS: dict[str, tuple[Client, ...]] = {
    "published": (Client(2048, (50, 225), period=10),),
    "saturated": (Client(2048, (50, 225)),) * 3,
    "small": (Client(16, (100, 500)),) * 128,
    "unequal": (Client(2048, (50, 225)),) * 2 + (Client(2048, (5, 22)), Client(16, (50, 225))),
    "long": (Client(64, (4096, 8192)),) * 3,
    "mixed": (Client(64, (4096, 8192)), Client(2048, (50, 225))),
    "none": (),
}


@dataclass(eq=False)
class Request:
    """A simulated request of a client's, or a query; done once its last input is."""

    client: int  # its place in the load, or QUERY
    sent: float
    missing: int
    done: float = inf

    @property
    def seconds(self) -> float:
        return self.done - self.sent


@dataclass(eq=False, slots=True)
class Input:
    """One of a request's inputs. Nobody hangs up here."""

    request: Request
    tokens: int
    wanted: bool = True


class Policy(Protocol):
    """What waits, and which of it goes next."""

    @property
    def lead(self) -> float:
        """How long before the device is free the next batch is composed."""

    def add(self, items: list[Input], lane: Lane) -> None:
        """A request has come."""

    def ready(self) -> float:
        """From when on a free device would get a batch, if nothing more came."""

    def take(self) -> list[Input]:
        """The next batch, off the queue."""


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


@dataclass
class Lanes:
    """The server's policy. `lead`: 0 composes when the device is free, infinity when it begins the batch before."""

    batch_tokens: int
    lead: float = 0.0
    queue: Queue[Input] = field(default_factory=Queue)

    def add(self, items: list[Input], lane: Lane) -> None:
        self.queue.add(items, lane)

    def ready(self) -> float:
        return 0.0 if self.queue else inf

    def take(self) -> list[Input]:
        return take_batch(self.queue, BatchLimits(self.batch_tokens, max(self.batch_tokens, TOKEN_BUDGET)))


def policies(cost: CostModel) -> dict[str, Callable[[], Policy]]:
    """Those compared, by name; the last is about what the server settles on with a GPU."""
    efficient = min(cost.efficient_tokens(), TOKEN_BUDGET)
    return {
        "5 ms window, 32 rows, FIFO": lambda: Fifo(rows=32, window=5e-3),
        "continuous FIFO, 16384 tokens": lambda: Fifo(tokens=16384),
        "lanes, 16384": lambda: Lanes(16384),
        "lanes, 2048": lambda: Lanes(2048),
        "lanes, 2048, one batch ahead": lambda: Lanes(2048, inf),
        "lanes, 2048, 5 ms ahead": lambda: Lanes(2048, LEAD_SECONDS),
        f"lanes, {efficient} (efficient), 5 ms ahead": lambda: Lanes(efficient, LEAD_SECONDS),
    }


@dataclass
class Outcome:
    """Every request, and what the device did while they came."""

    requests: list[Request] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)  # tokens of each
    tokens: dict[int, int] = field(default_factory=dict)  # by client
    seconds: float = 0.0  # until the last of these batches ended

    @property
    def queries(self) -> list[float]:
        """Seconds of each query."""
        return [request.seconds for request in self.requests if request.client == QUERY]

    @property
    def bulk(self) -> list[float]:
        """Seconds of each bulk request."""
        return [request.seconds for request in self.requests if request.client != QUERY]

    @property
    def tokens_per_second(self) -> float:
        return sum(self.batches) / self.seconds

    @property
    def jain(self) -> float | None:
        """Fairness between clients: 1 where they got equal tokens, 1/n where one of n got all."""
        shares = [tokens for client, tokens in self.tokens.items() if client != QUERY]
        return sum(shares) ** 2 / len(shares) / sum(share**2 for share in shares) if shares else None

    def count(self, batch: list[Input], ended: float) -> None:
        """The device has done a batch."""
        self.seconds = max(self.seconds, ended)
        self.batches.append(sum(item.tokens for item in batch))
        for item in batch:
            client = item.request.client
            self.tokens[client] = self.tokens.get(client, 0) + item.tokens

    def summary(self) -> dict[str, float | None]:
        """The figures of a report."""
        return {
            "interactive_p50_ms": percentile(self.queries, 50, 1000),
            "interactive_p99_ms": percentile(self.queries, 99, 1000),
            "bulk_p50_s": percentile(self.bulk, 50),
            "bulk_p99_s": percentile(self.bulk, 99),
            "bulk_longest_s": percentile(self.bulk, 100),
            "tokens_per_second": round(self.tokens_per_second),
            "mean_batch_tokens": round(sum(self.batches) / max(len(self.batches), 1)),
            "jain": self.jain and round(self.jain, 3),
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
    finish(
        "simulate",
        {
            "model": {"name": options.model[0], **vars(cost)},
            "seconds": options.seconds,
            "queries_per_second": options.queries,
            "seed": options.seed,
            "loads": loads,
        },
        options.save,
    )


def cost_model(name: str, *fitted: str) -> CostModel:
    """A preset, or a model of three numbers."""
    return CostModel(*map(float, fitted)) if name == "fitted" else MODELS[" ".join((name, *fitted))]


def simulate(
    policy: Policy, cost: CostModel, queries: float, clients: Sequence[Client], seconds: float, seed: int = 0
) -> Outcome:
    """Requests come for so long, `queries` a second at random beside the clients' own, and all are then answered."""
    crowd = _Crowd(queries, clients, seconds, seed)
    outcome = Outcome(seconds=seconds)
    now = free_at = compose_at = 0.0
    while True:
        leaves = max(now, compose_at, policy.ready())
        if leaves == crowd.next_at == inf:
            return outcome
        if crowd.next_at <= leaves:
            now = crowd.next_at
            items = crowd.send()
            outcome.requests.append(items[0].request)
            policy.add(items, "interactive" if items[0].request.client == QUERY else "bulk")
            continue
        now = leaves
        batch = policy.take()
        begins = max(now, free_at)
        free_at = begins + cost.seconds(sum(item.tokens for item in batch))
        compose_at = max(begins, free_at - policy.lead)  # never more than one batch ahead of the device
        for item in batch:
            crowd.answer(item, free_at)
        if begins < seconds:
            outcome.count(batch, free_at)


class _Crowd:
    """Who sends what and when: the same for every policy, but for when a client has its answer."""

    def __init__(self, queries: float, clients: Sequence[Client], seconds: float, seed: int) -> None:
        self._clients = {**dict(enumerate(clients)), QUERY: Client(1, QUERY_TOKENS)}
        self._dice = {number: random.Random(f"{seed}/{number}") for number in self._clients}
        self._queries = queries
        self._seconds = seconds
        self._arrivals: list[tuple[float, int]] = []
        for number in range(len(clients)):
            self._schedule(0.0, number)
        self._schedule_query(0.0)

    @property
    def next_at(self) -> float:
        """When the next request comes; infinity if none does before an answer."""
        return self._arrivals[0][0] if self._arrivals else inf

    def send(self) -> list[Input]:
        """The next request's inputs."""
        now, number = heapq.heappop(self._arrivals)
        client, dice = self._clients[number], self._dice[number]
        if number == QUERY:
            self._schedule_query(now)
        request = Request(number, now, client.inputs)
        return [Input(request, dice.randint(*client.tokens)) for _ in range(client.inputs)]

    def answer(self, item: Input, now: float) -> None:
        """An input is done; its client goes on once it was the last."""
        request = item.request
        request.missing -= 1
        if not request.missing:
            request.done = now
            if request.client != QUERY:
                self._schedule(max(now, request.sent + self._clients[request.client].period), request.client)

    def _schedule(self, at: float, number: int) -> None:
        if at < self._seconds:
            heapq.heappush(self._arrivals, (at, number))

    def _schedule_query(self, now: float) -> None:
        if self._queries:
            self._schedule(now + self._dice[QUERY].expovariate(self._queries), QUERY)


def percentile(values: list[float], percent: float, scale: float = 1.0) -> float | None:
    """So many percent are at most this; three digits of it."""
    return float(f"{np.percentile(values, percent) * scale:.3g}") if values else None


if __name__ == "__main__":
    main()
