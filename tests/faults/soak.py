"""A real server at twice its capacity, its device failing now and then: who gets the right answer?

The device fails on a share of the batches and on texts that say so (`tests/faults/faulty_server.py`). The clients ask
for single vectors and for many, in the words of OpenAI and of text-embeddings-inference. They hang up, send and read
slowly, stop in the midst of a request, send nonsense, and send bodies as large and as bad as the limits allow. Refused
clients come again, twice. No two texts are alike, and each answer is held to vectors that were computed before, each
text alone and in float32, so that another text's vector is noticed.

Capacity is what clients get answered who wait for their answers. Queries then arrive alone for a fifth of the time, and
everything together in the rest of it, at random (Poisson), at twice the capacity. Linux.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httptools
import numpy as np
import orjson

from service.batching.scheduling import LANES
from tests.e2e.process import ServerProcess
from tests.faults.crowd import SIZES, TOLERANCE, Asked, make_requests

# Shares of the requests.
MIX = {
    "query": 0.40,
    "TEI query": 0.10,
    "bulk": 0.24,
    "TEI bulk": 0.02,
    "with faults": 0.06,
    "hangs up": 0.08,
    "slow": 0.06,
    "stalls": 0.01,
    "bad": 0.02,
    "at the limits": 0.01,
}
_ALONE = {kind: MIX[kind] for kind in ("query", "TEI query")}
_WITH_ANSWERS = {kind: MIX[kind] for kind in ("query", "TEI query", "bulk", "TEI bulk", "with faults")}

OVERLOAD = 2.0
MOST_GROWTH = 0.05
MOST_TURN_MS = 50.0
# Files and threads that a server may have more of at the end: a connection that is just being closed, say.
SLACK = 4

_FAULTS_SHARE = 0.02
_FAULTS_SEED = 1
_BULK_SIZES = (16, 24, 32, 48, 64)
_READ_SECONDS = 10
_ALONE_SHARE = 0.2  # of the time
_CAPACITY_SHARE = 0.06  # before it, but at least
_CAPACITY_SECONDS = 3.0
_WAITING_CLIENTS = 32
_RETRIES = 2
_PATIENCE_SECONDS = 600.0
_SAMPLES = 48  # of memory
_SETTLE_SECONDS = 3.0
_HANG_UP_SECONDS = 0.1  # in the mean
_REQUEST = '"message":"request"'
_COUNTED = ("batch_failures", "nonfinite", "oom_splits")


@dataclass(frozen=True)
class Model:
    """What is served: how fast its device is at most, what may wait for it, and how many texts the clients know."""

    folder: Path
    tokens_per_second: float
    queued_tokens: int
    queries: int
    bulk_requests: int


@dataclass(frozen=True)
class Request:
    """Its bytes, and what an answer to it is worth: see `Asked.verdict`."""

    content: bytes
    verdict: Callable[[int, bytes], str]


Traffic = Mapping[str, Sequence[Request]]


def failures(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that must not be."""
    before, after = found["before"], found["after"]
    checks = {
        f"{found['lost']} requests got no answer": found["lost"],
        f"{sum(found['wrong'].values())} answers are wrong": found["wrong"],
        f"the event loop was at one turn for {found['turns']['longest_ms']} ms": found["turns"]["longest_ms"]
        > MOST_TURN_MS,
        f"memory grew by {found['memory']['growth']:.1%}": found["memory"]["growth"] > MOST_GROWTH,
        f"{after['files']} files are open, {before['files']} were": after["files"] > before["files"] + SLACK,
        f"{after['threads']} threads run, {before['threads']} did": after["threads"] > before["threads"] + SLACK,
        f"{after['queued_tokens']:.0f} tokens are queued for nobody": after["queued_tokens"],
        f"{after['inflight']:.0f} requests are left in work": after["inflight"],
        f"{found['unexpected_errors']} unexpected errors": found["unexpected_errors"],
        f"the server ended with status {found['exit_status']}": found["exit_status"],
    }
    return [sentence for sentence, failed in checks.items() if failed]


# The server.


