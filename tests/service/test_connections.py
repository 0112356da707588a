"""When a client counts as gone, or as one that does not read its answer; tests/e2e/test_limits.py has real servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from service.embedding.in_flight import InFlight
from service.http.connections import Connection, Guard, Unsent
from service.metrics import Metrics
from service.settings import Settings


@pytest.mark.parametrize(
    ("unsent_bytes", "idle_seconds"),
    [
        ([0, 0, 0], [0, 0, 0]),
        ([9, 9, 9], [0, 1, 2]),
        ([9, 8, 7], [0, 0, 0]),  # steady, though the buffer is never empty
        ([9, 9, 8, 8, 8], [0, 1, 0, 1, 2]),
        ([9, 20, 20], [0, 1, 2]),  # more was put there, and nothing taken
        ([9, 0, 9, 9], [0, 0, 1, 2]),
    ],
)
def test_a_client_is_idle_while_it_takes_nothing(unsent_bytes: list[int], idle_seconds: list[float]) -> None:
    unsent = Unsent()
    assert [unsent.idle_seconds(now, count) for now, count in enumerate(unsent_bytes)] == idle_seconds


class Echo:
    """Answers a request with its body in two parts, each once it is let, unless the client is gone before."""

    def __init__(self) -> None:
        self.parts = [asyncio.Event(), asyncio.Event()]
        self.begun, self.gone = asyncio.Event(), asyncio.Event()

    def let_all(self) -> None:
        for part in self.parts:
            part.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.begun.set()
        if message["type"] == "http.request":
            watch = asyncio.create_task(self._watch(receive))
            await self.parts[0].wait()
            if not self.gone.is_set():
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await self.parts[1].wait()
                await send({"type": "http.response.body", "body": b"."})
            watch.cancel()
        else:
            self.gone.set()

    async def _watch(self, receive: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"
        self.gone.set()


Talk = Callable[[Echo, socket.socket], Coroutine[Any, Any, None]]


def run(talk: Talk, loop: str) -> None:
    """A client's talk with an Echo behind the protocol, over TCP on either event loop."""

    async def main() -> None:
        echo, running = Echo(), asyncio.get_running_loop()
        guard = Guard(Settings(), Metrics(), InFlight(1 << 30))
        config = uvicorn.Config(echo, http=partial(Connection, guard), log_config=None)  # type: ignore[arg-type]
        config.load()
        protocol = partial(Connection, guard, config=config, server_state=ServerState(), app_state={})
        async with await running.create_server(protocol, "127.0.0.1", 0) as server:
            client = socket.create_connection(server.sockets[0].getsockname())
            client.setblocking(False)
            with client:
                await asyncio.wait_for(talk(echo, client), 20)

    (uvloop.run if loop == "uvloop" else asyncio.run)(main())


def post(body: bytes, length: int | None = None) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (length or len(body), body)


async def send(client: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


async def rest(client: socket.socket) -> bytes:
    """Everything until the server ends its side."""
    found = b""
    while part := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
        found += part
    return found


loops = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


@loops
@pytest.mark.parametrize("size", [1, 1_000_000])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_client_that_ends_its_side_gets_its_answer_whole(loop: str, size: int, seconds: float) -> None:
    body = b"a" * size

    async def talk(echo: Echo, client: socket.socket) -> None:
        await send(client, post(body))
        await asyncio.sleep(seconds)
        client.shutdown(socket.SHUT_WR)
        await echo.begun.wait()
        await asyncio.sleep(seconds)
        assert not echo.gone.is_set()
        echo.let_all()
        head, _, answer = (await rest(client)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert head.count(b"HTTP/1.1") == 1
        assert b"connection: close" in head
        assert answer == b"%x\r\n%b\r\n1\r\n.\r\n0\r\n\r\n" % (size, body)

    run(talk, loop)


@loops
def test_a_client_may_end_its_side_within_the_answer(loop: str) -> None:
    async def talk(echo: Echo, client: socket.socket) -> None:
        await send(client, post(b"a"))
        echo.parts[0].set()
        begun = await asyncio.get_running_loop().sock_recv(client, 1 << 16)
        client.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.05)
        echo.parts[1].set()
        assert (begun + await rest(client)).endswith(b"\r\n\r\n1\r\na\r\n1\r\n.\r\n0\r\n\r\n")

    run(talk, loop)


@loops
def test_two_requests_at_once_and_the_end_of_the_client_s_side(loop: str) -> None:
    async def talk(echo: Echo, client: socket.socket) -> None:
        await send(client, post(b"a") + post(b"b"))
        client.shutdown(socket.SHUT_WR)
        echo.let_all()
        answers = await rest(client)
        assert answers.count(b"HTTP/1.1 200 OK") == answers.count(b"HTTP/1.1") == 2
        assert answers.endswith(b"\r\n\r\n1\r\nb\r\n1\r\n.\r\n0\r\n\r\n")

    run(talk, loop)


@loops
@pytest.mark.parametrize("half_closed_seconds", [None, 0.0, 0.4])
def test_a_client_that_hangs_up_is_gone_at_once(loop: str, half_closed_seconds: float | None) -> None:
    """It may have ended its side before."""

    async def talk(echo: Echo, client: socket.socket) -> None:
        await send(client, post(b"a"))
        if half_closed_seconds is not None:
            client.shutdown(socket.SHUT_WR)
            await echo.begun.wait()
            await asyncio.sleep(half_closed_seconds)
            assert not echo.gone.is_set()
        client.close()
        await asyncio.wait_for(echo.gone.wait(), 5)
        echo.let_all()

    run(talk, loop)


@loops
def test_a_request_that_was_cut_off_has_no_answer(loop: str) -> None:
    async def talk(echo: Echo, client: socket.socket) -> None:
        await send(client, post(b"a", 5))
        client.shutdown(socket.SHUT_WR)
        echo.let_all()
        assert await rest(client) == b""
        await echo.gone.wait()

    run(talk, loop)
