"""Simulates a batching policy on a device that is only a cost model: how long each request waits.

A batch takes exactly the time of the cost model, and composing it takes none, so a lead brings no gain here. With the
same seed, every policy gets the same requests. No event loop, no clock, no torch.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import numpy as np

from service.batching.cost_model import CostModel
from service.batching.scheduling import BatchLimits, Lane, Queue, take_batch
from service.settings import TOKEN_BUDGET

# Stands in place of a client's number.
QUERY = -1
QUERY_TOKENS = (16, 40)

# A little more than the time that a host needs to give a batch to a GPU.
LEAD_SECONDS = 5e-3


@dataclass(frozen=True)
class Client:
    """Sends requests of `inputs` inputs one after another, the next no earlier than `period` seconds after the last."""

    inputs: int
    tokens: tuple[int, int]  # of an input: the shortest and the longest
    period: float = 0.0


@dataclass(eq=False)
class Request:
    """A simulated request of a client, or a query. It is done when its last input is done."""

    client: int  # its place in the load, or QUERY
    sent: float
    missing: int
    done: float = inf

    @property
    def seconds(self) -> float:
        return self.done - self.sent


@dataclass(eq=False, slots=True)
class Input:
    """One of a request's inputs. It always stays wanted, as no client hangs up here."""

    request: Request
    tokens: int
    wanted: bool = True


class Policy(Protocol):
    """A queue, and the policy that takes the next batch from it."""

    @property
    def lead(self) -> float:
        """How long before the device is free the next batch is composed."""

    def add(self, items: list[Input], lane: Lane) -> None:
        """Queue the inputs of a request that has arrived."""

    def ready(self) -> float:
        """The time from which a free device would get a batch, if no more requests came."""

    def take(self) -> list[Input]:
        """The next batch, off the queue."""


@dataclass
class Lanes:
    """The server's policy. It composes when the device is free; with `lead` infinity, when the last batch begins."""

    batch_tokens: int
    lead: float = 0.0
    queue: Queue[Input] = field(default_factory=Queue)

    def add(self, items: list[Input], lane: Lane) -> None:
        self.queue.add(items, lane)

    def ready(self) -> float:
        return 0.0 if self.queue else inf

    def take(self) -> list[Input]:
        return take_batch(self.queue, BatchLimits(self.batch_tokens, max(self.batch_tokens, TOKEN_BUDGET["cuda"])))


@dataclass
class Outcome:
    """Every request, and the batches of the device while requests came."""

    requests: list[Request] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)  # tokens of each
    tokens: dict[int, int] = field(default_factory=dict)  # by client
    seconds: float = 0.0  # until the last of these batches ended

    @property
    def queries(self) -> list[float]:
        return [request.seconds for request in self.requests if request.client == QUERY]

    def count(self, batch: list[Input], ended: float) -> None:
        self.seconds = max(self.seconds, ended)
        self.batches.append(sum(item.tokens for item in batch))
        for item in batch:
            client = item.request.client
            self.tokens[client] = self.tokens.get(client, 0) + item.tokens


def simulate(
    policy: Policy,
    cost: CostModel,
    queries: float,
    clients: Sequence[Client],
    seconds: float,
    seed: int = 0,
    query_tokens: tuple[int, int] = QUERY_TOKENS,
) -> Outcome:
    """Let requests come for `seconds`: `queries` a second at random, and the clients' own. Then answer all."""
    crowd = _Crowd(queries, query_tokens, clients, seconds, seed)
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
    """Sends the requests. They are the same for every policy, except that a client waits for its answer."""

    def __init__(
        self, queries: float, query_tokens: tuple[int, int], clients: Sequence[Client], seconds: float, seed: int
    ) -> None:
        self._clients = {**dict(enumerate(clients)), QUERY: Client(1, query_tokens)}
        self._dice = {number: random.Random(f"{seed}/{number}") for number in self._clients}
        self._queries = queries
        self._seconds = seconds
        self._arrivals: list[tuple[float, int]] = []
        for number in range(len(clients)):
            self._schedule(0.0, number)
        self._schedule_query(0.0)

    @property
    def next_at(self) -> float:
        """When the next request comes; infinity if none comes before an answer."""
        return self._arrivals[0][0] if self._arrivals else inf

    def send(self) -> list[Input]:
        now, number = heapq.heappop(self._arrivals)
        client, dice = self._clients[number], self._dice[number]
        if number == QUERY:
            self._schedule_query(now)
        request = Request(number, now, client.inputs)
        return [Input(request, dice.randint(*client.tokens)) for _ in range(client.inputs)]

    def answer(self, item: Input, now: float) -> None:
        """Note that an input is done. After the last one of a request its client goes on."""
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
    """The percentile of the values, rounded to three digits."""
    return float(f"{np.percentile(values, percent) * scale:.3g}") if values else None
