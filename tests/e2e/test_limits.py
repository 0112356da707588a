"""What a client on a raw socket may take of a real server: time, header, memory, connections."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ServerProcess

MEGABYTE = 1 << 20
LIMITS = {
    "LLM2VEC_REQUEST_READ_SECONDS": "1",
    "LLM2VEC_ANSWER_WRITE_SECONDS": "1",
    "LLM2VEC_KEEP_ALIVE_SECONDS": "2",
    "LLM2VEC_MAX_CONNECTIONS": "8",
}


@pytest.fixture(scope="module")
def server(encoder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(encoder, LIMITS, "--dtype", "float32") as running:
        yield running


def connect(server: ServerProcess, receive_bytes: int = 0) -> socket.socket:
    connection = socket.socket()
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", int(server.base_url.rpartition(":")[2])))
    return connection


def answer_of(connection: socket.socket) -> bytes:
    """Everything until the server closes; what is reset has no answer."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def body_of(answer: bytes) -> dict[str, dict[str, str]]:
    body: dict[str, dict[str, str]] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return body


def dribble(connection: socket.socket, data: bytes) -> bytes:
    """Send a byte every now and then until the server has had enough; its answer."""
    connection.settimeout(0.1)
    answer = b""
    for place in range(len(data)):
        try:
            connection.sendall(data[place : place + 1])
            part = connection.recv(1 << 16)
            if not part:
                return answer
            answer += part
        except TimeoutError:
            continue
        except ConnectionError:
            return answer
    raise AssertionError("the server waited for all of it")


def dropped(server: ServerProcess, reason: str) -> float:
    return server.metric(f'llm2vec_dropped_connections_total{{reason="{reason}"}}')


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/embeddings", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [b"POST %b HTTP/1.1" % path, b"Host: x", b"Content-Length: %d" % size, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_a_header_that_dribbles_is_dropped(server: ServerProcess) -> None:
    before = dropped(server, "slow_request")
    with closing(connect(server)) as connection:
        answer = dribble(connection, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"a" * 1000)
    assert status_of(answer) == 408
    assert body_of(answer)["error"]["code"] == "request_timeout"
    assert dropped(server, "slow_request") == before + 1


@pytest.mark.parametrize("path", [b"/v1/embeddings", b"/embed", b"/v2/embed", b"/v1/chunk_embeddings"])
def test_a_body_that_dribbles_is_dropped_in_the_words_of_its_api(server: ServerProcess, path: bytes) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(post(b"", path=path, length=100_000))
        answer = dribble(connection, b'{"input": "' + b"a" * 1000)
    assert status_of(answer) == 408
    assert b"connection: close" in answer
    expected = {b"/v1/embeddings": "error", b"/embed": "error_type", b"/v2/embed": "message"}
    assert expected.get(path, "error") in body_of(answer)
    assert server.embed("a").status_code == 200


def test_a_connection_that_asks_nothing_is_closed(server: ServerProcess) -> None:
    with closing(connect(server)) as silent, closing(connect(server)) as blank:
        assert dribble(blank, b"\r\n" * 500)[:12] in (b"", b"HTTP/1.1 408")
        assert answer_of(silent) == b""


def test_an_idle_connection_is_kept_for_a_while_and_closed_then(server: ServerProcess) -> None:
    with closing(connect(server)) as connection:
        for _ in range(2):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
            assert status_of(answer) == 200
            time.sleep(1.2)  # longer than a request may take
        assert answer_of(connection) == b""


def test_a_client_that_does_not_read_its_answer_is_dropped(server: ServerProcess) -> None:
    before = dropped(server, "slow_reader")
    body = json.dumps({"input": [f"{number}" for number in range(2048)]}).encode()
    with closing(connect(server, receive_bytes=4096)) as connection:
        for _ in range(4):  # more than the kernel keeps for it
            connection.sendall(post(body))
        server.eventually(lambda: server.metric("llm2vec_bytes_in_flight") > MEGABYTE)
        server.eventually(lambda: dropped(server, "slow_reader") == before + 1, 60)
    server.eventually(lambda: server.metric("llm2vec_bytes_in_flight") == 0)
    server.eventually(lambda: server.metric("llm2vec_inflight_requests") == 1)