def start(model: Model, frontends: int, settings: dict[str, str] | None = None) -> ServerProcess:
    """The server, with the settings that users have, but for room and patience and what is given."""
    environment = {
        "FAULTS_SHARE": str(_FAULTS_SHARE),
        "FAULTS_SEED": str(_FAULTS_SEED),
        "FAULTS_WATCH_LOOP": "1",
        "FAULTS_TOKENS_PER_SECOND": str(model.tokens_per_second),
        "LLM2VEC_BATCH_TOKENS": "1024",  # the calibration can't know how fast the device is made to be
        "LLM2VEC_COMPILE": "auto",
        "LLM2VEC_DEVICE": "cpu",
        "LLM2VEC_FRONTENDS": str(frontends),
        "LLM2VEC_MAX_QUEUED_TOKENS": str(model.queued_tokens),
        "LLM2VEC_REQUEST_READ_SECONDS": str(_READ_SECONDS),
    }
    options = ("--dtype", "float32")
    return ServerProcess(
        model.folder,
        {**environment, **(settings or {})},
        *options,
        module="tests.faults.faulty_server",
        keeps=lambda line: _REQUEST not in line,
    )


def processes(server: ServerProcess) -> list[int]:
    """The server's process and its children."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [server.process.pid, *map(int, children.split())]


def resident_bytes(server: ServerProcess) -> int:
    """What the processes have in memory; pages that they share count for each."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in processes(server))
    return pages * os.sysconf("SC_PAGE_SIZE")


def holdings(server: ServerProcess) -> dict[str, float]:
    """What the server holds; nothing is asked of it now."""

    def entries(kind: str) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/{kind}")) for pid in processes(server))

    queued = (server.metric(f'llm2vec_queue_tokens{{class="{lane}"}}') for lane in LANES)
    return {
        "files": entries("fd"),
        "threads": entries("task"),
        "queued_tokens": sum(queued),
        "inflight": server.metric("llm2vec_inflight_requests") - 1,  # which asks this
    }


def turns(server: ServerProcess) -> dict[str, float]:
    """The longest turn of the event loop, and the median of each second's; with several processes the engine's."""
    longest = [record["longest_turn_ms"] for record in server.records() if record["message"] == "event loop"]
    return {"longest_ms": max(longest), "median_of_seconds_ms": median(longest)}


# What is asked.


