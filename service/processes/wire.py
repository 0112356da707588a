"""The messages between front ends and engines, as bytes. Pure functions: no sockets, no event loop.

A frame is a length and a message in MessagePack. Rows travel as their keys, and vectors as their bytes in memory: both
ends are processes of one version on one machine, and trust each other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby

import msgspec
import numpy as np

from service.batching.contract import Computed
from service.batching.scheduling import LANES, Lane
from service.embedding.rows import Vector
from service.errors import (
    DeadlineExceeded,
    DeviceLost,
    EncodingError,
    NonFiniteEmbedding,
    OutOfMemory,
    Overloaded,
    ServiceError,
    Unavailable,
)
from service.metrics import Samples

# Numbers in one frame of vectors (256 KB): each end can do other work between two frames.
_NUMBERS_AT_ONCE = 1 << 16

_LENGTH = struct.Struct("<I")

# The errors by their name on the wire; each is made from its message alone.
_ERRORS: dict[str, type[ServiceError]] = {
    kind.__name__: kind
    for kind in (EncodingError, NonFiniteEmbedding, OutOfMemory, Unavailable, DeviceLost, DeadlineExceeded)
}


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The base of the messages. A question and its answers have the same `number`."""


class Submit(_Message, frozen=True):
    """Compute these rows. A probe is computed even if the queue is full."""

    number: int
    keys: list[bytes]
    lane: Lane = "interactive"
    probe: bool = False
    timeout_seconds: float | None = None
    caller: int = 0  # 64 bits


class Cancel(_Message, frozen=True):
    """Nobody waits any more for the submission with this number."""

    number: int


class Vectors(_Message, frozen=True):
    """Some vectors of a submission, from the row at `first` on: all of one `shape`, one after the other.

    `times` are each row's seconds in the queue and on the device.
    """

    number: int
    first: int
    shape: tuple[int, ...]
    times: list[tuple[float, float]]
    numbers: bytes

    @classmethod
    def of(cls, number: int, first: int, computed: Sequence[Computed[Vector]]) -> Vectors:
        times = [(item.queue_seconds, item.inference_seconds) for item in computed]
        numbers = b"".join([item.vector.astype(np.float32, copy=False).tobytes() for item in computed])
        return cls(number, first, computed[0].vector.shape, times, numbers)

    @property
    def computed(self) -> list[Computed[Vector]]:
        """The vectors; they share the message's memory and can't be written to."""
        vectors = np.frombuffer(self.numbers, np.float32).reshape(len(self.times), *self.shape)
        return [Computed(vector, *seconds) for vector, seconds in zip(vectors, self.times, strict=True)]


class Failed(_Message, frozen=True):
    """There are no vectors, or no more. It holds the error's kind, its message and the kind's other values."""

    number: int
    kind: str
    message: str
    index: int | None = None
    queued_tokens: int = 0
    retry_after_seconds: float = 0.0

    @classmethod
    def of(cls, number: int, error: ServiceError) -> Failed:
        index = error.index if isinstance(error, EncodingError) else None
        told = (error.queued_tokens, error.retry_after_seconds) if isinstance(error, Overloaded) else ()
        return cls(number, type(error).__name__, str(error), index, *told)

    @property
    def error(self) -> ServiceError:
        if self.kind == Overloaded.__name__:
            return Overloaded(self.queued_tokens, self.retry_after_seconds)
        error = _ERRORS.get(self.kind, ServiceError)(self.message)
        return error.at(self.index) if isinstance(error, EncodingError) and self.index is not None else error


class State(_Message, frozen=True):
    """The state of an engine; the first one says that it is ready. `others_tokens` are the work for other front ends.

    `queued` are the tokens that wait in each lane. They include the front end's first `submissions` submissions.
    """

    batch_tokens: int
    others_tokens: int
    last_batch_failed: bool
    queued: tuple[int, ...] = (0,) * len(LANES)
    submissions: int = 0
    retry_seconds: float = 1.0


class AskSamples(_Message, frozen=True):
    """Asks for the other process's metrics."""

    number: int


class GiveSamples(_Message, frozen=True):
    """A process's own metrics."""

    number: int
    samples: Samples


Message = Submit | Cancel | Vectors | Failed | State | AskSamples | GiveSamples

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    content = _encoder.encode(message)
    return _LENGTH.pack(len(content)) + content


def decode(content: bytes) -> Message:
    """The message of a frame without its length.

    Raises:
        msgspec.DecodeError: for bytes that are no message. It is a ValueError.
    """
    return _decoder.decode(content)


def vectors_in_parts(number: int, computed: Sequence[Computed[Vector]]) -> Iterator[Vectors]:
    """Divide a whole answer into messages that are small enough."""
    first = 0
    for _, run in groupby(computed, key=lambda item: item.vector.shape):
        items = list(run)
        at_once = max(_NUMBERS_AT_ONCE // items[0].vector.size, 1)
        for start in range(0, len(items), at_once):
            yield Vectors.of(number, first + start, items[start : start + at_once])
        first += len(items)


class Splitter:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that these bytes complete, without their lengths."""
        rest = self._rest
        rest += data
        frames = []
        start, size = 0, len(rest)
        while size - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(rest, start)[0]
            if end > size:
                break
            frames.append(bytes(rest[start + _LENGTH.size : end]))
            start = end
        del rest[:start]
        return frames
