"""As many texts as clients send in one request, over a tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.vectors import assert_close, reference
from tests.e2e.process import ServerProcess


def openai_client(server: ServerProcess) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def test_2048_texts_from_openai_and_not_one_more(tiny: ServerProcess) -> None:
    import openai

    texts = [f"n {number}" for number in range(2048)]
    with openai_client(tiny) as client:
        answer = client.embeddings.create(model="any", input=texts)
        assert [item.index for item in answer.data] == list(range(2048))
        assert_close([item.embedding for item in answer.data], reference(tiny, texts))
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="any", input=["a"] * 2049)
    assert caught.value.code == "too_many_inputs"


def test_1000_texts_from_langchain_as_token_ids_one_of_them_empty(tiny: ServerProcess) -> None:
    from langchain_openai import OpenAIEmbeddings

    texts = [f"n {number} 🙂" if number != 500 else "" for number in range(1000)]
    requests = 'llm2vec_requests_total{code="",route="/v1/embeddings",status="200"}'
    before = tiny.metric(requests)
    embeddings = OpenAIEmbeddings(base_url=f"{tiny.base_url}/v1", api_key="none", model="any")
    found = embeddings.embed_documents(texts)
    assert tiny.metric(requests) == before + 2, "all the texts at once, and the empty one"
    assert_close(found, reference(tiny, texts))
    plain = embeddings.model_copy(update={"check_embedding_ctx_length": False})
    assert_close(found, plain.embed_documents(texts))
