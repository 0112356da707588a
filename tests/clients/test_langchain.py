"""LangChain's embeddings classes for OpenAI, NVIDIA, Cohere and Ollama, as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.vectors import (
    PASSAGES,
    QUERY,
    QUESTION,
    TEXTS,
    assert_different,
    assert_same,
    assert_same_but_for_arithmetic,
    reference,
)
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def openai_embeddings(server: ServerProcess, **options: Any) -> Any:
    from langchain_openai import OpenAIEmbeddings

    return OpenAIEmbeddings(base_url=f"{server.base_url}/v1", api_key="none", **{"model": "demo", **options})


def test_openai_embeddings_untouched_send_token_ids_and_get_the_texts_vectors(demo: ServerProcess) -> None:
    untouched = openai_embeddings(demo)
    assert untouched.check_embedding_ctx_length
    decoded = 'llm2vec_token_id_inputs_total{decoder="cl100k_base"}'
    before = demo.metric(decoded)
    found = untouched.embed_documents(TEXTS)
    assert demo.metric(decoded) == before + len(TEXTS)
    assert_same(found, reference(demo, TEXTS))
    assert_same(found, np.array(openai_embeddings(demo, check_embedding_ctx_length=False).embed_documents(TEXTS)))
    assert_same(untouched.embed_query("🙂"), reference(demo, "🙂"))


def test_openai_embeddings_that_are_told_the_url_alone(demo: ServerProcess) -> None:
    from langchain_openai import OpenAIEmbeddings

    untouched = OpenAIEmbeddings(base_url=f"{demo.base_url}/v1", api_key="none")
    assert_same(untouched.embed_documents(TEXTS), reference(demo, TEXTS))


def test_openai_embeddings_pieces_that_begin_inside_a_character(demo: ServerProcess) -> None:
    """What the client averages are the vectors of the pieces, each with U+FFFD where its bytes are no character."""
    import tiktoken

    text = "family: 👩‍👩‍👧, 東京"
    encoding = tiktoken.get_encoding("cl100k_base")
    ids = encoding.encode(text)
    pieces = [ids[start : start + 3] for start in range(0, len(ids), 3)]
    parts = [encoding.decode(piece, errors="replace") for piece in pieces]
    assert any("\ufffd" in part for part in parts)
    weights = np.array([len(piece) for piece in pieces])[:, None]
    mean = (reference(demo, parts).astype(np.float64) * weights).sum(0) / weights.sum()
    found = openai_embeddings(demo, embedding_ctx_length=3).embed_documents([text])[0]
    assert_same_but_for_arithmetic(found, mean / np.linalg.norm(mean))


def test_openai_embeddings_one_empty_text_in_a_corpus(demo: ServerProcess) -> None:
    found = openai_embeddings(demo).embed_documents([PASSAGES[0], "", PASSAGES[1]])
    assert_same(found, reference(demo, [PASSAGES[0], "", PASSAGES[1]]))


@pytest.mark.parametrize(
    "options",
    [
        {"model_kwargs": {"extra_body": {"instruction": QUERY}}},
        {"default_headers": {"x-instruction": QUERY}},
        {"model": "demo:query"},
    ],
    ids=str,
)
@pytest.mark.parametrize("checked", [True, False], ids=["token ids", "text"])
def test_openai_embeddings_with_the_query_instruction(
    demo: ServerProcess, options: dict[str, Any], checked: bool
) -> None:
    queries = openai_embeddings(demo, check_embedding_ctx_length=checked, **options)
    assert_same(queries.embed_query(QUESTION), reference(demo, QUESTION, instruction=QUERY))


def nvidia_embeddings(server: ServerProcess, **options: Any) -> Any:
    from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings

    return NVIDIAEmbeddings(base_url=f"{server.base_url}/v1", **options)


def test_nvidia_embeddings_tell_queries_from_documents(demo: ServerProcess) -> None:
    embeddings = nvidia_embeddings(demo, model="demo")
    query = embeddings.embed_query(QUESTION)
    assert_same(query, reference(demo, QUESTION, instruction=QUERY))
    assert_same(embeddings.embed_documents([QUESTION, *PASSAGES]), reference(demo, [QUESTION, *PASSAGES]))
    assert_different(query, np.array(embeddings.embed_documents([QUESTION])))


def test_nvidia_embeddings_find_the_model(demo: ServerProcess) -> None:
    with pytest.warns(UserWarning, match="Default model is set as: demo"):
        embeddings = nvidia_embeddings(demo)
    assert_same(embeddings.embed_documents(PASSAGES), reference(demo, PASSAGES))
    assert "demo" in [model.id for model in embeddings.available_models]


def test_nvidia_embeddings_do_not_cut_what_is_too_long_unless_told_to(demo: ServerProcess) -> None:
    with pytest.raises(Exception, match="maximum context length"):
        nvidia_embeddings(demo, model="demo").embed_query("the river " * 9000)


def test_cohere_embeddings_tell_queries_from_documents(demo: ServerProcess) -> None:
    from langchain_cohere import CohereEmbeddings

    embeddings = CohereEmbeddings(base_url=demo.base_url, model="demo", cohere_api_key="none")
    query = embeddings.embed_query(QUESTION)
    assert_same(query, reference(demo, QUESTION, instruction=QUERY))
    assert_same(embeddings.embed_documents([QUESTION, *PASSAGES]), reference(demo, [QUESTION, *PASSAGES]))
    assert_different(query, np.array(embeddings.embed_documents([QUESTION])))


def test_ollama_embeddings(demo: ServerProcess) -> None:
    from langchain_ollama import OllamaEmbeddings

    documents = OllamaEmbeddings(base_url=demo.base_url, model="demo", validate_model_on_init=True)
    assert_same(documents.embed_documents(PASSAGES), reference(demo, PASSAGES))
    queries = OllamaEmbeddings(base_url=demo.base_url, model="demo:query")
    assert_same(queries.embed_query(QUESTION), reference(demo, QUESTION, instruction=QUERY))
    small = OllamaEmbeddings(base_url=demo.base_url, model="demo", dimensions=64)
    assert_same(small.embed_documents(PASSAGES), reference(demo, PASSAGES, dimensions=64))
