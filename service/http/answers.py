"""Vectors → the bytes of an answer, for every dialect. Large answers are written in slices, so that no other waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import orjson
import pybase64
from fastapi import Response
from fastapi.responses import StreamingResponse

from service.embedding.choices import EmbedDtype
from service.embedding.in_flight import NUMBERS_IN_A_SLICE
from service.embedding.rows import Vector
from service.embedding.vector_dtypes import quantize_vectors
from service.metrics import Metrics

EncodingFormat = Literal["float", "base64"]

# Numbers in an answer that is written in one go. A slice of a larger one takes 3 ms of work as decimal fractions, and
# much less as base64.
_SMALL_NUMBERS = 1 << 14


def encode_vectors(
    vectors: Sequence[Vector], encoding_format: EncodingFormat, dtype: EmbedDtype = "float32"
) -> Iterator[list[bytes]]:
    """Each vector as a JSON value, in slices: a list of numbers, or a string of base64 of its little-endian bytes."""
    at_once = max(NUMBERS_IN_A_SLICE // len(vectors[0]), 1) if vectors else 1
    for start in range(0, len(vectors), at_once):
        part = [quantize_vectors(vector, dtype) for vector in vectors[start : start + at_once]]
        if encoding_format == "base64":
            yield [b'"%b"' % pybase64.b64encode(vector.data) for vector in part]
        else:
            yield [orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY) for vector in part]


def json_array(slices: Iterable[list[bytes]]) -> Iterator[bytes]:
    """A JSON array, written slice by slice."""
    before = b"["
    for part in slices:
        yield before + b",".join(part)
        before = b","
    yield b"]" if before == b"," else b"[]"


def json_answer(content: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A small answer; its content may hold numpy arrays."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), 200, headers, "application/json")


class AnswerWriter:
    """Writes answers. It writes large ones in slices, so that the event loop is never busy with one of them for long.

    Only one slice of any answer is written between two turns of the loop: a batch can complete many requests at once.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._turn = asyncio.Lock()

    def answer(self, slices: Iterator[bytes], vectors: Sequence[Vector], headers: dict[str, str]) -> Response:
        """An answer of JSON slices: a small one is written at once, a large one while it is sent."""
        if len(vectors) * vectors[0].size > _SMALL_NUMBERS:
            return StreamingResponse(self._stream(slices), 200, headers, "application/json")
        began = time.perf_counter()
        content = b"".join(slices)
        self._metrics.serialize_seconds.observe(time.perf_counter() - began)
        return Response(content, 200, headers, "application/json")

    async def _stream(self, slices: Iterator[bytes]) -> AsyncIterator[bytes]:
        seconds = 0.0
        while True:
            async with self._turn:
                began = time.perf_counter()
                part = next(slices, None)
                seconds += time.perf_counter() - began
                await asyncio.sleep(0)
            if part is None:
                break
            yield part
        self._metrics.serialize_seconds.observe(seconds)
