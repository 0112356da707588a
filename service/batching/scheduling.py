"""Which inputs make up the next batch: a pure policy over two lanes. No event loop, no clock, no torch.

Small requests go first, in a lane of their own. Their callers take turns, one input each, and the inputs of one caller
keep their order: a caller with a thousand inputs delays another's by one. Bulk requests share the rest of a batch by
deficit round robin (Shreedhar & Varghese 1995): each in turn may send `quantum` tokens more, so a request of 2048
inputs delays another by its share and not by its length. While bulk waits, the small requests take at most three
quarters of a batch, and the next bulk input keeps its place, so that neither lane can starve the other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

Lane = Literal["interactive", "bulk"]
LANES: tuple[Lane, ...] = ("interactive", "bulk")

INTERACTIVE_SHARE = 0.75

# Turns of bulk requests in a batch. More turns are fairer within a batch; fewer keep a request's inputs together.
_TURNS_IN_A_BATCH = 8

# The queue is cleaned only when it holds more unwanted inputs than this: cleaning reads all of it.
_LEAST_FORGOTTEN = 256


class Schedulable(Protocol):
    """An input that waits."""

    @property
    def tokens(self) -> int:
        """Its length."""

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""


Item = TypeVar("Item", bound=Schedulable)


@dataclass(frozen=True)
class BatchLimits:
    """Tokens at which a batch is full enough to go, and tokens that it must never exceed.

    Only the first input of a lane may take a batch past `batch_tokens`, so that an input longer than a batch goes too.
    """

    batch_tokens: int
    token_budget: int

    @property
    def quantum(self) -> int:
        """Tokens that a bulk request may send more at each turn."""
        return max(self.batch_tokens // _TURNS_IN_A_BATCH, 1)


@dataclass(eq=False)
class Flow(Generic[Item]):
    """Inputs that keep their order: one caller's small inputs, or a bulk request's with the tokens it may yet send."""

    items: deque[Item]
    caller: int | None = None
    credit: int = 0


class Turns(Generic[Item]):
    """Flows that take turns; a new flow goes last."""

    def __init__(self) -> None:
        self._flows: deque[Flow[Item]] = deque()
        self._by_caller: dict[int, Flow[Item]] = {}

    def add(self, items: list[Item], caller: int | None = None) -> None:
        """Add inputs after all others of their caller; without a caller, in a flow of their own."""
        if caller is not None and (flow := self._by_caller.get(caller)) is not None:
            flow.items.extend(items)
        elif items:
            self._flows.append(flow := Flow(deque(items), caller))
            if caller is not None:
                self._by_caller[caller] = flow

    def first(self) -> Flow[Item] | None:
        """The flow whose turn it is, once the unwanted inputs before its first wanted one are forgotten."""
        while self._flows:
            flow = self._flows[0]
            while flow.items and not flow.items[0].wanted:
                flow.items.popleft()
            if flow.items:
                return flow
            self._flows.popleft()
            if flow.caller is not None:
                del self._by_caller[flow.caller]
        return None

    def pass_on(self) -> None:
        self._flows.rotate(-1)

    def heads(self) -> list[Item]:
        return [flow.items[0] for flow in self._flows if flow.items]

    def forget_unwanted(self) -> None:
        for flow in self._flows:
            flow.items = deque(item for item in flow.items if item.wanted)

    def __len__(self) -> int:
        return sum(len(flow.items) for flow in self._flows)

    def __bool__(self) -> bool:
        return any(flow.items for flow in self._flows)


@dataclass(eq=False)
class Queue(Generic[Item]):
    """The inputs that wait, by lane. Inputs that nobody wants any more stay for a while: see `drop`."""

    interactive: Turns[Item] = field(default_factory=Turns)
    bulk: Turns[Item] = field(default_factory=Turns)
    interactive_passed_over: bool = False
    _unwanted: int = 0

    def add(self, items: list[Item], lane: Lane, caller: int = 0) -> None:
        if lane == "interactive":
            self.interactive.add(items, caller)
        else:
            self.bulk.add(items)

    def drop(self, unwanted: int) -> None:
        """Note that this many more inputs are unwanted. They are forgotten once they could be half of the queue.

        Until then `take_batch` passes them over when it meets them.
        """
        self._unwanted += unwanted
        if self._unwanted > _LEAST_FORGOTTEN and 2 * self._unwanted >= len(self.interactive) + len(self.bulk):
            self._unwanted = 0
            self.interactive.forget_unwanted()
            self.bulk.forget_unwanted()

    def heads(self, lane: Lane) -> list[Item]:
        """The first input of each flow in a lane; the lane's oldest input is among them."""
        return (self.interactive if lane == "interactive" else self.bulk).heads()

    def __bool__(self) -> bool:
        return bool(self.interactive or self.bulk)


def take_batch(queue: Queue[Item], limits: BatchLimits) -> list[Item]:
    """Take the next batch off the queue. The batch is empty only if no waiting input is wanted."""
    small = _take_interactive(queue, limits)
    return small + _take_bulk(queue, limits, sum(item.tokens for item in small))


def _take_interactive(queue: Queue[Item], limits: BatchLimits) -> list[Item]:
    """Take small inputs in turn, until their share is full or the next bulk input would lose its place.

    If that bulk input leaves no place for even one small input, the small ones wait for one batch and go first in the
    next.
    """
    taken: list[Item] = []
    tokens = 0
    bulk = queue.bulk.first()
    long = bulk.items[0].tokens if bulk else 0
    full = limits.batch_tokens
    if bulk:
        # Beside an input longer than a batch, the share is that of the larger batch that results.
        share = long * INTERACTIVE_SHARE / (1 - INTERACTIVE_SHARE) if long > full else full * INTERACTIVE_SHARE
        full = int(share)
    reserved = 0 if queue.interactive_passed_over else long
    while (flow := queue.interactive.first()) is not None:
        with_it = tokens + flow.items[0].tokens
        if (taken and with_it > full) or ((taken or reserved) and with_it + reserved > limits.token_budget):
            break
        taken.append(flow.items.popleft())
        queue.interactive.pass_on()
        tokens = with_it
    queue.interactive_passed_over = bool(queue.interactive) and not taken
    return taken


def _take_bulk(queue: Queue[Item], limits: BatchLimits, tokens: int) -> list[Item]:
    """Take bulk inputs in turn, after this many tokens of the other lane."""
    taken: list[Item] = []
    while (flow := queue.bulk.first()) is not None:
        length = flow.items[0].tokens
        if flow.credit < length:
            flow.credit += limits.quantum
            queue.bulk.pass_on()
            continue
        # This comes after the credit: an input whose turn has not come does not end the batch for the other requests.
        if tokens and tokens + length > (limits.batch_tokens if taken else limits.token_budget):
            break
        taken.append(flow.items.popleft())
        flow.credit -= length
        tokens += length
    return taken
