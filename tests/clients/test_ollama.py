"""Ollama's own SDK."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.vectors import PASSAGES, QUERY, QUESTION, assert_same, reference
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def client(demo: ServerProcess) -> Any:
    import ollama

    return ollama.Client(host=demo.base_url)


def test_embed(demo: ServerProcess, client: Any) -> None:
    assert_same(client.embed("demo", QUESTION).embeddings, reference(demo, QUESTION))
    answer = client.embed("demo", PASSAGES, truncate=True, options={"num_ctx": 8}, keep_alive="5m")
    assert_same(answer.embeddings, reference(demo, PASSAGES))
    assert answer.model == "demo"
    assert answer.prompt_eval_count > 10
    assert answer.total_duration > 0
    small = client.embed("demo", PASSAGES, dimensions=64)
    assert_same(small.embeddings, reference(demo, PASSAGES, dimensions=64))


def test_the_query_alias_and_the_usual_tag(demo: ServerProcess, client: Any) -> None:
    assert_same(client.embed("demo:query", QUESTION).embeddings, reference(demo, QUESTION, instruction=QUERY))
    assert_same(client.embed("demo:latest", QUESTION).embeddings, reference(demo, QUESTION), "demo:latest")


def test_the_older_embeddings_call(demo: ServerProcess, client: Any) -> None:
    assert_same(client.embeddings("demo", QUESTION).embedding, reference(demo, QUESTION))


def test_list(client: Any) -> None:
    assert client.list().models[0].model.partition(":")[0] == "demo"


def test_an_error_is_a_sentence(client: Any) -> None:
    import ollama

    with pytest.raises(ollama.ResponseError) as caught:
        client.embed("gpt-9", "a")
    assert caught.value.status_code == 404
    assert isinstance(caught.value.error, str)
    assert "gpt-9" in caught.value.error
