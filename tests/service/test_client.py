"""The client of a server that has no room, fails, hangs up, is replaced, or says no."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bulk.client import Patience, ServerClient, embed_texts
from service.bulk.reading import Input
from service.bulk.sources import ServerVectors, Wanted
from service.errors import EncodingError, InvalidRequest, ServiceError
from service.settings import KEY_VARIABLE
from tests.service.bulk.fakes import WIDTH, do_job, expected
from tests.service.bulk.output import read_output

# What a request is answered with instead of vectors.
Trouble = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Speaks OpenAI's route, when its server's troubles are over."""

    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_GET(self) -> None:
        model = {"id": "fake", "dimensions": WIDTH, "max_input_tokens": 512, "embedding_space": self.server.space}
        self.answer(200, {"data": [model]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/prompts/preview":
            self.answer(200, {"data": [{"instruction": ""}]})
            return
        self.server.requests.append((dict(self.headers), body))
        trouble = self.server.next_trouble()
        if trouble:
            trouble(self)
            return
        vectors = [base64.b64encode(expected(text).tobytes()).decode() for text in body["input"]]
        data = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        self.answer(
            200, {"data": data, "usage": {"prompt_tokens": len(data)}}, {"x-embedding-space": self.server.space}
        )

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def hang_up(self) -> None:
        self.close_connection = True

    def break_off(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        self.wfile.write(b'{"data": [')
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Scripted(ThreadingHTTPServer):
    """A server with troubles to come, one a request, then none."""

    daemon_threads = True

    def __init__(self, troubles: Iterator[Trouble | None], space: str = "space") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.space = space
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self._troubles = troubles
        self._lock = threading.Lock()

    def next_trouble(self) -> Trouble | None:
        with self._lock:
            return next(self._troubles, None)


@contextmanager
def scripted(*troubles: Trouble | None, then: Trouble | None = None) -> Iterator[Scripted]:
    def script() -> Iterator[Trouble | None]:
        yield from troubles
        while True:
            yield then

    with Scripted(script()) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:  # else its thread would poll a closed socket without a pause, to the end of the tests
            server.shutdown()


def error(status: int, code: str = "", headers: dict[str, str] | None = None) -> Trouble:
    """An error in this service's words, or, without a code, in a proxy's."""
    content: Any = {"error": {"message": f"it says {code}", "code": code}} if code else "a proxy's page"
    return lambda handler: handler.answer(status, content, headers)


TROUBLES = {
    "overloaded": error(429, "overloaded", {"retry-after-ms": "20", "retry-after": "1"}),
    "draining": error(503, "server_unavailable", {"retry-after": "0"}),
    "timeout": error(504, "timeout"),
    "a replica died": error(500),
    "bad gateway": error(502),
    "slow": error(408, "request_timeout"),
    "a page instead": lambda handler: handler.answer(200, "<html>We'll be back soon</html>"),
    "hangs up": Handler.hang_up,
    "breaks off": Handler.break_off,
}


QUICK = Patience(first_wait_seconds=0.001, longest_wait_seconds=0.01)


async def ask(server: Scripted, *texts: str, patience: Patience = QUICK) -> Any:
    async with ServerClient(server.url, patience) as client:
        await client.served_model()
        return await client.embed(texts, instruction="Find:")


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_it_comes_again_with_the_same_request(trouble: str) -> None:
    with scripted(TROUBLES[trouble], TROUBLES[trouble]) as server:
        answer = await ask(server, "a", "b")
    np.testing.assert_array_equal(answer.vectors, [expected("a"), expected("b")])
    assert (answer.tokens, answer.embedding_space) == (2, "space")
    bodies = [body for _, body in server.requests]
    assert bodies == [{"input": ["a", "b"], "encoding_format": "base64", "instruction": "Find:"}] * 3


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        (error(400, "context_length_exceeded"), InvalidRequest, "it says context_length_exceeded"),
        (error(413, "request_too_large"), InvalidRequest, "request_too_large"),
        (error(500, "non_finite_embedding", {"x-should-retry": "false"}), EncodingError, "non_finite"),
        (error(503, "out_of_memory"), EncodingError, "out_of_memory"),
        (error(401, "invalid_api_key"), ServiceError, f"answered 401 .*set {KEY_VARIABLE} to a key of this server"),
        (error(404), ServiceError, r"answered 404 \(a proxy's page\)"),
        (error(404, headers={"content-type": "text/html"}), ServiceError, r"answered 404 \(Not Found\)"),
        (lambda handler: handler.answer(200, {"data": [{}]}), ServiceError, "is not this service: .* has no vectors"),
        (lambda handler: handler.answer(200, []), ServiceError, "is not this service: .* has no vectors"),
    ],
)
async def test_a_refusal_is_not_asked_for_again(trouble: Trouble, kind: type[ServiceError], message: str) -> None:
    with scripted(trouble) as server, pytest.raises(kind, match=message) as refused:
        await ask(server, "a")
    assert type(refused.value) is kind
    assert len(server.requests) == 1


async def test_it_gives_up_when_nothing_has_gone_well_for_long() -> None:
    with (
        scripted(then=TROUBLES["draining"]) as server,
        pytest.raises(ServiceError, match=r"answered 503, and again and again for .* given up"),
    ):
        await ask(server, "a", patience=replace(QUICK, seconds=0.05))


async def test_a_request_that_a_server_always_fails_on_does_not_hold_up_the_job_for_ever() -> None:
    with scripted(then=error(500, "internal_error")) as server, pytest.raises(ServiceError, match="answered 500, and"):
        await ask(server, "a")
    assert len(server.requests) == QUICK.most_failures + 1


async def test_a_server_that_was_never_reached_is_not_waited_for() -> None:
    with scripted() as server:
        pass
    server.server_close()
    with pytest.raises(ServiceError, match=r"can't be reached \(.*\): is the server running\?"):
        await ask(server, "a")


async def test_another_service_is_known_by_what_it_does_not_say() -> None:
    with scripted() as server:
        server.RequestHandlerClass = type(
            "Other", (Handler,), {"do_GET": lambda self: self.answer(200, {"data": [{"id": "other"}]})}
        )
        with pytest.raises(ServiceError, match="is not this service: its /v1/models does not name 'embedding_space'"):
            await ask(server, "a")


async def test_a_web_page_is_not_this_service() -> None:
    with scripted() as server:
        page = {"content-type": "text/html; charset=utf-8"}
        server.RequestHandlerClass = type(
            "Page", (Handler,), {"do_GET": lambda self: self.answer(200, "<html>Welcome</html>", page)}
        )
        with pytest.raises(ServiceError, match=r"answered 200 with text/html; charset=utf-8, not with JSON: is it the"):
            await ask(server, "a")


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port"])
def test_an_address_that_is_none_is_said_to_be_none(url: str) -> None:
    with pytest.raises(ServiceError, match="is not an address of a server"):
        ServerClient(url)


async def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted() as server:
        await ask(server, "a")
        monkeypatch.setenv(KEY_VARIABLE, "secret")
        await ask(server, "a")
    assert [headers.get("authorization") for headers, _ in server.requests] == [None, "Bearer secret"]


def test_many_texts_come_back_in_order() -> None:
    texts = [f"text {number}" for number in range(200)]
    with scripted(*TROUBLES.values()) as server:
        server.requests.clear()
        # Whether it was ever reached is not known before the first answer that goes well.
        server._troubles = iter([None, *TROUBLES.values()])
        vectors = embed_texts(f"{server.url}/v1/", texts, "Find:")
    np.testing.assert_array_equal(vectors, [expected(text) for text in texts])
    assert {body["overflow"] for _, body in server.requests} == {"truncate"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("Find:", "query"), {"instruction": "Find:"}),
        (("", "document"), {"instruction": ""}),
        ((None, "document"), {"input_type": "document"}),
        ((), {"input_type": None}),
    ],
)
def test_without_an_instruction_the_server_is_told_the_role(asked: Any, said: dict[str, str | None]) -> None:
    with scripted() as server:
        embed_texts(server.url, ["a"], *asked)
    ((_, body),) = server.requests
    assert {key: body[key] for key in body.keys() & {"instruction", "input_type"}} == said


