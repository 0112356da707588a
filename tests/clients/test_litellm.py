"""LiteLLM, by the providers that can reach one's own server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.vectors import PASSAGES, QUERY, QUESTION, assert_same, reference
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def embedding(**options: Any) -> list[Any]:
    import litellm

    return [item["embedding"] for item in litellm.embedding(api_key="none", **options).data]


@pytest.mark.parametrize(
    ("model", "path"),
    [("openai/demo", "/v1"), ("hosted_vllm/demo", "/v1"), ("cohere/demo", "/v2/embed"), ("ollama/demo", "")],
)
def test_the_texts_vectors_by_every_provider(demo: ServerProcess, model: str, path: str) -> None:
    found = embedding(model=model, input=PASSAGES, api_base=demo.base_url + path)
    assert_same(found, reference(demo, PASSAGES))


@pytest.mark.parametrize(
    "options",
    [
        {"model": "openai/demo", "instruction": QUERY},
        {"model": "openai/demo", "input_type": "query"},
        {"model": "openai/demo:query"},
    ],
    ids=str,
)
def test_the_query_instruction(demo: ServerProcess, options: dict[str, Any]) -> None:
    found = embedding(input=[QUESTION], api_base=f"{demo.base_url}/v1", **options)
    assert_same(found, reference(demo, QUESTION, instruction=QUERY))


def test_cohere_s_query_type(demo: ServerProcess) -> None:
    url = f"{demo.base_url}/v2/embed"
    found = embedding(model="cohere/demo", input=[QUESTION], api_base=url, input_type="search_query")
    assert_same(found, reference(demo, QUESTION, instruction=QUERY))


def test_an_error_keeps_its_kind(demo: ServerProcess) -> None:
    import litellm

    with pytest.raises(litellm.NotFoundError, match="gpt-9"):
        embedding(model="openai/gpt-9", input=["a"], api_base=f"{demo.base_url}/v1", max_retries=0)
