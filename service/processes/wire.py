"""What front ends and engines say to each other, as bytes. Pure functions: no sockets, no event loop.

A frame is its length, a number that an answer shares with its question, what kind of message it is, and the message.
Rows travel as their keys, vectors as they lie in memory: both ends are processes of one version on one machine, and
trust each other. Nothing is pickled.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import orjson

from service.batching.batcher import Computed
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

# Numbers in one frame of vectors, 256 KB: either end does other things between two of them.
_NUMBERS_AT_ONCE = 1 << 16

# Every part is a multiple of 8 bytes, so that the arrays after it are aligned.
_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<IB3x")  # number, kind
_SUBMIT = struct.Struct("<B?2xIdQ")  # lane, whether it is a probe, rows, seconds that it may wait (or infinity), caller
_VECTORS = struct.Struct("<IIII")  # place of the first, rows, width, vectors of each where a row has several
_STATE = struct.Struct("<QQ?7xQQQd")

# By name on the wire; each is made of its message alone.
_ERRORS: dict[str, type[ServiceError]] = {
    kind.__name__: kind
    for kind in (EncodingError, NonFiniteEmbedding, OutOfMemory, Unavailable, DeviceLost, DeadlineExceeded)
}


@dataclass(frozen=True)
class Submit:
    """Compute these rows. A probe is computed whatever waits."""

    number: int
    keys: Sequence[bytes]
    lane: Lane = "interactive"
    probe: bool = False
    timeout_seconds: float | None = None
    caller: int = 0  # 64 bits


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for what was submitted under this number."""

    number: int


@dataclass(frozen=True)
class Vectors:
    """Some of the vectors of what was submitted, of one shape, from the row at `first` on."""

    number: int
    first: int
    computed: Sequence[Computed[Vector]]


@dataclass(frozen=True)
class Failed:
    """There are no vectors, or no more."""

    number: int
    error: ServiceError


@dataclass(frozen=True)
class State:
    """What an engine is at; its first one says that it is ready. `others_tokens` wait for other front ends.

    `queued` are the tokens that wait in each lane, with those of so many `submissions` of the front end.
    """

    batch_tokens: int
    others_tokens: int
    last_batch_failed: bool
    queued: tuple[int, ...] = (0,) * len(LANES)
    submissions: int = 0
    retry_seconds: float = 1.0


@dataclass(frozen=True)
class AskSamples:
    """What are your metrics?"""

    number: int


@dataclass(frozen=True)
class GiveSamples:
    """A process's own metrics."""

    number: int
    samples: Samples


Message = Submit | Cancel | Vectors | Failed | State | AskSamples | GiveSamples
_KINDS = (Submit, Cancel, Vectors, Failed, State, AskSamples, GiveSamples)


def encode(message: Message) -> bytes:
    """A message as a frame."""
    number = 0 if isinstance(message, State) else message.number
    content = _HEAD.pack(number, _KINDS.index(type(message))) + _content(message)
    return _LENGTH.pack(len(content)) + content


def decode(content: bytes) -> Message:
    """The message of a frame, its length taken off. Vectors share the frame's memory and can't be written to."""
    number, code = _HEAD.unpack_from(content)
    kind, start = _KINDS[code], _HEAD.size
    if kind is Submit:
        return _read_submit(number, content, start)
    if kind is Vectors:
        return _read_vectors(number, content, start)
    if kind is Failed:
        return Failed(number, _read_error(content[start:]))
    if kind is State:
        batch_tokens, others_tokens, failed, *queued, submissions, retry_seconds = _STATE.unpack_from(content, start)
        return State(batch_tokens, others_tokens, failed, tuple(queued), submissions, retry_seconds)
    if kind is GiveSamples:
        return GiveSamples(
            number,
            [(family, name, dict(labels), value) for family, name, labels, value in orjson.loads(content[start:])],
        )
    return Cancel(number) if kind is Cancel else AskSamples(number)


def vectors_in_parts(number: int, computed: Sequence[Computed[Vector]]) -> Iterator[Vectors]:
    """A whole answer, in messages that are each small enough."""
    first = 0
    for _, run in groupby(computed, key=lambda item: item.vector.shape):
        items = list(run)
        at_once = max(_NUMBERS_AT_ONCE // items[0].vector.size, 1)
        for start in range(0, len(items), at_once):
            yield Vectors(number, first + start, items[start : start + at_once])
        first += len(items)


class Splitter:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are whole with this, their lengths taken off."""
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


def _content(message: Message) -> bytes:
    match message:
        case Submit():
            seconds = math.inf if message.timeout_seconds is None else message.timeout_seconds
            head = _SUBMIT.pack(LANES.index(message.lane), message.probe, len(message.keys), seconds, message.caller)
            return b"".join((head, array("I", map(len, message.keys)).tobytes(), *message.keys))
        case Vectors():
            return _write_vectors(message)
        case Failed():
            return _write_error(message.error)
        case State():
            told = (message.batch_tokens, message.others_tokens, message.last_batch_failed)
            return _STATE.pack(*told, *message.queued, message.submissions, message.retry_seconds)
        case GiveSamples():
            return orjson.dumps(message.samples)
    return b""


def _read_submit(number: int, content: bytes, start: int) -> Submit:
    lane, probe, rows, seconds, caller = _SUBMIT.unpack_from(content, start)
    start += _SUBMIT.size
    lengths = array("I")
    lengths.frombytes(content[start : start + rows * lengths.itemsize])
    start += rows * lengths.itemsize
    keys = []
    for length in lengths:
        keys.append(content[start : start + length])
        start += length
    return Submit(number, keys, LANES[lane], probe, None if math.isinf(seconds) else seconds, caller)


def _write_vectors(message: Vectors) -> bytes:
    computed = message.computed
    shape = computed[0].vector.shape
    head = _VECTORS.pack(message.first, len(computed), shape[-1], shape[0] if len(shape) > 1 else 0)
    times = np.array([(item.queue_seconds, item.inference_seconds) for item in computed])
    return b"".join(
        (head, times.tobytes(), *(item.vector.astype(np.float32, copy=False).tobytes() for item in computed))
    )


def _read_vectors(number: int, content: bytes, start: int) -> Vectors:
    first, rows, width, each = _VECTORS.unpack_from(content, start)
    start += _VECTORS.size
    times = np.frombuffer(content, np.float64, 2 * rows, start)
    numbers = np.frombuffer(content, np.float32, rows * max(each, 1) * width, start + times.nbytes)
    vectors = numbers.reshape((rows, each, width) if each else (rows, width))
    pairs = times.reshape(rows, 2).tolist()
    return Vectors(number, first, [Computed(vector, *pair) for vector, pair in zip(vectors, pairs, strict=True)])


def _write_error(error: ServiceError) -> bytes:
    said: dict[str, object] = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, Overloaded):
        said |= {"queued_tokens": error.queued_tokens, "retry_after_seconds": error.retry_after_seconds}
    if isinstance(error, EncodingError):
        said |= {"index": error.index}
    return orjson.dumps(said)


def _read_error(content: bytes) -> ServiceError:
    said = orjson.loads(content)
    if said["kind"] == Overloaded.__name__:
        return Overloaded(said["queued_tokens"], said["retry_after_seconds"])
    error = _ERRORS.get(said["kind"], ServiceError)(said["message"])
    if isinstance(error, EncodingError) and said["index"] is not None:
        return error.at(said["index"])
    return error
