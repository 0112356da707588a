"""The HTTP path alone: what the server spends on a request beside the encoder, on one core.

    python -m bench.http_path [--seconds 3] [--connections 32] [--cases SUBSTRING …] [--profile] [--save]

A server process as `llm2vec-service serve` starts it, real tokenizer included, whose worker answers at once with
vectors that were ready before. It has one core to itself, the clients have another: connections in closed loop, each
sending its next request when it has the answer to the last. A case is WIDTH/ENCODING/INPUTS, such as 4096/base64/1.

The longest stall is the latest that a timer of 1 ms came on the server's event loop. Tokenizer threads share the
server's core here, so what they hold up counts too, and so does whatever else runs on the machine: `others` is the
part of the server's core that other processes took, and a line with more than 5 % of that is marked.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import cProfile
import gc
import io
import itertools
import multiprocessing
import os
import pstats
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import httptools
import numpy as np
import orjson
import uvloop

from bench.report import finish
from bench.texts import sentences
from model_store.manifest import Manifest
from service.batching.contract import DevicePlan
from service.batching.cost_model import CostModel
from service.batching.limits import Limits
from service.embedding.rows import EmbedRow, Vector
from service.server.startup import prepare_store
from service.settings import Settings

WIDTHS = (640, 4096)
ENCODINGS = ("float", "base64")
INPUTS = (1, 64, 2048)

# Distinct texts: a case goes round them in as many requests as they make.
_TEXTS = 32768
# With all connections in work, answers to 2048 inputs would fill the memory of a small machine.
_MOST_INPUTS_IN_WORK = 8192
# The default on a GPU: there the HTTP path is what can be too slow.
_BATCH_TOKENS = 16384
# Enough of some answers to be checked.
_KEPT_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_NOISY_SHARE = 0.05
_STALL_TICK_SECONDS = 0.001
_PATIENCE_SECONDS = 60.0
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Case:
    """One kind of request."""

    width: int
    encoding: str
    inputs: int

    def __str__(self) -> str:
        return f"{self.width}/{self.encoding}/{self.inputs}"


CASES = [Case(*parts) for parts in itertools.product(WIDTHS, ENCODINGS, INPUTS)]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="the encoder whose tokenizer is used (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case (default %(default)s)")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--cases", nargs="+", metavar="SUBSTRING", default=[""], help="only those with one of these")
    parser.add_argument("--profile", action="store_true", help="print where the event loop's time goes, slowed by that")
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()

    cases = [case for case in CASES if any(part in str(case) for part in options.cases)]
    cores = sorted(os.sched_getaffinity(0))
    if not cases or len(cores) < 2:
        parser.error("no such case" if not cases else "the server and its clients need a core each")
    folder, manifest = prepare_store(Settings(model=options.model), lambda done, total: None)
    texts = distinct_texts(_TEXTS)
    gc.disable()  # here, where the clients are
    os.sched_setaffinity(0, {cores[1]})
    results = []
    for width, group in itertools.groupby(cases, lambda case: case.width):
        with running_server(folder, manifest.model_copy(update={"width": width}), cores[0]) as server:
            for case in group:
                results.append(measure(server, case, texts, options))
                print(line(results[-1]), flush=True)
    os.sched_setaffinity(0, cores)
    finish("http_path", {"seconds": options.seconds, "profiled": options.profile, "cases": results}, options.save)


def measure(server: Server, case: Case, texts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one case."""
    connections = min(options.connections, max(1, _MOST_INPUTS_IN_WORK // case.inputs))
    requests = request_bytes(case, texts, server.model)
    uvloop.run(load(server.port, requests, connections, 0.0))  # so that nobody pays for a first time
    began = time.perf_counter()
    busy, own = core_seconds(server.core), time.process_time()
    server.tell("profile" if options.profile else "begin")
    measured = uvloop.run(load(server.port, requests, connections, options.seconds))
    seen = server.tell("end")
    busy, own = core_seconds(server.core) - busy, time.process_time() - own
    wall = time.perf_counter() - began
    for answer in measured.kept:
        check_answer(answer, case)
    if options.profile:
        print(f"{case}: {len(measured.latencies)} requests\n{seen['profile']}")
    rate = len(measured.latencies) / measured.seconds
    median, slow = np.percentile(measured.latencies, (50, 99)) * 1000
    return {
        "case": str(case),
        "connections": connections,
        "requests": len(measured.latencies),
        "requests_per_second": round(rate, 1),
        "texts_per_second": round(rate * case.inputs),
        "p50_ms": round(median, 2),
        "p99_ms": round(slow, 2),
        "longest_stall_ms": round(seen["stall_seconds"] * 1000, 1),
        "server_cpu_ms": round(seen["cpu_seconds"] * 1000 / len(measured.latencies), 3),
        "server_busy": round(seen["cpu_seconds"] / wall, 2),
        "clients_busy": round(own / wall, 2),
        "others": round(max(busy - seen["cpu_seconds"], 0.0) / wall, 2),
    }


def line(result: dict[str, Any]) -> str:
    """A case's figures for people."""
    return (
        "{case:16} {requests_per_second:7.1f} requests/s {texts_per_second:6d} texts/s  p50 {p50_ms:7.2f}  "
        "p99 {p99_ms:7.2f}  longest stall {longest_stall_ms:6.1f}  server CPU {server_cpu_ms:7.3f} ms a request"
        "  busy: server {server_busy:.0%}, clients {clients_busy:.0%}, others {others:.0%}"
    ).format(**result) + (" NOISY" if result["others"] > _NOISY_SHARE else "")


def distinct_texts(count: int) -> list[str]:
    """Queries of 9 to 15 words as they follow each other in real sentences, no two alike."""
    generator = random.Random(0)
    words = " ".join(sentences()).split()
    found: dict[str, None] = {}
    while len(found) < count:
        start = generator.randrange(len(words) - 15)
        found[" ".join(words[start : start + generator.randint(9, 15)])] = None
    return list(found)


def request_bytes(case: Case, texts: Sequence[str], model: str) -> list[bytes]:
    """Whole requests, each of other texts."""
    requests = []
    for start in range(0, len(texts) - case.inputs + 1, case.inputs):
        given = texts[start] if case.inputs == 1 else texts[start : start + case.inputs]
        body = orjson.dumps({"input": given, "model": model, "encoding_format": case.encoding})
        head = (
            "POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
            "Connection: keep-alive\r\nUser-Agent: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


def check_answer(content: bytes, case: Case) -> None:
    """The answer has a unit vector of the right width for each input, in order."""
    data = orjson.loads(content)["data"]
    assert [item["index"] for item in data] == list(range(case.inputs)), f"{case}: {len(data)} vectors"
    for item in data:
        given = item["embedding"]
        vector = np.frombuffer(base64.b64decode(given), "<f4") if case.encoding == "base64" else np.array(given)
        assert vector.shape == (case.width,), f"{case}: {vector.shape}"
        assert abs(np.linalg.norm(vector) - 1) < 1e-3, f"{case}: a vector of length {np.linalg.norm(vector)}"


def core_seconds(core: int) -> float:
    """What processes, and other guests of the same host, have had of a core since the machine started."""
    fields = next(row for row in Path("/proc/stat").read_text().splitlines() if row.startswith(f"cpu{core} ")).split()
    user, nice, system, steal = (int(fields[place]) for place in (1, 2, 3, 8))
    return (user + nice + system + steal) / _TICKS_PER_SECOND


# The clients.


@dataclass
class Load:
    """What the connections of one run share: the requests to send, until when, and what came of them."""

    requests: Iterator[bytes]
    until: float
    latencies: list[float] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)  # some answers whole, to be checked when the clock has stopped
    seconds: float = 0.0


class Client(asyncio.BufferedProtocol):
    """One connection in closed loop. `finished` is set after the answer to its last request, or to what went wrong."""

    def __init__(self, load: Load, keeps: bool) -> None:
        self._load = load
        if keeps:
            self.on_body = self._keep  # its presence costs a copy of each answer
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._read = 0
        self._body: list[bytes] = []
        self._asked = 0.0
        self._transport: asyncio.Transport
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read into."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what was read."""
        self._read = nbytes
        self._parser.feed_data(self._buffer[:nbytes])

    def on_message_complete(self) -> None:
        """Called by the parser: note the answer, and ask again."""
        now = time.perf_counter()
        load = self._load
        load.latencies.append(now - self._asked)
        if self._parser.get_status_code() != 200:
            self._end(AssertionError(bytes(self._buffer[: self._read]).decode()))
            return
        if self._body:
            load.kept.append(b"".join(self._body))
            self._body.clear()
        if now < load.until:
            self._ask()
        else:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail, unless it was this side that hung up."""
        self._end(error or ConnectionError("the server hung up"))

    def _keep(self, body: bytes) -> None:
        if sum(map(len, self._load.kept)) < _KEPT_BYTES:
            self._body.append(body)

    def _ask(self) -> None:
        self._asked = time.perf_counter()
        self._transport.write(next(self._load.requests))

    def _end(self, error: Exception | None) -> None:
        self._transport.close()
        if not self.finished.done():
            self.finished.set_exception(error) if error else self.finished.set_result(None)


async def load(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """Ask for so long and await what is on its way then; at least one request a connection.

    Raises:
        AssertionError, ConnectionError, TimeoutError: for an answer that is not 200, or none.
    """
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    run = Load(itertools.cycle(requests), began + seconds)
    clients = []
    for number in range(connections):
        _, client = await loop.create_connection(partial(Client, run, keeps=number == 0), "127.0.0.1", port)
        clients.append(client)
    await asyncio.wait_for(asyncio.gather(*(client.finished for client in clients)), seconds + _PATIENCE_SECONDS)
    run.seconds = time.perf_counter() - began
    return run


def load_in_process(
    port: int, requests: Sequence[bytes], connections: int, seconds: float
) -> tuple[list[float], float]:
    """As `load`, for a process of its own: latencies, and seconds in all."""
    run = uvloop.run(load(port, requests, connections, seconds))
    return run.latencies, run.seconds


# The server.


@dataclass(frozen=True)
class Server:
    """A running server: its port, its core, and a line to its event loop."""

    port: int
    core: int
    model: str
    control: Connection

    def tell(self, command: str) -> Any:
        """The probe's answer."""
        self.control.send(command)
        return self.control.recv()


@contextmanager
def running_server(folder: Path, manifest: Manifest, core: int) -> Iterator[Server]:
    """A server process on a core of its own, ready, until the block is left. An error gets the end of its log."""
    context = multiprocessing.get_context("spawn")
    control, theirs = context.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as free, tempfile.NamedTemporaryFile() as log:
        port = free.getsockname()[1]
        free.close()
        process = context.Process(target=serve, args=(folder, manifest, port, core, log.name, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            assert control.recv() == "ready"
            yield Server(port, core, manifest.name, control)
        except Exception as error:
            error.add_note(f"the server's log ends:\n{Path(log.name).read_text()[-5000:]}")
            raise
        finally:
            process.terminate()
            process.join(10)
            process.kill()


def serve(folder: Path, manifest: Manifest, port: int, core: int, log: str, control: Connection) -> None:
    """The server process: the real one, but for the encoder. All that this file knows of its inside is here."""
    os.sched_setaffinity(0, {core})
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the command does

    import service.device.worker  # torch with all its objects, which the garbage collector walks as in real use
    import service.server.process
    import service.server.startup

    service.server.startup.prepare_store = lambda settings, progress: (folder, manifest)
    service.device.worker.EncoderWorker = lambda *_: ReadyWorker(manifest.width, control)  # type: ignore[assignment, misc]
    settings = Settings(
        model=str(folder),
        port=port,
        device="cpu",
        token_budget=_BATCH_TOKENS,
        batch_tokens=_BATCH_TOKENS,
        cache_bytes=0,  # cases share their texts
    )
    sys.exit(service.server.process.serve(settings, lambda done, total: None))


class ReadyWorker:
    """Stands in for the encoder: unit vectors that were ready before. Starts a probe on its event loop if asked to."""

    device, dtype, kernel = "none", "float32", "none"

    def __init__(self, width: int, control: Connection | None = None) -> None:
        vectors = np.random.default_rng(0).standard_normal((1024, width)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self._vectors = itertools.cycle(list(vectors))
        self._control = control

    async def start(self, limits: Limits) -> DevicePlan:
        """Nothing to load; a device that is done at once."""
        if self._control is not None:
            self._probe = Probe(self._control)
        cost = CostModel(floor=1e-6, base=1e-6, per_token=1e-9)
        return DevicePlan(cost, limits.for_batches(cost))

    async def run_batch(self, rows: list[EmbedRow]) -> list[Vector]:
        """The next vectors, whatever the rows."""
        await asyncio.sleep(0)  # a batch takes its time on another thread: here too the event loop goes round
        return list(itertools.islice(self._vectors, len(rows)))

    def stop(self) -> None:
        """Nothing to end."""


class Probe:
    """Measures the event loop it runs on, between the commands `begin` (or `profile`) and `end`."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._profiler: cProfile.Profile | None = None
        self._longest_stall = 0.0
        self._cpu_seconds = 0.0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(control.fileno(), self._answer)
        self._loop.call_soon(control.send, "ready")  # by then the start is over
        self._expected = time.perf_counter()
        self._tick()

    def _tick(self) -> None:
        self._look()
        self._loop.call_later(_STALL_TICK_SECONDS, self._tick)

    def _look(self) -> None:
        now = time.perf_counter()
        self._longest_stall = max(self._longest_stall, now - self._expected)
        self._expected = now + _STALL_TICK_SECONDS

    def _answer(self) -> None:
        try:
            command = self._control.recv()
        except EOFError:  # nobody measures any more
            self._loop.remove_reader(self._control.fileno())
            signal.raise_signal(signal.SIGTERM)
            return
        self._look()
        if command == "end":
            profile = self._profiler and _as_text(self._profiler)
            seen = {"stall_seconds": self._longest_stall, "cpu_seconds": time.process_time() - self._cpu_seconds}
            self._control.send({**seen, "profile": profile})
            return
        self._longest_stall = 0.0
        self._cpu_seconds = time.process_time()
        self._control.send("begun")
        if command == "profile":
            self._profiler = cProfile.Profile()
            self._profiler.enable()


def _as_text(profiler: cProfile.Profile) -> str:
    """The most expensive functions by their own time, then ours with all that they call."""
    profiler.disable()
    text = io.StringIO()
    stats = pstats.Stats(profiler, stream=text)
    stats.sort_stats("tottime").print_stats(30)
    stats.sort_stats("cumtime").print_stats(r"/(service|model_store)/", 30)
    return re.sub(r"\S*/(?=(site-packages|service|model_store|python3[\d.]*)/)", "", text.getvalue())


if __name__ == "__main__":
    main()
