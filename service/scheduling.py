"""Which inputs make up the next batch: a pure policy over two lanes. No event loop, no clock, no torch.

Small requests go first, strictly in order, in a lane of their own. Bulk requests share what is left by deficit round
robin (Shreedhar & Varghese 1995): each in turn may send `quantum` tokens more, so one of 2048 inputs delays another by
its share and not by its length. While bulk waits, the small ones take three quarters of a batch at most, and the next
bulk input has its place, so that neither lane can starve the other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

Lane = Literal["interactive", "bulk"]
LANES: tuple[Lane, ...] = ("interactive", "bulk")

INTERACTIVE_SHARE = 0.75

# Turns of bulk requests in a batch: more is fairer within a batch, fewer keeps a request's inputs together.
_TURNS_IN_A_BATCH = 8

# Fewer inputs that nobody wants any more are not worth a look at the whole queue.
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

    Only the first input of a lane may take a batch past the former, so that one longer than a batch goes too.
    """

    batch_tokens: int
    token_budget: int

    @property
    def quantum(self) -> int:
        """Tokens that a bulk request may send more at each turn."""
        return max(self.batch_tokens // _TURNS_IN_A_BATCH, 1)


@dataclass(eq=False)
class Flow(Generic[Item]):
    """One bulk request's inputs, and the tokens it may still send at its turn."""

    items: deque[Item]
    credit: int = 0


@dataclass(eq=False)
class Queue(Generic[Item]):
    """What waits, by lane. Inputs that nobody wants any more stay for a while: see `drop`."""

    interactive: deque[Item] = field(default_factory=deque)
    bulk: deque[Flow[Item]] = field(default_factory=deque)
    interactive_passed_over: bool = False
    _unwanted: int = 0

    def add(self, items: list[Item], lane: Lane) -> None:
        """Queue one request's inputs."""
        if lane == "interactive":
            self.interactive.extend(items)
        elif items:
            self.bulk.append(Flow(deque(items)))

    def drop(self, unwanted: int) -> None:
        """So many inputs more are not wanted. They are forgotten once they could be half of what is held.

        Until then `take_batch` passes them over when it meets them.
        """
        self._unwanted += unwanted
        if self._unwanted <= _LEAST_FORGOTTEN:
            return
        if 2 * self._unwanted >= len(self.interactive) + sum(len(flow.items) for flow in self.bulk):
            self._unwanted = 0
            self.interactive = deque(item for item in self.interactive if item.wanted)
            for flow in self.bulk:
                flow.items = deque(item for item in flow.items if item.wanted)

    def heads(self, lane: Lane) -> list[Item]:
        """The inputs that are next in a lane: the oldest ones of it are among them."""
        if lane == "interactive":
            return [self.interactive[0]] if self.interactive else []
        return [flow.items[0] for flow in self.bulk if flow.items]

    def __bool__(self) -> bool:
        return bool(self.interactive or self.bulk)


def take_batch(queue: Queue[Item], limits: BatchLimits) -> list[Item]:
    """Take the next batch off the queue. Empty only if nothing that waits is wanted."""
    small = _take_interactive(queue, limits)
    return small + _take_bulk(queue, limits, sum(item.tokens for item in small))


def _take_interactive(queue: Queue[Item], limits: BatchLimits) -> list[Item]:
    """The oldest small ones, until their share is full or the next bulk input would lose its place.

    Where that input leaves no place for even one of them, they wait once, and come first the next time.
    """
    taken: list[Item] = []
    tokens = 0
    bulk = _next_bulk(queue)
    long = bulk.items[0].tokens if bulk else 0
    full = limits.batch_tokens
    if bulk:
        # Beside an input longer than a batch the share is of the batch that results.
        share = long * INTERACTIVE_SHARE / (1 - INTERACTIVE_SHARE) if long > full else full * INTERACTIVE_SHARE
        full = int(share)
    reserved = 0 if queue.interactive_passed_over else long
    while (item := _next_interactive(queue)) is not None:
        with_it = tokens + item.tokens
        if (taken and with_it > full) or ((taken or reserved) and with_it + reserved > limits.token_budget):
            break
        taken.append(queue.interactive.popleft())
        tokens = with_it
    queue.interactive_passed_over = bool(queue.interactive) and not taken
    return taken


def _take_bulk(queue: Queue[Item], limits: BatchLimits, tokens: int) -> list[Item]:
    """Bulk requests in turn, after so many tokens of the other lane."""
    taken: list[Item] = []
    while (flow := _next_bulk(queue)) is not None:
        length = flow.items[0].tokens
        if flow.credit < length:
            flow.credit += limits.quantum
            queue.bulk.rotate(-1)
            continue
        # After credit: an input whose turn has not come does not end the batch for those whose turn it is.
        if tokens and tokens + length > (limits.batch_tokens if taken else limits.token_budget):
            break
        taken.append(flow.items.popleft())
        flow.credit -= length
        tokens += length
    return taken


def _next_interactive(queue: Queue[Item]) -> Item | None:
    """The small lane's oldest that is wanted; those before it are forgotten."""
    while queue.interactive and not queue.interactive[0].wanted:
        queue.interactive.popleft()
    return queue.interactive[0] if queue.interactive else None


def _next_bulk(queue: Queue[Item]) -> Flow[Item] | None:
    """The bulk request whose turn it is, its first input wanted; what is before it is forgotten."""
    while queue.bulk:
        flow = queue.bulk[0]
        while flow.items and not flow.items[0].wanted:
            flow.items.popleft()
        if flow.items:
            return flow
        queue.bulk.popleft()
    return None
