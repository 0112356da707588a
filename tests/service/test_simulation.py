"""The simulation itself, and what `bench.simulate` reports of the policies and of what plans promise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import pytest

from model_store.build.sources import shape_of
from service.batching.cost_model import CostModel
from service.batching.scheduling import Lane
from service.planning.gpus import gpu_named
from service.planning.plan import Asked, Plan
from service.planning.simulation import LEAD_SECONDS, Client, Input, Lanes, Policy, simulate

ROOT = Path(__file__).parents[2]
COST = Plan(shape_of("meta-llama/Meta-Llama-3-8B-Instruct"), gpu_named("h100-sxm"), Asked()).cost

WINDOW, CONTINUOUS = "5 ms window, 32 rows, FIFO", "continuous FIFO, 16384 tokens"
LANES_16384, LANES_2048 = "lanes, 16384", "lanes, 2048"
AHEAD, LATE = "lanes, 2048, one batch ahead", "lanes, 2048, 5 ms ahead"
POLICIES = {
    LANES_16384: lambda: Lanes(16384),
    LANES_2048: lambda: Lanes(2048),
    AHEAD: lambda: Lanes(2048, inf),
    LATE: lambda: Lanes(2048, LEAD_SECONDS),
    "efficient": lambda: Lanes(COST.efficient_tokens(), LEAD_SECONDS),
}
LOADS = {
    "small": (Client(16, (100, 500)),) * 128,
    "unequal": (Client(2048, (50, 225)),) * 2 + (Client(2048, (5, 22)), Client(16, (50, 225))),
    "long": (Client(64, (4096, 8192)),) * 3,
    "mixed": (Client(64, (4096, 8192)), Client(2048, (50, 225))),
}


@pytest.fixture(scope="module")
def reported() -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.simulate", "--seconds", "30"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def saturated(reported: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every policy's figures beside bulk clients that never pause."""
    found: dict[str, dict[str, float]] = reported["loads"]["saturated"]
    return found


def test_queries_wait_for_a_batch_in_lanes_and_for_a_whole_request_in_a_queue(
    saturated: dict[str, dict[str, float]],
) -> None:
    waits = {name: figures["interactive_p99_ms"] for name, figures in saturated.items()}
    assert min(waits[WINDOW], waits[CONTINUOUS]) > 20 * waits[LANES_16384]
    assert waits[LANES_16384] > 6 * waits[LANES_2048]  # an eighth of the tokens, and a constant
    assert waits[AHEAD] > 1.4 * waits[LANES_2048]
    assert waits[LANES_2048] < waits[LATE] < waits[AHEAD]


def test_lanes_cost_no_throughput(saturated: dict[str, dict[str, float]]) -> None:
    names = (WINDOW, CONTINUOUS, LANES_16384, LANES_2048, AHEAD, LATE)
    rates = [saturated[name]["tokens_per_second"] for name in names]
    assert min(rates) > 0.98 * max(rates)


def test_bulk_clients_share_equally_in_lanes(saturated: dict[str, dict[str, float]]) -> None:
    assert saturated[LANES_2048]["jain"] == pytest.approx(1, abs=0.01)


def test_the_published_load_gives_the_published_figures(reported: dict[str, Any]) -> None:
    fifo, lanes = (reported["loads"]["published"][name] for name in (CONTINUOUS, LANES_2048))
    assert (fifo["interactive_p50_ms"], fifo["interactive_p99_ms"]) == pytest.approx((2300, 6900), rel=0.1)
    assert (lanes["interactive_p50_ms"], lanes["interactive_p99_ms"]) == pytest.approx((62, 94), rel=0.1)
    assert lanes["tokens_per_second"] == pytest.approx(32300, rel=0.02)


def test_what_plans_promise_holds_under_other_queries(reported: dict[str, Any]) -> None:
    assert len(reported["plans"]) >= 6
    for name, found in reported["plans"].items():
        assert found["p99_ms"] <= found["p99_ms_asked"], name
        assert found["utilization"] == pytest.approx(found["utilization_planned"], abs=0.05), name
        assert found["utilization_planned"] <= found["utilization_cap"], name
        assert found["bulk_tokens_per_second"] >= found["bulk_tokens_per_second_planned"], name


@dataclass
class Watched:
    """A policy, and what went in and came out."""

    policy: Policy
    added: list[Input] = field(default_factory=list)
    taken: list[Input] = field(default_factory=list)

    @property
    def lead(self) -> float:
        return self.policy.lead

    def add(self, items: list[Input], lane: Lane) -> None:
        self.added += items
        self.policy.add(items, lane)

    def ready(self) -> float:
        return self.policy.ready()

    def take(self) -> list[Input]:
        batch = self.policy.take()
        assert batch
        self.taken += batch
        return batch


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("load", LOADS)
def test_every_input_is_computed_once_and_every_request_answered(name: str, load: str) -> None:
    watched = Watched(POLICIES[name]())
    outcome = simulate(watched, COST, 300, LOADS[load], 2)
    assert len(watched.added) > 600
    assert {id(item) for item in watched.taken} == {id(item) for item in watched.added}
    assert len(watched.taken) == len(watched.added)
    assert {id(request) for request in outcome.requests} == {id(item.request) for item in watched.added}
    assert all(request.missing == 0 and request.done >= request.sent + COST.floor for request in outcome.requests)


@pytest.mark.parametrize("name", POLICIES)
def test_a_lone_query_takes_the_floor(name: str) -> None:
    outcome = simulate(POLICIES[name](), COST, 0.01, (), 10_000)  # about 100, far apart
    assert outcome.queries == pytest.approx([COST.floor] * len(outcome.queries))


def test_a_client_pauses_only_as_long_as_its_period_says() -> None:
    seconds = CostModel(1.0, 1.0, 1e-9)
    often = simulate(Lanes(2048), seconds, 0, (Client(1, (8, 8), period=3),), 10)
    at_once = simulate(Lanes(2048), seconds, 0, (Client(1, (8, 8)),), 10)
    assert [request.sent for request in often.requests] == pytest.approx([0, 3, 6, 9])
    assert [request.sent for request in at_once.requests] == pytest.approx(range(10), abs=1e-6)


def test_the_same_seed_gives_the_same_figures() -> None:
    runs = [simulate(Lanes(2048), COST, 150, LOADS["small"], 2, seed) for seed in (1, 1, 2)]
    first, again, other = ((run.queries, run.batches, run.tokens) for run in runs)
    assert first == again != other
