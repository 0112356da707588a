"""Vectors → the bytes of an answer, whatever its dialect: never so much at once that other requests would notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Literal

import orjson
import pybase64
from fastapi import Response
from fastapi.responses import StreamingResponse

from service.metrics import Metrics
from service.rows import Vector

EncodingFormat = Literal["float", "base64"]

# Numbers written between two looks at the event loop: 5 ms of work as decimal fractions, much less as base64.
_NUMBERS_AT_ONCE = 1 << 17


def encode_vectors(vectors: Sequence[Vector], encoding_format: EncodingFormat) -> Iterator[list[bytes]]:
    """Each vector as a JSON value, in slices: a list of numbers, or a string of base64 of little-endian float32."""
    at_once = max(_NUMBERS_AT_ONCE // len(vectors[0]), 1)
    for start in range(0, len(vectors), at_once):
        part = vectors[start : start + at_once]
        if encoding_format == "base64":
            yield [b'"%b"' % pybase64.b64encode(vector.astype("<f4", copy=False).data) for vector in part]
        else:
            yield [orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY) for vector in part]


def answer(slices: Iterator[bytes], vectors: Sequence[Vector], headers: dict[str, str], metrics: Metrics) -> Response:
    """An answer made of slices of JSON: at once if it is small, else as they are made, with others in between."""
    if len(vectors) * len(vectors[0]) > _NUMBERS_AT_ONCE:
        return StreamingResponse(_stream(slices, metrics), 200, headers, "application/json")
    began = time.perf_counter()
    content = b"".join(slices)
    metrics.serialize_seconds.observe(time.perf_counter() - began)
    return Response(content, 200, headers, "application/json")


async def _stream(slices: Iterator[bytes], metrics: Metrics) -> AsyncIterator[bytes]:
    seconds = 0.0
    while True:
        began = time.perf_counter()
        part = next(slices, None)
        seconds += time.perf_counter() - began
        if part is None:
            break
        yield part
        await asyncio.sleep(0)
    metrics.serialize_seconds.observe(seconds)
