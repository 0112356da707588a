from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.batching.contract import Computed
from service.embedding.rows import EmbedRow, Vector
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
from service.processes.wire import (
    AskSamples,
    Cancel,
    Failed,
    GiveSamples,
    Message,
    Splitter,
    State,
    Submit,
    Vectors,
    decode,
    encode,
    vectors_in_parts,
)
from tests.service.fakes import FakeTokenizer, fake_vector

RANDOM = np.random.default_rng(0)


def computed(*widths: int) -> list[Computed[Vector]]:
    return [
        Computed(RANDOM.standard_normal(width).astype(np.float32), number / 3, number / 7)
        for number, width in enumerate(widths)
    ]


def sent(*messages: Message) -> list[Message]:
    return [decode(frame) for frame in Splitter().feed(b"".join(map(encode, messages)))]


def assert_same(left: list[Computed[Vector]], right: list[Computed[Vector]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.queue_seconds, one.inference_seconds) == (other.queue_seconds, other.inference_seconds)
        assert one.vector.dtype == other.vector.dtype == np.float32
        assert (one.vector == other.vector).all()


def test_messages_arrive_as_they_were_sent() -> None:
    messages: list[Message] = [
        Submit(7, [b"key", b"", b"another key"], "bulk"),
        Submit(8, [b"\0" * 12], "interactive", probe=True),
        Submit(9, []),
        Submit(10, [b"key"], "bulk", timeout_seconds=0.25),
        Submit(11, [b"key"], caller=2**64 - 1),
        Cancel(2**32 - 1),
        State(16384, 10**12, True),
        State(0, 0, False),
        State(1, 2, False, (3, 2**63 - 1), 4, 1.5),
        AskSamples(1),
        GiveSamples(1, [("m", "m_bucket", {"class": "bulk", "le": "+Inf"}, 3.5), ("g", "g", {}, -0.0)]),
    ]
    assert sent(*messages) == messages


@pytest.mark.parametrize("step", [1, 3, 8, 1000])
def test_a_stream_is_cut_into_frames_however_it_arrives(step: int) -> None:
    messages: list[Message] = [Cancel(1), Submit(2, [b"x" * 50]), Cancel(3)]
    stream = b"".join(map(encode, messages))
    splitter = Splitter()
    frames = [frame for at in range(0, len(stream), step) for frame in splitter.feed(stream[at : at + step])]
    assert [decode(frame) for frame in frames] == messages


def test_vectors_of_one_width_arrive_bit_by_bit() -> None:
    given = computed(640, 640, 640)
    given[1].vector[:3] = (np.nan, np.inf, -0.0)
    (message,) = sent(Vectors.of(5, 11, given))
    assert isinstance(message, Vectors)
    assert (message.number, message.first) == (5, 11)
    assert [item.vector.tobytes() for item in message.computed] == [item.vector.tobytes() for item in given]
    assert all(item.vector.flags.aligned for item in message.computed)


@pytest.mark.parametrize("widths", [(3,), (3, 3, 5, 5, 5, 3), (4096,) * 40, (1,) * 100, (100_000, 100_000, 1)])
def test_an_answer_in_parts_is_whole_again(widths: tuple[int, ...]) -> None:
    given = computed(*widths)
    parts = list(vectors_in_parts(1, given))
    again: list[Any] = [None] * len(widths)
    for part in sent(*parts):
        assert isinstance(part, Vectors)
        assert len(part.computed) == 1 or sum(len(item.vector) for item in part.computed) <= 1 << 16
        again[part.first : part.first + len(part.computed)] = part.computed
    assert_same(again, given)


@pytest.mark.parametrize(
    "error",
    [
        EncodingError("the device failed on this input").at(3),
        NonFiniteEmbedding("no finite vector").at(0),
        OutOfMemory("too little memory"),
        Unavailable("the server stopped"),
        DeviceLost("the device hangs"),
        Overloaded(1_000_001, 2.5),
        DeadlineExceeded(),
        ServiceError("a bug"),
    ],
)
def test_errors_arrive_with_all_that_an_answer_needs(error: ServiceError) -> None:
    (message,) = sent(Failed.of(4, error))
    assert isinstance(message, Failed)
    assert type(message.error) is type(error)
    assert str(message.error) == str(error)
    assert vars(message.error) == vars(error)


def test_rows_with_several_vectors_arrive_beside_others() -> None:
    given = computed(5, 5)
    given[1:1] = [Computed(RANDOM.standard_normal((count, 5)).astype(np.float32)) for count in (3, 3, 1)]
    again = [item for part in sent(*vectors_in_parts(1, given)) for item in part.computed]  # type: ignore[union-attr]
    assert [item.vector.shape for item in again] == [(5,), (3, 5), (3, 5), (1, 5), (5,)]
    assert_same(again, given)


def test_a_row_s_key_is_all_that_its_vector_depends_on() -> None:
    for text in FakeTokenizer().encode_batch(["abcde", "Größe 東京 🙂"], ["", "Find:"]):
        for spans in ((), ((0, 2), (1, 4))):
            for normalize in (True, False):
                row = EmbedRow(replace(text, spans=spans), 5, normalize)
                again = EmbedRow.from_key(row.key)
                assert again.key == row.key
                assert (again.text.token_ids, again.text.spans) == (row.text.token_ids, spans)
                assert (fake_vector(again) == fake_vector(row)).all()
