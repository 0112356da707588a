"""Clients of an embedding server, light enough to share a small machine with it.

In a closed loop each connection sends its next request when it has the answer to its last. In an open loop requests
arrive at random (Poisson) and wait for no answer.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import uvloop

UNSENT, LOST = 0, -1

_BUFFER_BYTES = 1 << 18
_PATIENCE_SECONDS = 60.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Answer:
    """The outcome of a request: the status, or UNSENT if no connection was free, or LOST if no answer came.

    `asked` is a time of `time.perf_counter`.
    """

    status: int
    asked: float
    seconds: float = 0.0
    body: bytes = b""

    @property
    def vectors(self) -> np.ndarray[Any, Any]:
        """(n, D), given in numbers or in base64."""
        given = [item["embedding"] for item in orjson.loads(self.body)["data"]]
        return np.stack(
            [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else np.array(one) for one in given]
        )


@dataclass(frozen=True)
class Answers:
    """The answers of a closed loop in the order of the requests, and the seconds that all took together."""

    answers: list[Answer]
    seconds: float

    @property
    def per_second(self) -> float:
        """Requests answered a second."""
        return len(self.answers) / self.seconds

    @property
    def latencies(self) -> list[float]:
        """Seconds of each request."""
        return [answer.seconds for answer in self.answers]


def percentiles(seconds: Sequence[float], which: Sequence[int] = (50, 99), digits: int = 1) -> dict[str, float]:
    """Percentiles in milliseconds, by names such as p50_ms; they are 0 where nothing was measured."""
    return {f"p{p}_ms": round(float(np.percentile(seconds or [0.0], p)) * 1000, digits) for p in which}


def request_bytes(inputs: str | Sequence[str], model: str, encoding: str = "base64") -> bytes:
    """A whole request to `/v1/embeddings`."""
    body = orjson.dumps({"input": inputs, "model": model, "encoding_format": encoding})
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\nUser-Agent: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def requests_of(texts: Sequence[str], inputs: int, model: str, encoding: str = "base64") -> list[bytes]:
    """Whole requests of `inputs` texts each, or of fewer in the last; no text is in two of them."""
    starts = range(0, len(texts), inputs)
    return [
        request_bytes(texts[start] if inputs == 1 else texts[start : start + inputs], model, encoding)
        for start in starts
    ]


async def connect(url: str) -> Connection:
    """A new connection, for one request at a time."""
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port, limit=_BUFFER_BYTES)


async def exchange(connection: Connection, request: bytes) -> Answer:
    """Send a request and await its answer.

    Raises:
        EOFError: if the server hangs up.
    """
    reader, writer = connection
    asked = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    pieces = []
    if length := re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE):
        pieces.append(await reader.readexactly(int(length[1])))
    else:  # in chunks, of which the last is empty
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
    return Answer(int(head.split(maxsplit=2)[1]), asked, time.perf_counter() - asked, b"".join(pieces))


async def closed_loop(
    url: str, requests: Iterable[bytes], connections: int, seconds: float = inf, keeps: bool = False
) -> Answers:
    """Send each request once, or all of them over and over for `seconds`. Only if it `keeps` them, bodies stay.

    Raises:
        ExceptionGroup: for an answer that is not 200, or none.
        TimeoutError: for an answer that does not come in time.
    """
    numbered = enumerate(requests if seconds == inf else itertools.cycle(requests))
    found: dict[int, Answer] = {}
    began = time.perf_counter()

    async def work() -> None:
        connection = await connect(url)
        for number, request in numbered:
            answer = await exchange(connection, request)
            if answer.status != 200:
                raise RuntimeError(f"answered {answer.status}: {answer.body[:1000]!r}")
            found[number] = answer if keeps else replace(answer, body=b"")
            if time.perf_counter() >= began + seconds:
                break
        connection[1].close()

    async with asyncio.timeout(None if seconds == inf else seconds + _PATIENCE_SECONDS), asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(work())
    return Answers([found[number] for number in sorted(found)], time.perf_counter() - began)


def ask(url: str, requests: Iterable[bytes], connections: int, seconds: float = inf, keeps: bool = False) -> Answers:
    """`closed_loop` on an event loop of its own, in this process or in a pool's."""
    return uvloop.run(closed_loop(url, requests, connections, seconds, keeps))


async def open_loop(
    url: str, requests: Iterator[bytes], rate: float, seconds: float, connections: int, seed: int = 0
) -> list[Answer]:
    """Send `rate` requests a second at random, each on a free connection. The answers are in no order."""
    free = [await connect(url) for _ in range(connections)]
    chance = random.Random(seed)
    found: list[Answer] = []

    async def one(connection: Connection, request: bytes, due: float) -> None:
        try:
            async with asyncio.timeout(seconds + _PATIENCE_SECONDS):
                found.append(replace(await exchange(connection, request), body=b""))
            free.append(connection)
        except (OSError, EOFError):
            found.append(Answer(LOST, due))

    due = time.perf_counter()
    end = due + seconds
    async with asyncio.TaskGroup() as tasks:
        while (due := due + chance.expovariate(rate)) < end:
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            if free:
                tasks.create_task(one(free.pop(), next(requests), due))
            else:
                found.append(Answer(UNSENT, due))
    for _, writer in free:
        writer.close()
    return found
