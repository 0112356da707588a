"""A real server whose device fails in every way we know, under load: each request gets its own answer or an error."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.test_processes import SEVERAL, alive, all_end, children
from tests.faults.crowd import Asked, ask_all, make_requests
from tests.faults.faulty_server import HANGS, NOT_FINITE, OUT_OF_MEMORY, OUT_OF_MEMORY_IN_COMPANY, RAISES
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


def test_sigterm_under_load_with_faults(encoder: Path, crowd: list[Asked]) -> None:
    """Whoever's connection was accepted gets the right answer; one that waited to be, when the port closed, none."""
    running = start(encoder, SEVERAL)
    with running:
        pids = list(children(running))
        ender = threading.Timer(random.Random(0).uniform(0.2, 0.6), lambda: running.process.terminate())
        ender.start()
        verdicts = ask_all(running, crowd)
        assert running.process.wait(60) == 0
        assert alive(pids) == []
    assert set(verdicts) <= {"ok", "refused", "never accepted", "gone"}, verdicts
    assert verdicts["ok"] >= 5


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
        with suppress(httpx.TransportError):  # the grace period is over
            assert hung.result().status_code in (500, 503)