def test_a_slow_but_steady_reader_gets_all_of_a_long_answer(server: ServerProcess) -> None:
    body = json.dumps({"input": [f"{number}" for number in range(1000)]}).encode()
    with closing(connect(server, receive_bytes=1 << 16)) as connection:
        connection.sendall(post(body, b"Connection: close"))
        answer = b""
        while part := connection.recv(1 << 15):
            answer += part
            time.sleep(0.02)
    assert answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"x-%d: a\r\n" % n for n in range(20_000)),
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_a_large_header_is_refused(server: ServerProcess, request_: bytes) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(request_)
        assert status_of(answer_of(connection)) in (431, 0)  # 0: closed before all was sent, and so reset


def send_until_closed(connection: socket.socket, start: bytes, megabytes: int) -> int:
    """How many went through."""
    sent = 0
    try:
        connection.sendall(start)
        for sent in range(megabytes):  # noqa: B007
            connection.sendall(b"a" * MEGABYTE)
    except ConnectionError:
        return sent
    return megabytes


def test_an_endless_header_and_endless_trailers_cost_no_memory(server: ServerProcess) -> None:
    before = resident_bytes(server)
    chunked = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: "
    for start in (b"GET / HTTP/1.1\r\nX-Long: ", chunked):
        with closing(connect(server)) as connection:
            assert send_until_closed(connection, start, 100) < 100
    assert resident_bytes(server) - before < 20 * MEGABYTE


def test_a_client_that_ends_its_side_gets_its_answer(server: ServerProcess) -> None:
    """As `nc -N` does, for instance, and whoever speaks HTTP by hand."""
    many = json.dumps({"input": [f"{number}" for number in range(1000)]}).encode()
    for body in (b'{"input": "a"}', many):
        with closing(connect(server)) as connection:
            connection.sendall(post(body))
            connection.shutdown(socket.SHUT_WR)
            answer = answer_of(connection)
        assert status_of(answer) == 200
        assert b"connection: close" in answer.partition(b"\r\n\r\n")[0]
        assert b'"object":"list"' in answer
        assert b'"usage"' in answer


UPGRADES = {
    "as Java offers": (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk",
    ),
    "and the end": (b"Connection: close, upgrade", b"upgrade: h2c"),
    "of another kind": (b"Connection: upgrade", b"Upgrade: websocket, h2c, TLS/1.2"),
}


