"""LlamaIndex: OpenAI-like embeddings with an alias on the retriever, and text-embeddings-inference."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.vectors import (
    COSINE_TOLERANCE,
    PASSAGES,
    QUERY,
    QUESTION,
    SEPARATOR,
    TEXTS,
    assert_same,
    reference,
)
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def openai_like(server: ServerProcess, model: str, **options: Any) -> Any:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    return OpenAILikeEmbedding(model_name=model, api_base=f"{server.base_url}/v1", api_key="none", **options)


def tei(server: ServerProcess, **options: Any) -> Any:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    return TextEmbeddingsInference(model_name="demo", base_url=server.base_url, **options)


def test_an_index_whose_retriever_has_the_query_alias_answers_a_question(demo: ServerProcess) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    nodes = [TextNode(text=text) for text in TEXTS]
    index = VectorStoreIndex(nodes, embed_model=openai_like(demo, "demo"))
    stored = index.vector_store.to_dict()["embedding_dict"]
    assert_same([stored[node.node_id] for node in nodes], reference(demo, TEXTS))

    queries = openai_like(demo, "demo:query")
    assert_same(queries.get_query_embedding(QUESTION), reference(demo, QUESTION, instruction=QUERY))
    found = index.as_retriever(embed_model=queries, similarity_top_k=3).retrieve(QUESTION)
    assert found[0].node.get_content() == PASSAGES[0]
    cosine = reference(demo, QUESTION, instruction=QUERY)[0] @ stored[nodes[0].node_id]
    assert found[0].score == pytest.approx(cosine, abs=COSINE_TOLERANCE)


def test_openai_embeddings_that_are_told_the_url_alone(demo: ServerProcess) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    untouched = OpenAIEmbedding(api_base=f"{demo.base_url}/v1", api_key="none")
    assert_same(untouched.get_text_embedding_batch(PASSAGES), reference(demo, PASSAGES))


def test_an_instruction_in_additional_fields(demo: ServerProcess) -> None:
    queries = openai_like(demo, "demo", additional_kwargs={"extra_body": {"instruction": QUERY}})
    assert_same(queries.get_query_embedding(QUESTION), reference(demo, QUESTION, instruction=QUERY))


def test_text_embeddings_inference(demo: ServerProcess) -> None:
    embeddings = tei(demo)
    assert_same(embeddings.get_text_embedding_batch(TEXTS), reference(demo, TEXTS))
    assert_same(embeddings.get_query_embedding(QUESTION), reference(demo, QUESTION))


def test_text_embeddings_inference_with_its_own_query_instruction(demo: ServerProcess) -> None:
    """It puts text before text; the separator says where one ends."""
    embeddings = tei(demo, query_instruction=f"{QUERY}{SEPARATOR.rstrip()}")
    assert_same(embeddings.get_query_embedding(QUESTION), reference(demo, QUESTION, instruction=QUERY))
    assert_same(embeddings.get_text_embedding(QUESTION), reference(demo, QUESTION))


async def test_text_embeddings_inference_asynchronously(demo: ServerProcess) -> None:
    assert_same(await tei(demo).aget_text_embedding_batch(PASSAGES), reference(demo, PASSAGES))
