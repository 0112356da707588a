"""The simulation itself, and the order in which it puts the policies."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from bench.simulate import LOADS, MODELS, Fifo, cost_model, policies
from service.batching.cost_model import CostModel
from service.batching.scheduling import Lane
from service.planning.simulation import Client, Input, Lanes, Outcome, Policy, simulate

COST = MODELS["8B"]
WINDOW, CONTINUOUS, LANES_16384, LANES_2048, AHEAD, LATE, _ = policies(COST)


@pytest.fixture(scope="module")
def saturated() -> dict[str, Outcome]:
    """Every policy beside bulk clients that never pause."""
    return {name: simulate(make(), COST, 150, LOADS["saturated"], 30) for name, make in policies(COST).items()}


def p99(outcome: Outcome) -> float:
    found = outcome.summary()["interactive_p99_ms"]
    assert found is not None
    return found


def test_queries_wait_for_a_batch_in_lanes_and_for_a_whole_request_in_a_queue(saturated: dict[str, Outcome]) -> None:
    waits = {name: p99(outcome) for name, outcome in saturated.items()}
    assert min(waits[WINDOW], waits[CONTINUOUS]) > 20 * waits[LANES_16384]
    assert waits[LANES_16384] > 6 * waits[LANES_2048]  # an eighth of the tokens, and a constant
    assert waits[AHEAD] > 1.4 * waits[LANES_2048]
    assert waits[LANES_2048] < waits[LATE] < waits[AHEAD]


def test_lanes_cost_no_throughput(saturated: dict[str, Outcome]) -> None:
    rates = [saturated[name].tokens_per_second for name in (WINDOW, CONTINUOUS, LANES_16384, LANES_2048, AHEAD, LATE)]
    assert min(rates) > 0.98 * max(rates)


def test_bulk_clients_share_equally_in_lanes(saturated: dict[str, Outcome]) -> None:
    assert saturated[LANES_2048].summary()["jain"] == pytest.approx(1, abs=0.01)


def test_the_published_load_gives_the_published_figures() -> None:
    fifo = simulate(Fifo(tokens=16384), COST, 150, LOADS["published"], 30).summary()
    lanes = simulate(Lanes(2048), COST, 150, LOADS["published"], 30).summary()
    assert (fifo["interactive_p50_ms"], fifo["interactive_p99_ms"]) == pytest.approx((2300, 6900), rel=0.1)
    assert (lanes["interactive_p50_ms"], lanes["interactive_p99_ms"]) == pytest.approx((62, 94), rel=0.1)
    assert lanes["tokens_per_second"] == pytest.approx(32300, rel=0.02)


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


@pytest.mark.parametrize("name", policies(COST))
@pytest.mark.parametrize("load", ["small", "unequal", "long", "mixed"])
def test_every_input_is_computed_once_and_every_request_answered(name: str, load: str) -> None:
    watched = Watched(policies(COST)[name]())
    outcome = simulate(watched, COST, 300, LOADS[load], 2)
    assert len(watched.added) > 600
    assert {id(item) for item in watched.taken} == {id(item) for item in watched.added}
    assert len(watched.taken) == len(watched.added)
    assert {id(request) for request in outcome.requests} == {id(item.request) for item in watched.added}
    assert all(request.missing == 0 and request.done >= request.sent + COST.floor for request in outcome.requests)


@pytest.mark.parametrize("name", policies(COST))
def test_a_lone_query_takes_the_floor(name: str) -> None:
    window = 5e-3 if name == WINDOW else 0
    outcome = simulate(policies(COST)[name](), COST, 0.01, (), 10_000)  # about 100, far apart
    assert outcome.queries == pytest.approx([COST.floor + window] * len(outcome.queries))


def test_a_client_pauses_only_as_long_as_its_period_says() -> None:
    seconds = CostModel(1.0, 1.0, 1e-9)
    often = simulate(Lanes(2048), seconds, 0, (Client(1, (8, 8), period=3),), 10)
    at_once = simulate(Lanes(2048), seconds, 0, (Client(1, (8, 8)),), 10)
    assert [request.sent for request in often.requests] == pytest.approx([0, 3, 6, 9])
    assert [request.sent for request in at_once.requests] == pytest.approx(range(10), abs=1e-6)


def test_the_same_seed_gives_the_same_figures() -> None:
    first, again, other = (simulate(Lanes(2048), COST, 150, LOADS["small"], 2, seed).summary() for seed in (1, 1, 2))
    assert first == again != other


def test_a_fitted_model_is_three_numbers() -> None:
    assert cost_model("fitted", "0.02", "0.01", "7e-4") == CostModel(0.02, 0.01, 7e-4)


@pytest.mark.parametrize("words", [["9B"], ["8B", "0.02"], ["fitted"], ["fitted", "0.02", "0.01"], ["fitted", *"abc"]])
def test_another_model_is_refused(words: list[str]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        cost_model(*words)
