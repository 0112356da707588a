"""A real server whose device fails in every way we know, under load: each request gets its own answer or an error."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.test_limits import answer_of, connect, post, status_of
from tests.e2e.test_processes import SEVERAL, alive, all_end, children
from tests.faults.crowd import Asked, ask_all, make_requests
from tests.faults.faulty_server import (
    HANGS,
    NOT_FINITE,
    OUT_OF_MEMORY,
    OUT_OF_MEMORY_IN_COMPANY,
    RAISES,
    REFUSES_FROM_NOW_ON,
)
from tests.tiny import build_tiny

MODULE = "tests.faults.faulty_server"
FLOAT32 = ("--dtype", "float32")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def start(encoder: Path, environment: dict[str, str] | None = None) -> ServerProcess:
    one = {"LLM2VEC_DEVICE": "cpu"}
    return ServerProcess(encoder, {**one, **(environment or {})}, *FLOAT32, module=MODULE)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    build_tiny(folder, "gemma3_text")
    return folder


@pytest.fixture(scope="module")
def crowd(encoder: Path) -> list[Asked]:
    return make_requests(encoder, 160)


@pytest.fixture(scope="module")
def server(encoder: Path) -> Iterator[ServerProcess]:
    with start(encoder) as running:
        yield running


def test_what_the_answers_to_faults_say(server: ServerProcess) -> None:
    for mark, status, retry in ((RAISES, 500, None), (NOT_FINITE, 500, "false"), (OUT_OF_MEMORY, 503, "true")):
        answer = server.embed(["fine", "also fine", f"{mark} not fine"])
        assert answer.status_code == status
        assert answer.headers.get("x-should-retry") == retry
        assert "(input index 2)" in answer.json()["error"]["message"]
    assert httpx.get(f"{server.base_url}/readyz").status_code == 200


def test_a_crowd_with_faults_and_killed_clients(server: ServerProcess, crowd: list[Asked]) -> None:
    verdicts = ask_all(server, crowd, impatient=lambda number: number % 7 == 3)
    assert set(verdicts) <= {"ok", "hung up"}, verdicts
    assert verdicts["ok"] >= 120
    server.eventually(lambda: server.metric("llm2vec_inflight_requests") <= 1)
    assert all(server.metric(f'llm2vec_queue_tokens{{class="{lane}"}}') == 0 for lane in ("interactive", "bulk"))


def test_running_out_of_memory_lowers_the_budget_and_splits(server: ServerProcess) -> None:
    splits = server.metric("llm2vec_oom_splits_total")
    texts = [f"{OUT_OF_MEMORY_IN_COMPANY} number {number} " + "the river " * 40 for number in range(24)]
    assert server.embed(texts).status_code == 200
    assert server.metric("llm2vec_oom_splits_total") > splits
    assert server.metric("llm2vec_token_budget") < 8192
    assert server.metric("llm2vec_oom_total") > 0


@pytest.mark.parametrize("several", [False, True])
def test_a_device_that_hangs_ends_the_server_and_everybody_is_told(
    encoder: Path, crowd: list[Asked], several: bool
) -> None:
    running = start(encoder, {**(SEVERAL if several else {}), "LLM2VEC_STUCK_BATCH_SECONDS": "2"})
    with running, ThreadPoolExecutor(1) as pool:
        if several:
            verdicts = ask_all(running, crowd)
            assert verdicts == {"ok": len(crowd)}
        hung = pool.submit(running.embed, f"{HANGS} for ever")
        running.eventually(lambda: running.metric("llm2vec_inflight_requests") >= 2)
        verdicts = ask_all(running, crowd[:40], clients=40)
        assert set(verdicts) <= {"ok", "refused", "never accepted"}, verdicts
        assert hung.result().status_code == 503
        assert running.process.wait(30) == 1
    assert any("hangs" in record["message"] for record in running.records() if record["level"] == "critical")


@pytest.mark.parametrize("several", [False, True])
def test_a_device_that_refuses_everything_ends_the_server_and_everybody_is_told(
    encoder: Path, crowd: list[Asked], several: bool
) -> None:
    running = start(encoder, SEVERAL if several else {})
    with running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all, running, crowd)
        running.eventually(lambda: running.metric("llm2vec_inflight_requests") >= 10)
        assert running.embed(REFUSES_FROM_NOW_ON).status_code == 503
        verdicts = asked.result()
        assert running.process.wait(30) == 1
    assert set(verdicts) <= {"ok", "refused", "never accepted"}, verdicts
    assert verdicts["refused"] > 0
    fatal = [record["message"] for record in running.records() if record["level"] == "critical"]
    assert any("can't compute any more" in message for message in fatal)


def test_an_engine_that_is_silent_ends_the_server(encoder: Path) -> None:
    running = start(encoder, {**SEVERAL, "LLM2VEC_STUCK_BATCH_SECONDS": "2"})
    with running, ThreadPoolExecutor(8) as pool:
        found = children(running)
        stopped = next(pid for pid, module in found.items() if module == MODULE)
        os.kill(stopped, signal.SIGSTOP)
        asked = [pool.submit(running.embed, f"text {number}") for number in range(8)]
        statuses = [one.result().status_code for one in asked]
        assert set(statuses) <= {200, 503}
        assert 503 in statuses
        assert running.process.wait(60) == 1
        assert all_end(list(found))


def test_a_start_that_hangs_ends_the_server(encoder: Path) -> None:
    running = start(encoder, {"FAULTS_HANG_START": "1", "LLM2VEC_START_SECONDS": "1"})
    port = running.wait_for("listening")["port"]
    assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 503
    assert running.process.wait(30) == 1
    running.stop()
    assert any("loading and warm-up took over" in line for line in running.lines)


@pytest.mark.parametrize("several", [False, True])
def test_sigterm_while_loading_waits_for_nothing(encoder: Path, several: bool) -> None:
    running = start(encoder, {"FAULTS_HANG_START": "1", **(SEVERAL if several else {})})
    running.wait_for("listening")
    time.sleep(2)  # for the processes to begin
    assert running.stop(seconds=20) == 0


@pytest.mark.parametrize("several", [False, True])
def test_sigterm_under_load_with_faults(encoder: Path, crowd: list[Asked], several: bool) -> None:
    """Whoever has a connection gets the right answer, or is told that there is none."""
    running = start(encoder, SEVERAL if several else {})
    with running, ThreadPoolExecutor(1) as pool:
        pids = list(children(running))
        asked = pool.submit(ask_all, running, crowd)
        running.eventually(lambda: running.metric("llm2vec_inputs_total") >= 20)
        running.process.terminate()
        verdicts = asked.result()
        assert running.process.wait(60) == 0
        assert alive(pids) == []
    assert set(verdicts) <= {"ok", "refused", "never accepted"}, verdicts
    assert verdicts["ok"] >= 5


def test_sigterm_leaves_nobody_without_an_answer_who_has_begun_to_ask(encoder: Path) -> None:
    """Here they send the end of their requests when the port is closed already."""
    running = start(encoder)
    whole = post(b'{"input": "a"}')
    parts = [whole[:cut] for cut in (5, whole.index(b"\r\n\r\n"), whole.index(b"{"), len(whole) - 1)]
    with running:
        clients = [connect(running) for _ in parts]
        for client, part in zip(clients, parts, strict=True):
            client.sendall(part)
        assert httpx.get(f"{running.base_url}/livez").status_code == 200  # all that is read by now
        running.process.terminate()
        running.eventually(lambda: port_is_closed(running))
        for client, part in zip(clients, parts, strict=True):
            client.sendall(whole[len(part) :])
        # Those of which the header had come were let in before.
        assert [status_of(answer_of(client)) for client in clients] == [503, 503, 200, 200]
        assert running.process.wait(60) == 0
    for client in clients:
        client.close()


def port_is_closed(server: ServerProcess) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(server.base_url.rpartition(":")[2]))) != 0


def test_sigkill_under_load_and_the_next_start(encoder: Path, crowd: list[Asked]) -> None:
    """Nobody gets a wrong answer, and nothing is left that the next start trips over."""
    running = start(encoder, {"FAULTS_SHARE": "0.2"})
    with running:
        ender = threading.Timer(0.4, lambda: running.process.kill())
        ender.start()
        verdicts = ask_all(running, crowd)
    assert set(verdicts) <= {"ok", "gone", "never accepted"}, verdicts
    with start(encoder) as again:
        assert ask_all(again, crowd[:20]) == {"ok": 20}


def test_a_stopped_server_does_not_wait_for_a_device_that_hangs(encoder: Path) -> None:
    running = start(encoder, {"LLM2VEC_SHUTDOWN_GRACE_SECONDS": "1"})
    with running, ThreadPoolExecutor(1) as pool:
        hung = pool.submit(running.embed, f"{HANGS} for ever")
        running.eventually(lambda: running.metric("llm2vec_inflight_requests") >= 2)
        began = time.monotonic()
        running.process.terminate()
        assert running.process.wait(40) == 1
        assert time.monotonic() - began < 30
        assert hung.result().status_code == 503
        assert "the server stopped" in hung.result().json()["error"]["message"]
