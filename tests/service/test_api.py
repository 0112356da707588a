"""The HTTP contract over a fake device: shapes, errors, headers, metrics."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.app import create_app, drain
from service.metrics import Metrics
from service.rows import EmbedRow
from service.settings import Limits, Settings
from tests.service.fakes import (
    BREAKS_THE_BATCH,
    NO_TOKENS,
    NOT_FINITE,
    OUT_OF_MEMORY,
    WIDTH,
    FakeTokenizer,
    FakeWorker,
    fake_manifest,
    fake_vector,
)

Answer = httpx.Response


class Server:
    """The application over fakes, in a test client."""

    def __init__(self, worker: FakeWorker | None = None, **given: Any) -> None:
        self.worker = worker or FakeWorker()
        self.fatal: list[BaseException] = []
        settings = Settings(**given)
        manifest = fake_manifest()
        self.metrics = Metrics()
        self.app: FastAPI = create_app(
            settings,
            manifest,
            FakeTokenizer(),
            Limits(settings, manifest, "cpu"),
            self.worker,
            self.metrics,
            self.fatal.append,
        )
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def embed(self, _headers: dict[str, str] | None = None, **body: Any) -> Any:
        return self.client.post("/v1/embeddings", json=body, headers=_headers)

    def metric(self, line: str) -> float:
        page = self.client.get("/metrics").text
        return float(next(row for row in page.splitlines() if row.startswith(line)).rpartition(" ")[2])


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.client:
        yield server


def vectors(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


def expected(text: str, instruction: str = "", dimensions: int | None = None) -> np.ndarray[Any, Any]:
    return fake_vector(EmbedRow(FakeTokenizer().encode_batch([text], [instruction])[0], dimensions or WIDTH))


def test_a_text_and_a_list_of_texts(server: Server) -> None:
    answer = server.embed(input="hello", model="fake")
    np.testing.assert_allclose(vectors(answer), [expected("hello")], rtol=1e-6)
    body = answer.json()
    assert body["object"] == "list"
    assert body["model"] == "fake"
    assert body["data"][0]["object"] == "embedding"
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6, "truncated_inputs": 0}
    texts = [f"text {i}" for i in range(150)]
    answer = server.embed(input=texts)
    np.testing.assert_allclose(vectors(answer), [expected(text) for text in texts], rtol=1e-6)
    assert [item["index"] for item in answer.json()["data"]] == list(range(150))


def test_base64_is_the_same_float32(server: Server) -> None:
    plain = vectors(server.embed(input=["a", "b"]))
    packed = server.embed(input=["a", "b"], encoding_format="base64").json()["data"]
    decoded = np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed])
    assert (plain == decoded).all()


def test_dimensions_are_cut_and_normalized_again(server: Server) -> None:
    np.testing.assert_allclose(vectors(server.embed(input="a", dimensions=3)), [expected("a", dimensions=3)], rtol=1e-6)
    np.testing.assert_allclose(vectors(server.embed(input="a", dimensions=WIDTH)), [expected("a")], rtol=1e-6)


def test_instructions(server: Server) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"instruction": "Classify:"}, "Classify:"),
        ({"input_type": "query"}, "Find:"),
        ({"input_type": "search_query"}, "Find:"),
        ({"input_type": "document"}, ""),
        ({"input_type": "passage"}, ""),
        ({"input_type": "query", "instruction": "Classify:"}, "Classify:"),
        ({"instruction": None, "input_type": None, "dimensions": None, "encoding_format": None, "user": None}, ""),
    ]
    for fields, instruction in cases:
        np.testing.assert_allclose(
            vectors(server.embed(input="a", **fields)), [expected("a", instruction)], rtol=1e-6, err_msg=str(fields)
        )
    assert server.metric('llm2vec_instruction_inputs_total{source="input_type"}') == 4


def test_the_server_can_have_its_own_query_instruction() -> None:
    with (server := Server(query_instruction="Look up:")).client:
        np.testing.assert_allclose(
            vectors(server.embed(input="a", input_type="query")), [expected("a", "Look up:")], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "message"),
    [
        ({"input": []}, 400, "empty_input", "input", "at least one"),
        ({"input": ["a", "  "]}, 400, "empty_input", "input", "index 1"),
        ({"input": ""}, 400, "empty_input", "input", "index 0"),
        ({}, 400, "invalid_input", "input", "text or a list of texts"),
        ({"input": 7}, 400, "invalid_input", "input", "text or a list"),
        ({"input": [1, 2]}, 400, "invalid_input", "input", "check_embedding_ctx_length=False"),
        ({"input": [[1, 2], [3]]}, 400, "invalid_input", "input", "token ids are not taken"),
        ({"input": ["a", None]}, 400, "invalid_input", "input", "text or a list"),
        ({"input": "a", "dimensions": 0}, 400, "invalid_dimensions", "dimensions", "1 to 8"),
        ({"input": "a", "dimensions": 9}, 400, "invalid_dimensions", "dimensions", "1 to 8"),
        ({"input": "a", "dimensions": "3"}, 400, "invalid_value", "dimensions", "integer"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format", "float"),
        ({"input": "a", "input_type": "poem"}, 400, "invalid_input_type", "input_type", "search_query"),
        ({"input": "a", "model": "gpt-9"}, 404, "model_not_found", "model", "fake"),
        ({"input": ["ok", "x" * 600]}, 400, "context_length_exceeded", "input", "maximum context length is 512 tokens"),
        ({"input": ["a"] * 2049}, 400, "too_many_inputs", "input", "at most 2048"),
        ({"input": ["a", NO_TOKENS]}, 400, "invalid_input", "input", "input index 1"),
        ({"input": ["a", NOT_FINITE]}, 500, "non_finite_embedding", None, "input index 1"),
        ({"input": ["a", OUT_OF_MEMORY, "b"]}, 503, "out_of_memory", None, "input index 1"),
        ({"input": [BREAKS_THE_BATCH]}, 500, "encoding_failed", None, "input index 0"),
    ],
)
def test_errors_have_openai_s_shape(
    server: Server, body: dict[str, Any], status: int, code: str, param: str | None, message: str
) -> None:
    answer = server.embed(**body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"]
    assert answer.headers["x-request-id"]


def test_other_errors_have_the_same_shape(server: Server) -> None:
    for answer, status, code in (
        (server.client.get("/v1/nothing"), 404, "not_found"),
        (server.client.get("/v1/embeddings"), 405, "method_not_allowed"),
        (server.client.post("/v1/embeddings", content=b"{"), 400, "invalid_json"),
        (server.client.post("/v1/embeddings", content=b"[1]"), 400, "invalid_json"),
        (server.client.post("/v1/embeddings", content=b"\xff\xfe"), 400, "invalid_json"),
        (server.client.get("/v1/models/other"), 404, "model_not_found"),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code


def test_a_body_that_is_too_large_is_refused_while_it_streams() -> None:
    with (server := Server(max_body_bytes=2000)).client:
        read: list[int] = []

        def endless() -> Iterator[bytes]:
            for number in range(1000):
                read.append(number)
                yield b"x" * 1000

        for content in (b"x" * 3000, endless()):
            answer = server.client.post("/v1/embeddings", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"


def test_too_many_tokens_in_one_request() -> None:
    with (server := Server(max_tokens_per_request=100)).client:
        answer = server.embed(input=["x" * 60, "x" * 60])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "request_too_large"


def test_unknown_fields_are_named_or_refused(server: Server) -> None:
    answer = server.embed(input="a", colour="red", shape=1)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "colour, shape"
    odd: dict[str, Any] = {"x\r\nset-cookie: a=b": 1, "größe": 2}
    answer = server.embed(input="a", **odd)
    assert answer.headers["x-ignored-fields"] == "gr??e, x??set-cookie:?a=b"
    assert "set-cookie" not in answer.headers
    with (strict := Server(reject_unknown_fields=True)).client:
        assert strict.embed(input="a", colour="red").json()["error"]["code"] == "unknown_field"


def test_headers_say_what_it_took(server: Server) -> None:
    answer = server.embed(input=["abc", "de"], _headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-compute-tokens"] == "7"
    assert answer.headers["x-embedding-space"] == fake_manifest().embedding_space
    for name in ("x-tokenization-time", "x-queue-time", "x-inference-time"):
        assert float(answer.headers[name]) >= 0
    assert server.embed(input="a", _headers={"x-request-id": "bad id\t"}).headers["x-request-id"] != "bad id\t"


def test_models(server: Server) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["fake"]
    assert listed["data"][0]["dimensions"] == WIDTH
    assert server.client.get("/v1/models/fake").json()["id"] == "fake"
    with (renamed := Server(served_name="org/mine")).client:
        assert renamed.client.get("/v1/models/org/mine").json()["id"] == "org/mine"
        assert renamed.embed(input="a", model="org/mine").status_code == 200


def test_operations(server: Server) -> None:
    for path in ("/livez", "/readyz", "/health", "/ping", "/version", "/docs", "/openapi.json"):
        assert server.client.get(path).status_code == 200, path
    assert "EmbeddingsBody" in json.dumps(server.client.get("/openapi.json").json()["paths"]["/v1/embeddings"])


def test_health_is_red_while_the_device_fails_and_green_again_after() -> None:
    worker = FakeWorker()
    with (server := Server(worker)).client:
        worker.broken = True
        assert server.embed(input="a").status_code == 500
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        worker.broken = False
        assert server.client.get("/readyz").status_code == 200


def test_a_worker_that_can_not_start_ends_the_process() -> None:
    worker = FakeWorker()
    worker.start_error = ValueError("no such device")
    with (server := Server(worker)).client:
        assert server.client.get("/readyz").status_code == 503
        assert server.embed(input="a").json()["error"]["code"] == "server_unavailable"
    assert [str(error) for error in server.fatal] == ["no such device"]


def test_draining_refuses_what_is_new(server: Server) -> None:
    drain(server.app)
    answer = server.embed(input="a")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert server.client.get("/readyz").status_code == 503
    assert server.metric("llm2vec_ready") == 0
    assert server.metric('llm2vec_rejected_total{reason="draining"}') == 1


def test_metrics_count_what_happened(server: Server) -> None:
    server.embed(input=["abc", "de"], instruction="Do:")
    server.embed(input="a", model="other")
    for line, value in {
        'llm2vec_requests_total{code="",route="/v1/embeddings",status="200"}': 1,
        'llm2vec_requests_total{code="model_not_found",route="/v1/embeddings",status="404"}': 1,
        "llm2vec_inputs_total": 2,
        'llm2vec_tokens_total{kind="text"}': 5,
        'llm2vec_tokens_total{kind="instruction"}': 10,
        'llm2vec_rejected_total{reason="invalid"}': 1,
        "llm2vec_queue_inputs": 0,
        "llm2vec_queue_tokens": 0,
        "llm2vec_ready": 1,
        "llm2vec_batch_inputs_sum": 2,
        "llm2vec_nonfinite_total": 0,
    }.items():
        assert server.metric(line) == value, line
    assert server.metric("llm2vec_build_info{") == 1


async def test_an_overloaded_server_says_when_to_come_again() -> None:
    worker = FakeWorker()
    worker.gate.clear()
    server = Server(worker, max_queued_tokens=20)
    transport = httpx.ASGITransport(server.app)
    async with (
        server.app.router.lifespan_context(server.app),
        httpx.AsyncClient(transport=transport, base_url="http://server") as client,
    ):
        await asyncio.sleep(0.01)
        accepted = []
        for text in ("computing", "waiting one"):
            accepted.append(asyncio.create_task(client.post("/v1/embeddings", json={"input": text})))
            await asyncio.sleep(0.05)
        refused = await client.post("/v1/embeddings", json={"input": "one too many"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000
        worker.gate.set()
        for task in accepted:
            assert (await task).status_code == 200
        assert (await client.post("/v1/embeddings", json={"input": "one too many"})).status_code == 200
    assert worker.batches == [["computing"], ["waiting one"], ["one too many"]]
