"""The policy as a table: what waits, what the next batch takes, what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from service.batching.scheduling import BatchLimits, Queue, take_batch

LIMITS = BatchLimits(batch_tokens=16, token_budget=40)  # a quantum of 2


@dataclass
class Input:
    """So many tokens; not wanted: its client hung up."""

    tokens: int
    wanted: bool = True


def queue_of(interactive: list[int], *bulk: list[int]) -> Queue[Input]:
    queue: Queue[Input] = Queue()
    queue.add([Input(tokens) for tokens in interactive], "interactive")
    for request in bulk:
        queue.add([Input(tokens) for tokens in request], "bulk")
    return queue


def taken(queue: Queue[Input], limits: BatchLimits = LIMITS) -> list[int]:
    return [item.tokens for item in take_batch(queue, limits)]


@pytest.mark.parametrize(
    ("interactive", "bulk", "batch"),
    [
        ([], [], []),
        ([3], [], [3]),
        ([3, 4, 9], [], [3, 4, 9]),
        ([3, 4, 10], [], [3, 4]),
        ([3, 14, 1], [], [3]),  # strictly the oldest first: a later one that would fit does not overtake
        ([30], [], [30]),  # longer than a batch: alone
        ([30, 1], [], [30]),
        ([1, 30], [], [1]),
        ([], [[3, 4, 9, 1]], [3, 4, 9]),
        ([], [[30, 1]], [30]),
        ([4, 4, 4, 4], [], [4, 4, 4, 4]),
        ([4, 4, 4, 4], [[4, 4]], [4, 4, 4, 4]),  # three small ones, 75 %, and a bulk one
        ([4], [[4, 4, 4, 4]], [4, 4, 4, 4]),  # what the small lane leaves, bulk takes
        ([12], [[4]], [12, 4]),
        ([13], [[4]], [13, 4]),  # the first of a lane may pass its share, and the batch
        ([4, 9], [[4]], [4, 4]),
        ([2], [[30, 1]], [2, 30]),  # a long bulk input goes as soon as the budget holds it
        ([2], [[38, 1]], [2, 38]),
    ],
)
def test_take_batch(interactive: list[int], bulk: list[list[int]], batch: list[int]) -> None:
    assert taken(queue_of(interactive, *bulk)) == batch


def test_bulk_requests_take_turns_by_tokens_not_by_inputs() -> None:
    queue = queue_of([], [1] * 100, [4] * 100)
    sent = {1: 0, 4: 0}
    for _ in range(10):
        for tokens in taken(queue):
            sent[tokens] += tokens
    assert sum(sent.values()) == 160
    assert abs(sent[1] - sent[4]) <= 4


def test_a_late_bulk_request_does_not_wait_for_an_earlier_large_one() -> None:
    queue = queue_of([], [2] * 1000)
    taken(queue)
    queue.add([Input(3)], "bulk")
    assert 3 in taken(queue)


def test_a_bulk_input_as_long_as_the_budget_and_small_ones_alternate() -> None:
    queue = queue_of([4] * 40, [40] * 3)
    assert [taken(queue) for _ in range(5)] == [[40], [4] * 10, [40], [4] * 10, [40]]


def test_a_long_input_whose_turn_has_not_come_does_not_end_a_batch() -> None:
    queue = queue_of([], [15] * 10, [1] * 1000)
    sizes = [sum(taken(queue)) for _ in range(20)]
    assert sum(sizes) / len(sizes) > 14


def test_small_ones_keep_their_share_beside_inputs_longer_than_a_batch() -> None:
    limits = BatchLimits(batch_tokens=16, token_budget=200)
    queue = queue_of([2] * 1000, [40] * 20)
    small = [tokens for _ in range(10) for tokens in taken(queue, limits) if tokens == 2]
    assert sum(small) == 10 * 120


def test_neither_lane_starves_the_other() -> None:
    queue = queue_of([], *[[length] * 50 for length in (1, 7, 13, 39)])
    waited = 0
    bulk_sent = 0
    for _ in range(100):
        while len(queue.interactive) < 20:
            queue.add([Input(3)], "interactive")
        batch = taken(queue)
        assert sum(batch) <= LIMITS.token_budget
        waited = 0 if 3 in batch else waited + 1
        assert waited <= 1
        bulk_sent += any(tokens != 3 for tokens in batch)
    assert bulk_sent >= 50


def test_a_caller_with_a_thousand_small_ones_delays_another_s_by_one() -> None:
    queue = queue_of([4] * 1000)
    assert taken(queue) == [4] * 4
    queue.add([Input(3)], "interactive", caller=1)
    queue.add([Input(2)], "interactive", caller=2)
    assert taken(queue) == [4, 3, 2, 4]


def test_callers_take_turns_and_each_one_s_inputs_keep_their_order() -> None:
    queue: Queue[Input] = Queue()
    for caller, tokens in ((1, [1, 2, 3]), (2, [4, 5]), (1, [6])):
        queue.add([Input(each) for each in tokens], "interactive", caller)
    assert taken(queue, BatchLimits(100, 100)) == [1, 4, 2, 5, 3, 6]
    assert not queue


def test_a_turn_that_does_not_fit_is_first_in_the_next_batch() -> None:
    queue: Queue[Input] = Queue()
    queue.add([Input(8), Input(1)], "interactive", 1)
    queue.add([Input(9), Input(2)], "interactive", 2)
    assert [taken(queue), taken(queue)] == [[8], [9, 1, 2]]


def test_a_caller_whose_inputs_are_all_unwanted_has_no_turn() -> None:
    queue: Queue[Input] = Queue()
    queue.add([Input(9, wanted=False)], "interactive", 1)
    queue.add([Input(2), Input(3)], "interactive", 2)
    assert taken(queue) == [2, 3]
    queue.add([Input(5)], "interactive", 1)
    assert taken(queue) == [5]


def test_a_batch_costs_as_much_as_it_takes_whatever_waits() -> None:
    class Looked(Input):
        looks = 0

        def __getattribute__(self, name: str) -> Any:
            Looked.looks += name == "tokens"
            return super().__getattribute__(name)

    queue: Queue[Input] = Queue()
    for caller in range(1000):
        queue.add([Looked(4) for _ in range(20)], "interactive", caller)
    for _ in range(50):
        Looked.looks = 0
        assert len(take_batch(queue, LIMITS)) == 4
        assert Looked.looks < 20


def test_everything_that_waits_goes_once() -> None:
    queue = queue_of([5, 1, 30, 2], [9] * 7, [1, 40, 2], [3])
    queue.add([Input(7), Input(7)], "interactive", caller=1)
    sent: list[Any] = []
    while queue:
        batch = take_batch(queue, LIMITS)
        assert batch
        sent += batch
    assert sorted(item.tokens for item in sent) == sorted([5, 1, 30, 2, *[9] * 7, 1, 40, 2, 3, 7, 7])
    assert len({id(item) for item in sent}) == len(sent)


def test_those_nobody_waits_for_are_left_out() -> None:
    queue: Queue[Input] = Queue()
    queue.add([Input(9, wanted=False), Input(3), Input(9, wanted=False), Input(4)], "interactive")
    queue.add([Input(9, wanted=False)], "bulk")
    queue.add([Input(9, wanted=False), Input(5), Input(9, wanted=False)], "bulk")
    assert taken(queue) == [3, 4, 5]
    assert taken(queue) == []
    assert not queue