async def reach(server: Scripted) -> ServerVectors:
    return await ServerVectors.reach(server.url, Wanted(), requests_at_once=4, patience=QUICK)


async def test_a_job_loses_no_row_to_a_server_in_trouble(tmp_path: Path) -> None:
    chance = random.Random(0)
    texts = [f"text {number}" for number in range(1000)]
    path = tmp_path / "a.txt"
    path.write_text("".join(text + "\n" for text in texts))

    def at_random() -> Iterator[Trouble | None]:
        while True:
            yield chance.choice([*TROUBLES.values(), *[None] * 12])

    with scripted() as server:
        vectors = await reach(server)
        server._troubles = at_random()
        await asyncio.to_thread(lambda: do_job([Input(path, "lines")], tmp_path / "out", vectors, rows_per_shard=250))
    out = read_output(tmp_path / "out")
    assert out.rows == list(range(1000))
    np.testing.assert_array_equal(out.vectors, [expected(text) for text in texts])


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_job_comes_again_where_its_very_first_requests_fail(tmp_path: Path, trouble: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n")
    with scripted() as server:
        vectors = await reach(server)
        server._troubles = iter([TROUBLES[trouble]] * 4)
        await asyncio.to_thread(lambda: do_job([Input(path, "lines")], tmp_path / "out", vectors))
    assert read_output(tmp_path / "out").rows == [0, 1]


async def test_a_server_that_is_replaced_by_another_encoder_ends_the_job(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n")
    with scripted() as server:
        vectors = await reach(server)
        server.space = "another"
        with pytest.raises(ServiceError, match="its embedding space was space and is another"):
            await asyncio.to_thread(lambda: do_job([Input(path, "lines")], tmp_path / "out", vectors))
