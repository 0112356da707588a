"""Cohere's own SDK, both of its APIs."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from service.embedding.vector_dtypes import quantize_vectors
from tests.clients.vectors import PASSAGES, QUERY, QUESTION, assert_same, reference
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TYPES = ["float", "int8", "ubinary", "binary", "base64"]


@pytest.fixture(params=["Client", "ClientV2"])
def client(demo: ServerProcess, request: pytest.FixtureRequest) -> Any:
    import cohere

    return getattr(cohere, request.param)("none", base_url=demo.base_url)


def embed(client: Any, texts: list[str], input_type: str, **options: Any) -> Any:
    return client.embed(texts=texts, model="demo", input_type=input_type, **options)


def test_queries_and_documents(demo: ServerProcess, client: Any) -> None:
    query = embed(client, [QUESTION], "search_query", embedding_types=["float"])
    assert_same(query.embeddings.float_, reference(demo, QUESTION, instruction=QUERY))
    documents = embed(client, PASSAGES, "search_document", embedding_types=["float"], truncate="END")
    assert_same(documents.embeddings.float_, reference(demo, PASSAGES))
    assert documents.texts == PASSAGES
    assert documents.id
    assert documents.meta.billed_units.input_tokens > 10


@pytest.mark.parametrize("input_type", ["classification", "clustering"])
def test_input_types_that_are_neither_queries_nor_documents(demo: ServerProcess, client: Any, input_type: str) -> None:
    found = embed(client, PASSAGES, input_type, embedding_types=["float"])
    assert_same(found.embeddings.float_, reference(demo, PASSAGES, input_type=input_type))


def test_all_types_at_once(demo: ServerProcess, client: Any) -> None:
    found = embed(client, PASSAGES, "search_document", embedding_types=TYPES).embeddings
    assert_same(found.float_, reference(demo, PASSAGES))
    # The other types are of the same request, so they are of the very same vectors on any CPU.
    plain = np.array(found.float_, np.float32)
    np.testing.assert_array_equal(found.int8, quantize_vectors(plain, "int8"), err_msg="int8")
    bits = np.packbits(plain > 0, axis=1)
    np.testing.assert_array_equal(found.ubinary, bits, err_msg="ubinary")
    np.testing.assert_array_equal(found.binary, bits.astype(int) - 128, err_msg="binary")
    assert [base64.b64decode(text) for text in found.base64] == [row.astype("<f4").tobytes() for row in plain]


def test_without_types_the_first_api_answers_with_a_list_and_the_second_with_floats_by_type(
    demo: ServerProcess, client: Any
) -> None:
    answer = embed(client, PASSAGES, "search_document")
    found = answer.embeddings if isinstance(answer.embeddings, list) else answer.embeddings.float_
    assert_same(found, reference(demo, PASSAGES))


def test_more_texts_than_the_client_sends_at_once(demo: ServerProcess, client: Any) -> None:
    texts = [f"text {number}" for number in range(100)]
    found = embed(client, texts, "search_document", embedding_types=["float"])
    assert_same(found.embeddings.float_, reference(demo, texts))
    assert found.texts == texts


def test_the_second_api_s_inputs_and_dimension(demo: ServerProcess) -> None:
    import cohere

    client = cohere.ClientV2("none", base_url=demo.base_url)
    inputs: Any = [{"content": [{"type": "text", "text": text}]} for text in PASSAGES]
    answer = client.embed(inputs=inputs, model="demo", input_type="search_document", output_dimension=64)
    assert_same(answer.embeddings.float_, reference(demo, PASSAGES, dimensions=64))


def test_errors_keep_their_kind(client: Any) -> None:
    import cohere

    with pytest.raises(cohere.NotFoundError, match="gpt-9"):
        client.embed(texts=["a"], model="gpt-9", input_type="search_document")
    with pytest.raises(cohere.BadRequestError, match="poem"):
        client.embed(texts=["a"], model="demo", input_type="poem")
