"""Haystack's OpenAI embedders, one model name for questions and one for documents."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.vectors import PASSAGES, QUERY, QUESTION, SEPARATOR, assert_same, reference
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def embedders() -> Any:
    from haystack.components import embedders

    return embedders


def options(server: ServerProcess, model: str) -> dict[str, Any]:
    from haystack.utils import Secret

    return {"api_base_url": f"{server.base_url}/v1", "api_key": Secret.from_token("none"), "model": model}


def test_questions_by_alias(demo: ServerProcess) -> None:
    found = embedders().OpenAITextEmbedder(**options(demo, "demo:query")).run(QUESTION)
    assert_same(found["embedding"], reference(demo, QUESTION, instruction=QUERY))
    assert found["meta"]["usage"]["prompt_tokens"] > 10


def test_questions_by_prefix(demo: ServerProcess) -> None:
    embedder = embedders().OpenAITextEmbedder(**options(demo, "demo"), prefix=QUERY + SEPARATOR)
    assert_same(embedder.run(QUESTION)["embedding"], reference(demo, QUESTION, instruction=QUERY))


def test_documents(demo: ServerProcess) -> None:
    from haystack.dataclasses import Document

    embedder = embedders().OpenAIDocumentEmbedder(**options(demo, "demo"), progress_bar=False, raise_on_failure=True)
    documents = embedder.run([Document(content=text) for text in PASSAGES])["documents"]
    assert_same([document.embedding for document in documents], reference(demo, PASSAGES))
