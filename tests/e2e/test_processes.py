"""A real server of two front ends and two engines, beside one that is a single process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from service.processes.supervisor import ENGINE, FRONT_END
from tests.e2e.process import ServerProcess

FLOAT32 = ("--dtype", "float32")
SEVERAL = {"LLM2VEC_FRONTENDS": "2", "LLM2VEC_DEVICE": "cpu,cpu"}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.fixture(scope="module")
def server(encoder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(encoder, SEVERAL, *FLOAT32) as running:
        yield running


def vectors(answer: httpx.Response) -> NDArray[np.float32]:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


def crowd() -> list[list[str]]:
    """Requests of a second or two in all, each small enough to be one engine's."""
    return [[f"request {i} input {j} " + "the river " * 40 for j in range(20)] for i in range(48)]


def children(server: ServerProcess) -> dict[int, str]:
    """The module that each child of the server runs, by its process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):  # has ended meanwhile
                continue
            if parent == server.process.pid and "-m" in command:
                found[int(entry.name)] = command[command.index("-m") + 1]
    return found


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that run still; what is dead but not waited for does not."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    return [pid for pid in pids if runs(pid)]


def all_end(pids: list[int], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pids)


def test_the_processes_are_what_was_asked_for(server: ServerProcess) -> None:
    assert sorted(children(server).values()) == [ENGINE] * 2 + [FRONT_END] * 2
    assert {"front_ends": 2, "engines": 2}.items() <= server.wait_for("ready").items()


def test_front_ends_and_the_supervisor_hold_no_torch(server: ServerProcess) -> None:
    pids = [pid for pid, module in children(server).items() if module == FRONT_END]
    for pid in [server.process.pid, *pids]:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_vectors_are_those_of_a_server_of_one_process(server: ServerProcess, encoder: Path) -> None:
    many = [f"text number {number}, {'long ' * (number % 17)}" for number in range(700)]
    with ServerProcess(encoder, {"LLM2VEC_DEVICE": "cpu"}, *FLOAT32) as single:
        assert children(single) == {}
        for texts in (["A plane is taking off."], ["Größe 東京 🙂", "a"], many):
            for fields in ({}, {"input_type": "query"}, {"dimensions": 7}):
                both = [vectors(one.embed(texts, **fields)) for one in (server, single)]
                assert np.abs(both[0] - both[1]).max() < 1e-5
        assert httpx.get(f"{server.base_url}/version").json() == httpx.get(f"{single.base_url}/version").json()
        for bad in ("", ["a", " "], [1], "x " * 2000):
            answers = [one.embed(bad) for one in (server, single)]  # type: ignore[arg-type]
            assert answers[0].status_code == answers[1].status_code == 400
            assert answers[0].json() == answers[1].json()


def test_any_page_of_metrics_has_all_that_happened(server: ServerProcess) -> None:
    names = {
        "llm2vec_inputs_total": 160,
        "llm2vec_batch_inputs_sum": 160,
        'llm2vec_requests_total{code="",route="/v1/embeddings",status="200"}': 40,
        'llm2vec_request_duration_seconds_count{class="interactive",route="/v1/embeddings"}': 40,
        'llm2vec_instruction_inputs_total{source="none"}': 160,
    }
    assert server.embed("a").status_code == 200  # a series begins with what it counts
    before = {name: server.metric(name) for name in names}

    def embed_four(number: int) -> None:
        assert server.embed([f"{number} is one of {other}" for other in range(4)]).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(embed_four, range(40)))
    for _ in range(8):  # whichever front end is asked
        assert {name: server.metric(name) - before[name] for name in names} == names
    assert server.metric("llm2vec_ready") == 1
    assert server.metric("llm2vec_queue_tokens") == 0


def test_a_taken_port_refuses_to_start(server: ServerProcess, encoder: Path) -> None:
    port = server.base_url.rpartition(":")[2]
    for settings in (SEVERAL, {}):
        other = ServerProcess(encoder, settings, "--port", port)
        assert other.process.wait(60) == 1
        other.stop()
        assert "LLM2VEC_PORT" in "\n".join(other.lines)
    assert server.embed("a").status_code == 200


def test_a_device_that_is_not_here_refuses_to_start(encoder: Path) -> None:
    for device, hint in (("cpu,cuda:77", "LLM2VEC_DEVICE=cpu"), ("cpu,gpu", "no device"), ("cpu,", "no device")):
        other = ServerProcess(encoder, {"LLM2VEC_DEVICE": device})
        assert other.process.wait(60) == 1
        other.stop()
        assert hint in "\n".join(other.lines)
        assert "Traceback" not in "\n".join(other.lines)


def test_one_device_and_one_front_end_are_one_process(encoder: Path) -> None:
    with ServerProcess(encoder, {"LLM2VEC_FRONTENDS": "2", "LLM2VEC_DEVICE": "cpu"}, *FLOAT32) as several:
        assert sorted(children(several).values()) == [ENGINE, FRONT_END, FRONT_END]
        assert several.embed("a").status_code == 200
        pids = list(children(several))
        assert several.stop(signal.SIGINT) == 0
        assert alive(pids) == []


def test_sigterm_answers_what_was_accepted_and_ends_with_0(encoder: Path) -> None:
    running = ServerProcess(encoder, SEVERAL, *FLOAT32)
    with running, httpx.Client() as client, ThreadPoolExecutor(48) as pool:
        pids = list(children(running))
        texts = crowd()
        futures = [pool.submit(running.embed, batch, client) for batch in texts]
        running.eventually(lambda: running.metric("llm2vec_inflight_requests") >= 10)
        assert running.stop() == 0
        assert alive(pids) == []
        answered = 0
        for batch, future in zip(texts, futures, strict=True):
            try:
                answer = future.result()
            except httpx.ConnectError:
                continue  # was never accepted
            if answer.status_code == 503:
                continue  # arrived while it was draining, and was told so
            answered += 1
            assert vectors(answer).shape == (len(batch), 64)
        assert answered >= 9
    assert not [record for record in running.records() if record["level"] in ("error", "critical")]


@pytest.mark.parametrize("module", [ENGINE, FRONT_END])
def test_a_process_that_dies_ends_the_server(encoder: Path, module: str) -> None:
    running = ServerProcess(encoder, SEVERAL, *FLOAT32)
    with running, httpx.Client() as client, ThreadPoolExecutor(48) as pool:
        found = children(running)
        texts = crowd()
        futures = [pool.submit(running.embed, batch, client) for batch in texts]
        running.eventually(lambda: running.metric("llm2vec_inflight_requests") >= 10)
        os.kill(next(pid for pid, runs in found.items() if runs == module), signal.SIGKILL)
        assert running.process.wait(60) == 1
        assert all_end(list(found))
        outcomes = []
        for future in futures:
            try:
                outcomes.append(future.result().status_code)
            except httpx.TransportError:
                outcomes.append(0)  # its front end died, or it was never accepted
    assert set(outcomes) <= {200, 503, 0}
    if module == ENGINE:
        assert 503 in outcomes
        assert 200 in outcomes  # what the other engine had
    else:
        assert 200 in outcomes  # what the other front end had
    fatal = [record["message"] for record in running.records() if record["level"] == "critical"]
    assert any("ended by itself with status -9" in message for message in fatal)


@pytest.mark.parametrize("early", [False, True])
def test_a_supervisor_that_is_killed_leaves_no_process(encoder: Path, early: bool) -> None:
    running = ServerProcess(encoder, SEVERAL, *FLOAT32)
    running.wait_for("listening" if early else "ready")
    running.eventually(lambda: len(children(running)) == 4)
    pids = list(children(running))
    running.stop(signal.SIGKILL)
    assert all_end(pids)


def test_a_kernel_that_can_not_serve_ends_the_server_with_the_way_out(encoder: Path) -> None:
    running = ServerProcess(encoder, {**SEVERAL, "LLM2VEC_ATTENTION": "torch-flash"})
    assert running.process.wait(60) == 1
    running.stop()
    assert "LLM2VEC_ATTENTION=auto" in "\n".join(running.lines)


def test_it_stops_while_it_loads(encoder: Path) -> None:
    running = ServerProcess(encoder, SEVERAL, *FLOAT32)
    running.eventually(lambda: ENGINE in children(running).values())
    pids = list(children(running))
    assert running.stop() == 0
    assert alive(pids) == []


def test_devices_printed_one_a_line() -> None:
    command = [sys.executable, "-m", "service.processes.devices", "cpu", "cpu"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["cpu", "cpu"]
