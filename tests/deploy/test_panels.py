"""Each panel and each alert, asked of a real Prometheus that scrapes a real server under traffic with faults."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.deploy.monitoring import NO_PROMETHEUS, Prometheus, Query, queries, rules, with_values
from tests.e2e.process import ServerProcess
from tests.faults.faulty_server import NOT_FINITE, OUT_OF_MEMORY, RAISES
from tests.tiny import build_tiny

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason=NO_PROMETHEUS),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs several processes"),
    pytest.mark.timeout(300),
]

KEY = "of-the-metrics"
VARIABLES = {"__rate_interval": "30s", "job": "llm2vec", "instance": ".*"}

# Two front ends and an engine, on a device slow enough that some of the traffic finds no room.
SETTINGS = {
    "LLM2VEC_DEVICE": "cpu",
    "LLM2VEC_FRONTENDS": "2",
    "LLM2VEC_DTYPE": "float32",
    "LLM2VEC_METRICS_KEY": KEY,
    "LLM2VEC_MAX_QUEUED_TOKENS": "2000",
    "LLM2VEC_BATCH_TOKENS": "512",
    "LLM2VEC_CACHE_BYTES": "1000000",
    "FAULTS_TOKENS_PER_SECOND": "2000",
}

# At least, each client so many turns of it: a rate needs more than one scrape that found a series.
TRAFFIC_SECONDS = 20.0
TURNS = 5
CLIENTS = 12


def drive(server: ServerProcess) -> Counter[int]:
    """Queries, bulk, texts that are cut, faults and clients that hang up; the answers' status codes."""

    def ask(client: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        with httpx.Client() as http:
            turn = 0
            while turn < TURNS or time.monotonic() < end:
                turn += 1
                bulk = [f"{client} {turn} {number} " + "the river ran past the mill " * 3 for number in range(16)]
                mark = (RAISES, NOT_FINITE, OUT_OF_MEMORY)[(client + turn) % 3]
                for texts, more in (
                    (["A plane is taking off."], {}),
                    (["A plane is taking off.", f"query {client} {turn}"], {"input_type": "query"}),
                    (bulk, {}),
                    (["a " * 2000], {"truncate": True}),
                    ([f"{mark} {client} {turn}"], {}),
                ):
                    statuses[server.embed(texts, http, **more).status_code] += 1
            try:
                http.post(f"{server.base_url}/v1/embeddings", json={"input": bulk}, timeout=0.01)
            except httpx.TimeoutException:
                statuses[0] += 1
        return statuses

    end = time.monotonic() + TRAFFIC_SECONDS
    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(ask, range(CLIENTS)), Counter())


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    store, folder = tmp_path_factory.mktemp("store") / "tiny", tmp_path_factory.mktemp("prometheus")
    build_tiny(store, "gemma3_text", query_instruction="Find:")
    with ServerProcess(store, SETTINGS, module="tests.faults.faulty_server") as server:
        assert httpx.get(f"{server.base_url}/metrics").status_code == 401
        with Prometheus(folder, server.base_url.removeprefix("http://"), KEY) as running:
            running.until('llm2vec_ready{job="llm2vec"} == 1')
            assert server.embed("a " * 2000).status_code == 400
            statuses = drive(server)
            assert {200, 429, 500, 503} <= set(statuses), statuses
            yield running


def test_every_panel_has_data(prometheus: Prometheus) -> None:
    without: list[Query] = []
    for query in queries():
        values = prometheus.values(with_values(query.expr, VARIABLES), query.instant)
        if not any(values.values()):
            without.append(query)
    assert [query for query in without if not query.needs_gpu] == []
    assert {query.panel for query in queries() if query.needs_gpu} == {"GPU memory"}


def test_the_figures_are_those_of_the_traffic(prometheus: Prometheus) -> None:
    def shown(panel: str) -> dict[str, list[float]]:
        query = next(one for one in queries() if one.panel == panel)
        return prometheus.values(with_values(query.expr, VARIABLES), query.instant)

    assert set(shown("Requests by status")) >= {f'{{"status": "{status}"}}' for status in (200, 400, 429, 500, 503)}
    (failed,) = shown("Failed").values()
    assert 0.05 < max(failed) < 0.95
    # No batch holds more than the budget, and the device computes no faster than it was told to.
    computed = max(max(values) for values in shown("Tokens computed a second").values())
    assert 100 < computed < 2500


def test_every_alert_can_be_evaluated(prometheus: Prometheus) -> None:
    prometheus.until("ALERTS")
    evaluated = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in evaluated] == [rule["alert"] for rule in rules()]
    assert [(rule["name"], rule.get("lastError")) for rule in evaluated if rule["health"] != "ok"] == []
    for rule in rules():
        prometheus.get("query", query=rule["expr"])


def test_the_alerts_that_wait_for_nothing_fire_by_now(prometheus: Prometheus) -> None:
    prometheus.until('ALERTS{alertname="Llm2vecBatchFailures"}')
    firing = prometheus.firing()
    assert {"Llm2vecOutOfMemory", "Llm2vecNotFinite", "Llm2vecBatchFailures"} <= firing
    assert not firing & {"Llm2vecDown", "Llm2vecAbsent", "Llm2vecNotReady", "Llm2vecRestarts", "Llm2vecBatchStuck"}
