"""The types that the batcher shares with others: the row, the device's plan, the result and the batcher's interface."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from service.batching.cost_model import CostModel
from service.batching.scheduling import BatchLimits, Lane
from service.errors import EncodingError, Overloaded


class Batchable(Protocol):
    """A row to compute."""

    @property
    def key(self) -> bytes:
        """Rows with the same key get the same vector."""

    def __len__(self) -> int:
        """The number of its tokens."""


Row = TypeVar("Row", bound=Batchable)
RowIn = TypeVar("RowIn", contravariant=True)
Vector = TypeVar("Vector")

# Computes a batch. The result holds for each row, in order, its vector or the error of that row alone.
RunBatch = Callable[[list[Row]], Awaitable[Sequence[Vector | EncodingError]]]


@dataclass(frozen=True)
class DevicePlan:
    """The measurements of the device that warm-up made.

    The next batch must be composed `lead_seconds` before the device is free, so that the device never waits for it. The
    value is 0 where batches can't be queued behind each other.
    """

    cost: CostModel
    limits: BatchLimits
    lead_seconds: float = 0.0


@dataclass(frozen=True)
class Computed(Generic[Vector]):
    """One input's vector, how long it waited for its batch and how long the batch took; both are 0 if it was cached."""

    vector: Vector
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0


class Recent(Protocol[Vector]):
    """A memory of vectors, such as `service.batching.vector_cache.VectorCache`."""

    def get(self, key: bytes) -> Vector | None:
        """The vector of this key, or None."""

    def put(self, key: bytes, vector: Vector) -> None:
        """Remember a vector."""


class Batcher(Protocol[RowIn, Vector]):
    """Computes rows, from many requests at once."""

    @property
    def batch_tokens(self) -> int:
        """Tokens at which a batch is full; 0 before the start."""

    @property
    def last_batch_failed(self) -> bool:
        """Whether a device's last batch failed."""

    on_room: Callable[[], None]
    """Called whenever a lane may have more room than before, and when there will never be room again."""

    def admit(self, tokens: int, lane: Lane, ahead: int = 0) -> None:
        """Check that a lane has room for this many tokens, behind those that wait and `ahead` that will come first.

        Raises:
            Overloaded: if the lane has no room.
            Unavailable: if nothing computes any more.
        """

    def overloaded(self, lane: Lane) -> Overloaded:
        """The refusal of a request that a lane has no room for."""

    async def submit(
        self, rows: Sequence[RowIn], lane: Lane = "interactive", timeout_seconds: float | None = None, caller: int = 0
    ) -> list[Computed[Vector]]:
        """The rows' vectors, in order. Cancelling this drops the rows still queued. Interactive callers take turns.

        Raises:
            Overloaded: if a lane that is not empty has no room for the rows.
            DeadlineExceeded: if some rows were still queued when the time was over.
            EncodingError: the first of the rows' own errors, with its index; rows still queued are dropped.
            Unavailable: if nothing computes any more.
        """

    async def probe(self, row: RowIn) -> None:
        """Compute a row on each device whose last batch failed, even if the queue there is full.

        Raises:
            EncodingError, Unavailable: if that fails too.
        """
