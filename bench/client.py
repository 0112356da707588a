"""Clients of an embedding server, light enough to share a small machine with it.

In a closed loop each connection sends its next request when it has the answer to its last. In an open loop requests
arrive at random (Poisson) and wait for no answer.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np
import orjson
import uvloop

UNSENT, LOST = 0, -1

_READ_BYTES = 1 << 18
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """The outcome of a request: the status, or UNSENT if no connection was free, or LOST if no answer came.

    `asked` is a time of `time.perf_counter`. `body` is empty unless it was asked for or the status is not 200.
    """

    status: int
    asked: float
    seconds: float = 0.0
    body: bytes = b""


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

    @property
    def vectors(self) -> list[np.ndarray[Any, Any]]:
        """(n, D) of each request, where the bodies were kept."""
        return [_vectors_in(answer.body) for answer in self.answers]


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


def _vectors_in(body: bytes) -> np.ndarray[Any, Any]:
    """(n, D) from an answer in numbers or in base64."""
    given = [item["embedding"] for item in orjson.loads(body)["data"]]
    return np.stack(
        [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else np.array(one) for one in given]
    )


class Connection:
    """One connection, for one request at a time. `keeps` keeps the bodies of good answers, which costs a copy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keeps: bool) -> None:
        self._reader, self._writer, self._keeps = reader, writer, keeps
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._complete = False

    @classmethod
    async def open(cls, url: str, keeps: bool = False) -> Connection:
        """A new connection to the server at this address."""
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port, limit=_READ_BYTES), keeps)

    async def ask(self, request: bytes) -> Answer:
        """Send a request and await its answer.

        Raises:
            ConnectionError: if the server hangs up.
        """
        self._complete = False
        asked = time.perf_counter()
        self._writer.write(request)
        while not self._complete:
            piece = await self._reader.read(_READ_BYTES)
            if not piece:
                raise ConnectionError("the server hung up")
            self._parser.feed_data(piece)
        seconds = time.perf_counter() - asked
        body = b"".join(self._pieces)
        self._pieces.clear()
        return Answer(self._parser.get_status_code(), asked, seconds, body)

    def close(self) -> None:
        """Hang up."""
        self._writer.close()

    def on_body(self, piece: bytes) -> None:
        """Called by the parser."""
        if self._keeps or self._parser.get_status_code() != 200:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._complete = True


async def closed_loop(
    url: str, requests: Iterable[bytes], connections: int, seconds: float = inf, keeps: bool = False
) -> Answers:
    """Send each request once, or all of them over and over for `seconds`.

    Raises:
        ExceptionGroup: for an answer that is not 200, or none.
        TimeoutError: for an answer that does not come in time.
    """
    numbered = enumerate(requests if seconds == inf else itertools.cycle(requests))
    found: dict[int, Answer] = {}
    began = time.perf_counter()

    async def work() -> None:
        connection = await Connection.open(url, keeps)
        for number, request in numbered:
            found[number] = answer = await connection.ask(request)
            if answer.status != 200:
                raise RuntimeError(f"answered {answer.status}: {answer.body[:1000]!r}")
            if time.perf_counter() >= began + seconds:
                break
        connection.close()

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
    free = [await Connection.open(url) for _ in range(connections)]
    chance = random.Random(seed)
    found: list[Answer] = []
    under_way: dict[asyncio.Task[None], float] = {}

    async def one(connection: Connection, request: bytes) -> None:
        found.append(await connection.ask(request))
        free.append(connection)

    due = time.perf_counter()
    end = due + seconds
    while (due := due + chance.expovariate(rate)) < end:
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        if free:
            task = asyncio.create_task(one(free.pop(), next(requests)))
            under_way[task] = due
        else:
            found.append(Answer(UNSENT, due))
    if under_way:
        await asyncio.wait(under_way, timeout=_PATIENCE_SECONDS)
    found += [Answer(LOST, asked) for task, asked in under_way.items() if not task.done() or task.exception()]
    for connection in free:
        connection.close()
    return found
