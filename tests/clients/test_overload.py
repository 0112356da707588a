"""More than the server takes at once: clients that read Retry-After come again, the one that reads nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from tests.clients.vectors import assert_close
from tests.e2e.process import ServerProcess

CLIENTS = 6
LONG = "and the river ran past the mill " * 12

# A batch for each client, of a size that the queue can not take twice.
BATCHES = [[f"{client}.{number} {LONG}".strip() for number in range(10)] for client in range(CLIENTS)]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    settings = {"LLM2VEC_MAX_QUEUED_TOKENS": "2000", "LLM2VEC_OVERLOAD_WAIT_SECONDS": "50", "LLM2VEC_ANY_MODEL": "true"}
    with ServerProcess(tiny_model, settings, "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> list[Any]:
    """Each batch's vectors, asked for one after the other."""
    answers = [server.embed(batch) for batch in BATCHES]
    assert [answer.status_code for answer in answers] == [200] * CLIENTS, answers[0].text
    return [[item["embedding"] for item in answer.json()["data"]] for answer in answers]


def at_once(call: Any) -> list[Any]:
    """The results of one call for each batch, all begun together."""
    barrier = Barrier(CLIENTS)

    def begin(batch: list[str]) -> Any:
        barrier.wait(30)
        return call(batch)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(begin, BATCHES))


def test_so_many_at_once_are_too_many(server: ServerProcess, expected: list[Any]) -> None:
    with httpx.Client() as client:
        answers = at_once(lambda batch: server.embed(batch, client))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused, [answer.status_code for answer in answers]
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_openai_comes_again_when_it_is_told_to(server: ServerProcess, expected: list[Any]) -> None:
    import openai

    rejected = 'llm2vec_rejected_total{reason="overloaded"}'
    before = server.metric(rejected)
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=40) as client:
        answers = at_once(lambda batch: client.embeddings.create(model="any", input=batch))
    assert server.metric(rejected) > before
    for answer, vectors in zip(answers, expected, strict=True):
        assert_close([item.embedding for item in answer.data], vectors)


def test_openai_s_error_where_it_may_not_come_again(server: ServerProcess, expected: list[Any]) -> None:
    import openai

    def embed(batch: list[str]) -> openai.RateLimitError | None:
        try:
            client.embeddings.create(model="any", input=batch)
        except openai.RateLimitError as error:
            return error
        return None

    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        errors = [error for error in at_once(embed) if error]
    assert errors
    assert {error.code for error in errors} == {"overloaded"}
    assert all(error.request_id for error in errors)


def test_text_embeddings_inference_never_sees_the_overload(server: ServerProcess, expected: list[Any]) -> None:
    """LlamaIndex's client takes any answer for vectors."""
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    client = TextEmbeddingsInference(model_name="any", base_url=server.base_url)
    for found, vectors in zip(at_once(client.get_text_embedding_batch), expected, strict=True):
        assert_close(found, vectors)