def make_traffic(model: Model) -> Traffic:
    """Requests of each kind, of texts of their own.

    Raises:
        ValueError: if two texts have vectors so near that another's could pass for one's own.
    """

    def some(kind: str, count: int, sizes: Sequence[int], bad_share: float = 0.0) -> list[Asked]:
        return make_requests(model.folder, count, list(MIX).index(kind), bad_share, sizes)

    bulk, queries = model.bulk_requests, model.queries
    asked = {
        "query": some("query", queries, (1,)),
        "TEI query": some("TEI query", queries // 4, (1,)),
        "bulk": some("bulk", bulk, _BULK_SIZES),
        "TEI bulk": some("TEI bulk", bulk // 4, _BULK_SIZES),
        "with faults": some("with faults", bulk, SIZES, bad_share=0.3),
        "hangs up": some("hangs up", bulk // 2, (1, *_BULK_SIZES)),
        "slow": some("slow", bulk // 4, (1, *_BULK_SIZES)),
    }
    check_apart(np.concatenate([one.vectors for some in asked.values() for one in some]))
    traffic: dict[str, list[Request]] = {
        kind: [Request((tei if kind.startswith("TEI") else openai)(one), one.verdict) for one in some]
        for kind, some in asked.items()
    }
    traffic["stalls"] = [
        Request(request.content[: len(request.content) // 2], expects(408, "request_timeout"))
        for request in traffic["query"] + traffic["slow"]
    ]
    traffic["bad"] = bad_requests()
    traffic["at the limits"] = largest_requests()
    return traffic


def check_apart(vectors: Any) -> None:
    """See that a vector other than one's own is seen to be that. vectors: (N, D), of length 1.

    Raises:
        ValueError: if it might not.
    """
    products = vectors @ vectors.T
    np.fill_diagonal(products, -1.0)
    nearest = float(np.sqrt(max(2 - 2 * products.max(), 0.0)))
    if nearest < 100 * TOLERANCE:
        raise ValueError(f"two texts' vectors differ by {nearest:.1e} alone: other texts are needed")


def openai(asked: Asked) -> bytes:
    """A request to `/v1/embeddings`; single vectors in base64, as OpenAI's client asks for them."""
    one = len(asked.texts) == 1
    return post("/v1/embeddings", {"input": asked.texts, **({"encoding_format": "base64"} if one else {})})


def tei(asked: Asked) -> bytes:
    """A request to `/embed`."""
    return post("/embed", {"inputs": asked.texts})


def post(path: str, document: Any, *headers: str) -> bytes:
    """A whole request; a document of bytes is sent as it is."""
    body = document if isinstance(document, bytes) else orjson.dumps(document)
    lines = [f"POST {path} HTTP/1.1", "host: soak", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def expects(status: int, code: str) -> Callable[[int, bytes], str]:
    """The verdict on an answer that should be this error."""

    def verdict(given: int, content: bytes) -> str:
        if given == 429:
            return "refused"
        error = orjson.loads(content)["error"]
        return "ok" if (given, error["code"]) == (status, code) else f"wrong: {given} {error} for {status} {code}"

    return verdict


def bad_requests() -> list[Request]:
    """Requests that can't be served, and why not."""
    path = "/v1/embeddings"
    return [
        Request(post(path, b'{"input": '), expects(400, "invalid_json")),
        Request(post(path, {"input": []}), expects(400, "empty_input")),
        Request(post(path, {"input": "a", "dimensions": 0}), expects(400, "invalid_dimensions")),
        Request(post(path, {"input": "a", "model": "another"}), expects(404, "model_not_found")),
        Request(post(path, {"input": "long " * 100_000}), expects(400, "context_length_exceeded")),
        Request(post(path, b"", "content-encoding: gzip"), expects(415, "unsupported_content_encoding")),
        Request(post("/v1/nothing", {}), expects(404, "not_found")),
        Request(b"no request at all\r\n\r\n", expects(400, "invalid_http")),
    ]


def largest_requests() -> list[Request]:
    """The worst bodies within the limits, and what they are answered."""
    path, size = "/v1/embeddings", 8_000_000
    return [
        Request(post(path, b'{"input":[' + b"[]," * (size // 3) + b"[]]}"), expects(400, "request_too_large")),
        Request(post(path, {"input": ["a " * (size // 4096)] * 2048}), expects(400, "context_length_exceeded")),
        Request(post(path, {"input": [5] * 300_000, "token_ids": "model"}), expects(400, "context_length_exceeded")),
        Request(post(path, {"input": "a", "model": "x" * size}), expects(404, "model_not_found")),
        Request(post(path, {"input": [], **{str(n): 1 for n in range(16_000)}}), expects(400, "empty_input")),
        Request(post(path, b'{"input": "' + b"\\" * size), expects(400, "invalid_json")),
    ]


# Who asks.


class Answer:
    """An answer, as it is read; `whole` once it is."""

    def __init__(self) -> None:
        self.whole = False
        self.content = b""
        self.retry_seconds = 0.0
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if name.lower() == b"retry-after-ms":
            self.retry_seconds = int(value) / 1000

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self.content += body

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.whole = True


class Connection:
    """One connection to the server, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, limit: int = 1 << 16) -> Connection:
        """A new one; no more than about `limit` bytes are read ahead."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit))

    async def answer(self, pause: float = 0.0) -> Answer:
        """The answer, read in pieces with pauses.

        Raises:
            ConnectionError: if it does not come, or breaks off.
            TimeoutError: if it takes too long.
        """
        answer = Answer()
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while not answer.whole:
                if not (piece := await self._reader.read(1 << 16)):
                    raise ConnectionResetError("the connection ended")
                answer.parser.feed_data(piece)
                await asyncio.sleep(pause)
        return answer

    @property
    def usable(self) -> bool:
        """Whether the server has not closed it."""
        return not self._reader.at_eof()


@dataclass
class Seen:
    """What came of one phase's requests."""

    requests: Counter[str] = field(default_factory=Counter)  # by kind
    statuses: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    retries: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of right answers, by kind

    @property
    def answered(self) -> int:
        """How many got the answer that they should get, and not that there is no room."""
        return self.verdicts["ok"]

    def report(self) -> dict[str, Any]:
        """The figures."""
        queries = [seconds for kind in _ALONE for seconds in self.seconds[kind]]
        return {
            "requests": dict(self.requests),
            "answers": dict(self.statuses),
            "retries": self.retries,
            "hung_up": self.verdicts["hung up"],
            **{f"query_p{p}_ms": round(float(np.percentile(queries, p)) * 1000, 1) for p in (50, 99) if queries},
        }


class Clients:
    """All clients: connections that are free, and what they saw."""

    def __init__(self, port: int, traffic: Traffic) -> None:
        self._port = port
        self._traffic = traffic
        self._free: deque[Connection] = deque()  # used in turn, so that none is idle for long
        self._chance = random.Random(0)
        self.seen = Seen()

    async def wait_and_ask(self, clients: int, seconds: float, mix: Mapping[str, float]) -> None:
        """So many clients for so long, each asking again when it has its answer."""
        end = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < end:
                await self.play(self._draw(mix))

        await asyncio.gather(*(client() for _ in range(clients)))

    async def arrive(self, rate: float, seconds: float, mix: Mapping[str, float]) -> None:
        """New requests at random times, so many a second for so long, whatever is answered; waits for the answers."""
        due = time.perf_counter()
        end = due + seconds
        async with asyncio.TaskGroup() as tasks:
            while (due := due + self._chance.expovariate(rate)) < end:
                await asyncio.sleep(max(due - time.perf_counter(), 0.0))
                tasks.create_task(self.play(self._draw(mix)))

    def hang_up(self) -> None:
        """Close the connections that are free."""
        while self._free:
            self._free.pop().writer.close()

    async def play(self, kind: str) -> None:
        """One request of a kind, to its end."""
        request = self._chance.choice(self._traffic[kind])
        play = {"hangs up": self._hang_up, "slow": self._dawdle, "stalls": self._ask_once}
        play |= dict.fromkeys(("bad", "at the limits"), self._ask_once)
        try:
            await play.get(kind, self._ask)(kind, request)
        except (OSError, httptools.HttpParserError) as error:  # a TimeoutError is one
            self.seen.lost.append(f"{kind}: {error!r}")

    def _draw(self, mix: Mapping[str, float]) -> str:
        return self._chance.choices(list(mix), list(mix.values()))[0]

    async def _ask(self, kind: str, request: Request) -> None:
        """Ask on a connection that others used, and again when there is no room."""
        for attempt in range(_RETRIES + 1):
            answer = await self._exchange(kind, request)
            if answer.parser.get_status_code() != 429 or attempt == _RETRIES:
                return
            self.seen.retries += 1
            await asyncio.sleep(answer.retry_seconds)

    async def _exchange(self, kind: str, request: Request) -> Answer:
        while self._free:
            connection = self._free.popleft()
            if connection.usable:
                break
            connection.writer.close()
        else:
            connection = await Connection.open(self._port)
        began = time.perf_counter()
        self.seen.requests[kind] += 1
        try:
            connection.writer.write(request.content)
            answer = await connection.answer()
        except BaseException:
            connection.writer.close()
            raise
        self._note(kind, request, answer, time.perf_counter() - began)
        self._free.append(connection)
        return answer

    async def _ask_once(self, kind: str, request: Request) -> None:
        """Ask on a connection of one's own."""
        async with self._own_connection(kind) as connection:
            began = time.perf_counter()
            connection.writer.write(request.content)
            self._note(kind, request, await connection.answer(), time.perf_counter() - began)

    async def _hang_up(self, kind: str, request: Request) -> None:
        """Wait for the answer for a moment."""
        async with self._own_connection(kind) as connection:
            began = time.perf_counter()
            connection.writer.write(request.content)
            try:
                async with asyncio.timeout(self._chance.expovariate(1 / _HANG_UP_SECONDS)):
                    answer = await connection.answer()
            except TimeoutError:
                self.seen.verdicts["hung up"] += 1
            else:
                self._note(kind, request, answer, time.perf_counter() - began)

    async def _dawdle(self, kind: str, request: Request) -> None:
        """Send in pieces, and read in small ones."""
        async with self._own_connection(kind, limit=1 << 10) as connection:
            began = time.perf_counter()
            step = len(request.content) // 4 + 1
            for place in range(0, len(request.content), step):
                connection.writer.write(request.content[place : place + step])
                await asyncio.sleep(self._chance.uniform(0.1, 0.6))
            self._note(kind, request, await connection.answer(pause=0.05), time.perf_counter() - began)

    @asynccontextmanager
    async def _own_connection(self, kind: str, limit: int = 1 << 16) -> AsyncIterator[Connection]:
        connection = await Connection.open(self._port, limit)
        self.seen.requests[kind] += 1
        try:
            yield connection
        finally:
            connection.writer.transport.abort()

    def _note(self, kind: str, request: Request, answer: Answer, seconds: float) -> None:
        status = answer.parser.get_status_code()
        try:
            verdict = request.verdict(status, answer.content)
        except (ValueError, LookupError, TypeError) as error:
            verdict = f"wrong: {error!r}"
        self.seen.statuses[str(status)] += 1
        self.seen.verdicts[verdict if verdict in ("ok", "refused") else f"{kind}: {verdict}"] += 1
        if verdict == "ok":
            self.seen.seconds[kind].append(seconds)


# The soak.


async def soak(server: ServerProcess, traffic: Traffic, seconds: float) -> dict[str, Any]:
    """All phases, and what was seen in them."""
    clients = Clients(int(server.base_url.rpartition(":")[2]), traffic)
    capacity = await measure_capacity(clients, max(_CAPACITY_SHARE * seconds, _CAPACITY_SECONDS))
    print(f"capacity: {capacity:.1f} requests a second", flush=True)
    before = await settled(server, clients)
    phases = {"waiting clients": clients.seen}
    rate = OVERLOAD * capacity
    clients.seen = phases["queries alone"] = Seen()
    await clients.arrive(rate * sum(_ALONE.values()), _ALONE_SHARE * seconds, _ALONE)
    clients.seen = phases["all together"] = Seen()
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch(server, clients.seen, (1 - _ALONE_SHARE) * seconds))
        await clients.arrive(rate, (1 - _ALONE_SHARE) * seconds, MIX)
    after = await settled(server, clients)
    for name, seen in phases.items():
        print(f"{name}: {seen.report()}", *seen.lost[:10], sep="\n  ", flush=True)
    verdicts = sum((seen.verdicts for seen in phases.values()), Counter[str]())
    return {
        "faults_share": _FAULTS_SHARE,
        "overload": OVERLOAD,
        "capacity": round(capacity, 1),
        "phases": {name: seen.report() for name, seen in phases.items()},
        "lost": sum(len(seen.lost) for seen in phases.values()),
        "wrong": {verdict: count for verdict, count in verdicts.items() if "wrong" in verdict},
        "memory": judge(watching.result()),
        "turns": turns(server),
        "before": before,
        "after": after,
        "server": {name: server.metric(f"llm2vec_{name}_total") for name in _COUNTED},
    }


async def measure_capacity(clients: Clients, seconds: float) -> float:
    """Requests a second that clients get answered who wait for their answers, in the last two thirds of the time."""
    asking = asyncio.create_task(clients.wait_and_ask(_WAITING_CLIENTS, seconds, _WITH_ANSWERS))
    await asyncio.sleep(seconds / 3)
    answered, began = clients.seen.answered, time.perf_counter()
    await asyncio.sleep(2 * seconds / 3)
    capacity = (clients.seen.answered - answered) / (time.perf_counter() - began)
    await asking
    return capacity


async def settled(server: ServerProcess, clients: Clients) -> dict[str, float]:
    """What the server holds once nobody is connected."""
    clients.hang_up()
    await asyncio.sleep(_SETTLE_SECONDS)
    return holdings(server)


async def watch(server: ServerProcess, seen: Seen, seconds: float) -> list[float]:
    """The server's memory in MB, at equal times."""
    series: list[float] = []
    began = time.perf_counter()
    for number in range(1, _SAMPLES + 1):
        await asyncio.sleep(began + seconds * number / _SAMPLES - time.perf_counter())
        series.append(round(resident_bytes(server) / 1e6, 1))
        print(f"{time.perf_counter() - began:5.0f} s  {series[-1]} MB  {dict(seen.statuses)}", flush=True)
    return series


def judge(series: Sequence[float]) -> dict[str, Any]:
    """How memory grew, in medians of an eighth of the time each: the second, after a warm-up, and the last."""
    some = max(len(series) // 8, 1)
    warm, end = median(series[some : 2 * some]), median(series[-some:])
    return {"series_mb": list(series), "after_warm_up_mb": warm, "at_end_mb": end, "growth": round(end / warm - 1, 4)}