@pytest.mark.parametrize("offer", UPGRADES.values(), ids=UPGRADES)
def test_an_offer_to_upgrade_is_ignored_and_the_body_read(server: ServerProcess, offer: tuple[bytes, ...]) -> None:
    body = b'{"input": "a"}'
    chunked = b"\r\n".join(
        [b"POST /v1/embeddings HTTP/1.1", b"Host: x", *offer, b"Transfer-Encoding: chunked", b"", b""]
    )
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    expected = server.embed("a").json()
    for request in (post(body, *offer), chunked):
        for step in (len(request), 7):
            with closing(connect(server)) as connection:
                for start in range(0, len(request), step):
                    connection.sendall(request[start : start + step])
                    time.sleep(0.001)
                connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = answer_of(connection)
            assert status_of(answer) == 200, answer
            assert expected["data"] == json.loads(answer.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1")[0])["data"]
            if b"close" not in offer[0]:
                assert answer.endswith(b'{"status":"alive"}')


def test_many_offers_to_upgrade_at_once_are_all_answered(server: ServerProcess) -> None:
    offer = UPGRADES["as Java offers"]
    with closing(connect(server)) as connection:
        one = b"\r\n".join([b"GET /livez HTTP/1.1", b"Host: x", *offer, b"", b""])
        connection.sendall(one * 200 + b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer_of(connection).count(b"HTTP/1.1 200") == 201


def test_an_offer_to_upgrade_makes_no_room_for_a_larger_header(server: ServerProcess) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(post(b"{}", *UPGRADES["as Java offers"], b"X-Long: " + b"a" * 70_000))
        assert status_of(answer_of(connection)) in (431, 0)


@pytest.mark.skipif(not shutil.which("java"), reason="needs a JDK")
def test_the_stock_http_client_of_java_is_answered(server: ServerProcess, tmp_path: Path) -> None:
    source = tmp_path / "Ask.java"
    source.write_text(
        f"""
        import java.net.URI;
        import java.net.http.*;
        public class Ask {{
          public static void main(String[] arguments) throws Exception {{
            HttpRequest request = HttpRequest.newBuilder(URI.create("{server.base_url}/v1/embeddings"))
              .POST(HttpRequest.BodyPublishers.ofString("{{\\"input\\": \\"a\\"}}")).build();
            for (int i = 0; i < 2; i++) {{
              var answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
              System.out.println(answer.version() + " " + answer.statusCode());
            }}
          }}
        }}
        """
    )
    asked = subprocess.run(["java", str(source)], capture_output=True, text=True, timeout=120, check=False)
    assert asked.stdout.split("\n")[:2] == ["HTTP_1_1 200"] * 2, asked.stderr


def test_what_is_no_http_gets_400(server: ServerProcess) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
        with closing(connect(server)) as connection:
            connection.sendall(nonsense)
            assert status_of(answer_of(connection)) == 400


def test_a_request_smuggled_behind_two_lengths_is_refused(server: ServerProcess) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(post(b"{}", b"Transfer-Encoding: chunked"))
        assert status_of(answer_of(connection)) == 400


def test_connections_beyond_the_limit_are_told_so(server: ServerProcess) -> None:
    with closing(connect(server)) as one_more:
        many = [connect(server) for _ in range(12)]
        try:
            one_more.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert status_of(answer_of(one_more)) == 200
            many[-1].sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = answer_of(many[-1])
            assert status_of(answer) == 503
            assert body_of(answer)["error"]["code"] == "too_many_connections"
        finally:
            for connection in many:
                connection.close()
    server.eventually(lambda: httpx.get(f"{server.base_url}/livez").status_code == 200)


def resident_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_large_and_compressed_bodies_are_refused_before_memory_is_spent(server: ServerProcess) -> None:
    server.embed("a")
    before = resident_bytes(server)

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * MEGABYTE

    bomb = gzip.compress(b" " * 100 * MEGABYTE)
    url = f"{server.base_url}/v1/embeddings"
    with closing(connect(server)) as connection:
        connection.sendall(post(b"", length=100 * MEGABYTE))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")
    for _ in range(2):
        try:
            streamed = httpx.post(url, content=endless(), timeout=60)
            assert streamed.status_code == 413
        except httpx.TransportError:
            pass  # refused while it still sent
        zipped = httpx.post(url, content=bomb, headers={"content-encoding": "gzip"})
        assert zipped.status_code == 415
    deep = httpx.post(url, content=b"[" * 5 * MEGABYTE)
    assert deep.json()["error"]["code"] == "request_too_large"
    # What may be kept of one body: its parts and the whole.
    assert resident_bytes(server) - before < 3 * 8 * MEGABYTE
    assert server.embed("a").status_code == 200


def test_many_slow_clients_do_not_keep_others_waiting(server: ServerProcess) -> None:
    slow = [connect(server) for _ in range(6)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        with ThreadPoolExecutor(2) as pool:
            assert {answer.status_code for answer in pool.map(server.embed, ["a", "b", "c", "d"])} == {200}
        assert [status_of(answer_of(connection)) for connection in slow] == [408] * 6
    finally:
        for connection in slow:
            connection.close()


def test_keys_in_several_processes_are_in_no_argument(encoder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-from-the-file\n")
    environment = {"LLM2VEC_API_KEYS": "sk-from-the-environment", "LLM2VEC_FRONTENDS": "2"}
    with ServerProcess(encoder, environment, "--dtype", "float32", "--api-keys-file", str(keys)) as several:
        answers = []
        for key in ("sk-from-the-file", "sk-from-the-environment", "sk-wrong", ""):
            for _ in range(4):  # whichever front end it is
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answers.append(httpx.post(f"{several.base_url}/v1/embeddings", json={"input": "a"}, headers=headers))
        assert [answer.status_code for answer in answers] == [200] * 8 + [401] * 8
        for process in Path("/proc").glob("[0-9]*"):
            try:
                assert "sk-from" not in (process / "cmdline").read_text()
                if "sk-from-the-file" in (process / "environ").read_text(errors="replace"):
                    raise AssertionError("a key of the file is in an environment")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        keys.write_text("sk-new\n")
        url, fresh = f"{several.base_url}/v1/models", {"authorization": "Bearer sk-new"}
        several.eventually(lambda: all(httpx.get(url, headers=fresh).status_code == 200 for _ in range(8)))
        assert not [line for line in several.lines if "sk-" in line]
