"""openai-python: what the largest part of all callers use, and what LangChain, Haystack and LiteLLM are built upon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.vectors import (
    PASSAGES,
    QUERY,
    QUESTION,
    TEXTS,
    Vectors,
    assert_different,
    assert_same,
    assert_same_but_for_arithmetic,
    reference,
)
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def client(demo: ServerProcess) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{demo.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def rows(answer: Any) -> list[Any]:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [item.embedding for item in answer.data]


def test_the_default_which_is_base64_equals_float(demo: ServerProcess, client: Any) -> None:
    default = rows(client.embeddings.create(model="demo", input=TEXTS))
    plain = rows(client.embeddings.create(model="demo", input=TEXTS, encoding_format="float"))
    assert_same(default, plain)
    assert_same(default, reference(demo, TEXTS))


def test_one_text_or_many(demo: ServerProcess, client: Any) -> None:
    assert_same(rows(client.embeddings.create(model="demo", input=QUESTION)), reference(demo, QUESTION))
    assert_same(rows(client.embeddings.create(model="demo", input=[QUESTION])), reference(demo, QUESTION))
    answer = client.embeddings.create(model="demo", input=PASSAGES)
    assert_same(rows(answer), reference(demo, PASSAGES))
    assert answer.object == "list"
    assert answer.model == "demo"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 20


def test_token_ids_are_openai_s(demo: ServerProcess, client: Any) -> None:
    import tiktoken

    ids = tiktoken.get_encoding("cl100k_base").encode_batch(TEXTS)
    assert_same(rows(client.embeddings.create(model="demo", input=ids)), reference(demo, TEXTS), "[[int]]")
    assert_same(rows(client.embeddings.create(model="demo", input=ids[0])), reference(demo, TEXTS[0]), "[int]")


def test_the_model_s_own_token_ids(demo: ServerProcess, client: Any, demo_encoder: Path) -> None:
    """Known by ids that cl100k_base lacks; or because the client says so."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_encoder / "tokenizer.json"))
    ids = [one.ids for one in tokenizer.encode_batch([*TEXTS, "東京の天気"], add_special_tokens=False)]
    assert max(map(max, ids)) > 100_276
    wanted = reference(demo, [*TEXTS, "東京の天気"])
    assert_same(rows(client.embeddings.create(model="demo", input=ids)), wanted)
    said = client.embeddings.create(model="demo", input=ids[:1], extra_body={"token_ids": "model"})
    assert_same(rows(said), wanted[:1])


def test_dimensions(demo: ServerProcess, client: Any) -> None:
    found = np.array(rows(client.embeddings.create(model="demo", input=PASSAGES, dimensions=64)), np.float32)
    assert_same(found, reference(demo, PASSAGES, dimensions=64))
    cut = reference(demo, PASSAGES)[:, :64]
    assert_same_but_for_arithmetic(found, cut / np.linalg.norm(cut, axis=1, keepdims=True))


@pytest.mark.parametrize(
    "options",
    [
        {"model": "demo", "extra_body": {"instruction": QUERY}},
        {"model": "demo", "extra_body": {"input_type": "query"}},
        {"model": "demo", "extra_headers": {"x-instruction": QUERY}},
        {"model": "demo", "extra_headers": {"x-input-type": "query"}},
        {"model": "demo:query"},
        {"model": "questions"},
    ],
    ids=str,
)
def test_every_way_to_the_query_instruction(demo: ServerProcess, client: Any, options: dict[str, Any]) -> None:
    asked: Vectors = reference(demo, QUESTION, instruction=QUERY)
    assert_different(asked, reference(demo, QUESTION))
    assert_same(rows(client.embeddings.create(input=QUESTION, **options)), asked)


@pytest.mark.parametrize("model", ["text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"])
def test_the_names_of_openai_s_models(demo: ServerProcess, client: Any, model: str) -> None:
    answer = client.embeddings.create(model=model, input=PASSAGES)
    assert_same(rows(answer), reference(demo, PASSAGES))
    assert answer.model == "demo"


def test_the_client_for_azure(demo: ServerProcess) -> None:
    import openai

    for model, instruction in (("text-embedding-3-small", ""), ("demo:query", QUERY)):
        with openai.AzureOpenAI(azure_endpoint=demo.base_url, api_key="none", api_version="2024-10-21") as client:
            found = rows(client.embeddings.create(model=model, input=PASSAGES))
        assert_same(found, reference(demo, PASSAGES, instruction=instruction))


async def test_the_asynchronous_client(demo: ServerProcess) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{demo.base_url}/v1", api_key="none") as client:
        assert_same(rows(await client.embeddings.create(model="demo", input=PASSAGES)), reference(demo, PASSAGES))


def test_a_bad_request_names_code_field_and_request(client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="demo", input="a", dimensions=0)
    assert caught.value.code == "invalid_dimensions"
    assert caught.value.param == "dimensions"
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="demo", input=[[2**31]])
    assert caught.value.code == "invalid_token_ids"
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="gpt-9", input="a")
    assert missing.value.code == "model_not_found"


def test_models(client: Any) -> None:
    assert client.models.list().data[0].id == "demo"
    assert client.models.retrieve("demo").id == "demo"
