"""A few seconds of the soak, or as many as `make soak` says; and that it sees what it looks for.

SOAK_SECONDS is how long it takes, SOAK_FRONTENDS how many processes speak HTTP, SOAK_FIGURES a file for its figures.
A long soak also times the event loop's turns and the growth of memory, of which a few seconds say nothing.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import uvloop

from tests.faults.crowd import Asked
from tests.faults.faulty_server import RAISES
from tests.faults.soak import MIX, Model, check_apart, failures, judge, make_traffic, soak, start
from tests.tiny import build_tiny

SECONDS = float(os.environ.get("SOAK_SECONDS", "6"))
FRONTENDS = int(os.environ.get("SOAK_FRONTENDS", "1"))
LONG = SECONDS >= 60

VECTORS = np.eye(2, 4, dtype=np.float32)
ASKED = Asked(["a", "b"], VECTORS)
FAILS = Asked(["a", f"{RAISES} b"], VECTORS, bad=1)
GOOD: dict[str, Any] = {
    "lost": 0,
    "wrong": {},
    "memory": {"growth": 0.04},
    "turns": {"longest_ms": 20.0},
    "before": {"files": 10, "threads": 5},
    "after": {"files": 11, "threads": 5, "queued_tokens": 0, "inflight": 0},
    "unexpected_errors": 0,
    "exit_status": 0,
}


@pytest.fixture
def cores() -> Iterator[list[int]]:
    """This process's cores, which it has again afterwards."""
    found = sorted(os.sched_getaffinity(0))
    yield found
    os.sched_setaffinity(0, found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.timeout(300 + 3 * SECONDS)
def test_everybody_gets_the_right_answer(tmp_path: Path, cores: list[int]) -> None:
    build_tiny(tmp_path / "tiny", "gemma3_text")
    queued_tokens, queries, bulk_requests = (40_000, 400, 60) if LONG else (10_000, 20, 8)
    model = Model(tmp_path / "tiny", 20_000.0, queued_tokens, queries, bulk_requests)
    traffic = make_traffic(model)
    if LONG:
        os.sched_setaffinity(0, cores[:-1] or cores)
    with start(model, FRONTENDS, {} if LONG else {"LLM2VEC_COMPILE": "off", "OMP_NUM_THREADS": "1"}) as server:
        if LONG:
            os.sched_setaffinity(0, cores[-1:])  # the clients', where there is more than one
        found = uvloop.run(soak(server, traffic, SECONDS))
        found["exit_status"] = server.stop()
        found["unexpected_errors"] = sum(record["message"] == "unexpected error" for record in server.records())
    if figures := os.environ.get("SOAK_FIGURES"):
        about = {"model": "tiny", "seconds": SECONDS, "frontends": FRONTENDS, "failures": failures(found)}
        Path(figures).write_text(json.dumps({**about, **found}))
    timed = {} if LONG else {name: GOOD[name] for name in ("turns", "memory")}
    assert failures({**found, **timed}) == []
    assert found["turns"]["longest_ms"] > 0
    together = found["phases"]["all together"]
    assert set(together["requests"]) <= set(MIX)
    assert together["answers"]["200"] > 20
    assert len(found["memory"]["series_mb"]) > 1
    assert min(found["memory"]["series_mb"]) > 50


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lost": 1}, "1 requests got no answer"),
        ({"wrong": {"bulk: wrong: another's vector": 2}}, "2 answers are wrong"),
        ({"turns": {"longest_ms": 50.1}}, "the event loop was at one turn for 50.1 ms"),
        ({"memory": {"growth": 0.051}}, "memory grew by 5.1%"),
        ({"after": {**GOOD["after"], "files": 20}}, "20 files are open, 10 were"),
        ({"after": {**GOOD["after"], "threads": 20}}, "20 threads run, 5 did"),
        ({"after": {**GOOD["after"], "queued_tokens": 7}}, "7 tokens are queued for nobody"),
        ({"after": {**GOOD["after"], "inflight": 1}}, "1 requests are left in work"),
        ({"unexpected_errors": 3}, "3 unexpected errors"),
        ({"exit_status": 1}, "the server ended with status 1"),
    ],
)
def test_what_must_not_be(change: dict[str, Any], says: str) -> None:
    assert failures(GOOD) == []
    assert failures({**GOOD, **change}) == [says]


def test_memory_is_judged_after_the_warm_up() -> None:
    rises_at_first = [100.0] * 8 + [200.0] * 56
    assert judge(rises_at_first)["growth"] == 0
    rises = [100.0 + place for place in range(64)]
    assert judge(rises)["growth"] == pytest.approx(159.5 / 111.5 - 1, abs=1e-4)


def test_two_texts_whose_vectors_are_all_but_equal_are_refused() -> None:
    check_apart(VECTORS)
    with pytest.raises(ValueError, match="differ by"):
        check_apart(np.stack([VECTORS[0], VECTORS[0] + 1e-6]))


def openai(vectors: Any, as_base64: bool = False) -> bytes:
    rows = [base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist() for row in vectors]
    return orjson.dumps({"data": [{"embedding": row} for row in rows]})


@pytest.mark.parametrize(
    ("asked", "status", "content", "begins"),
    [
        (ASKED, 200, openai(VECTORS), "ok"),
        (ASKED, 200, openai(VECTORS, as_base64=True), "ok"),
        (ASKED, 200, orjson.dumps(VECTORS.tolist()), "ok"),
        (ASKED, 200, openai(VECTORS[::-1]), "wrong: another's vector"),
        (ASKED, 200, openai(VECTORS[:1]), "wrong: (1, 4)"),
        (ASKED, 429, b'{"error": {"code": "overloaded"}}', "refused"),
        (ASKED, 429, b'{"error": "the server is overloaded", "error_type": "overloaded"}', "refused"),
        (ASKED, 503, b'{"error": {"code": "out_of_memory"}}', "wrong: status 503 out_of_memory"),
        (ASKED, 500, b'{"error": {"code": "encoding_failed"}}', "wrong: status 500"),
        (FAILS, 500, b'{"error": {"code": "encoding_failed", "message": "failed (input index 1)"}}', "ok"),
        (FAILS, 500, b'{"error": {"code": "encoding_failed", "message": "failed (input index 0)"}}', "wrong: 500"),
        (FAILS, 200, openai(VECTORS), "wrong: 200"),
        (FAILS, 429, b'{"error": {"code": "overloaded"}}', "refused"),
    ],
)
def test_answers_are_held_to_what_they_should_be(asked: Asked, status: int, content: bytes, begins: str) -> None:
    assert asked.verdict(status, content).startswith(begins)
