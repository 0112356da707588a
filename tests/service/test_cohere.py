"""Cohere's dialect over a fake device: both of its APIs, types, truncation, errors."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from service.server.app import drain
from tests.service.fakes import BREAKS_THE_BATCH, NO_TOKENS, NOT_FINITE, OUT_OF_MEMORY, WIDTH, Server, overloaded

TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
NULLS: dict[str, Any] = dict.fromkeys(
    (
        *("model", "texts", "inputs", "images", "input_type", "instruction", "embedding_types"),
        *("output_dimension", "max_tokens", "truncate", "priority"),
    )
)


def post(server: Server, path: str, _headers: dict[str, str] | None = None, **body: Any) -> Any:
    return server.client.post(path, json=body, headers=_headers)


def v2(server: Server, _headers: dict[str, str] | None = None, **body: Any) -> Any:
    return post(server, "/v2/embed", _headers, **{"input_type": "search_document", **body})


def reference(server: Server, texts: list[str], **body: Any) -> Any:
    """The vectors that OpenAI's dialect gives for the same."""
    answer = server.embed(input=texts, **body)
    assert answer.status_code == 200, answer.text
    return [item["embedding"] for item in answer.json()["data"]]


def test_the_first_api_answers_with_a_list_of_vectors(server: Server) -> None:
    answer = post(server, "/v1/embed", {"x-request-id": "mine-1"}, texts=["a", "bc"], model="fake")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "id": "mine-1",
        "response_type": "embeddings_floats",
        "texts": ["a", "bc"],
        "embeddings": reference(server, ["a", "bc"]),
        "meta": {"api_version": {"version": "1"}, "billed_units": {"input_tokens": 5}},
    }
    assert answer.headers["x-embedding-space"]
    assert answer.headers["x-truncated-inputs"] == "0"
    assert answer.headers["x-instruction-sha"] == "none"
    by_type = post(server, "/v1/embed", texts=["a"], embedding_types=["float"]).json()
    assert by_type["response_type"] == "embeddings_by_type"
    assert by_type["embeddings"] == {"float": reference(server, ["a"])}


def test_the_second_api_answers_by_type(server: Server) -> None:
    answer = v2(server, texts=["a", "bc"], model="fake").json()
    assert answer["id"]
    assert answer["response_type"] == "embeddings_by_type"
    assert answer["texts"] == ["a", "bc"]
    assert answer["embeddings"] == {"float": reference(server, ["a", "bc"])}
    assert answer["meta"] == {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 5}}


def test_texts_in_parts(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = v2(server, inputs=[{"content": parts[:1]}, {"content": parts}]).json()
    assert answer["texts"] == ["a", "a\nb"]
    assert answer["embeddings"]["float"] == reference(server, ["a", "a\nb"])


@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_every_type(server: Server, path: str) -> None:
    texts = ["a", "bc", "def"]
    given = post(server, path, texts=texts, input_type="search_document", embedding_types=[*TYPES, "float"]).json()
    found = given["embeddings"]
    assert list(found) == TYPES
    assert found["float"] == reference(server, texts)
    assert found["base64"] == reference(server, texts, encoding_format="base64")
    for name in ("int8", "binary", "ubinary"):
        assert found[name] == reference(server, texts, embed_dtype=name), name
    assert found["uint8"] == (np.array(found["int8"]) + 128).tolist()
    assert all(len(vector) == WIDTH // 8 for vector in found["ubinary"])
    assert np.frombuffer(base64.b64decode(found["base64"][0]), "<f4").shape == (WIDTH,)


@pytest.mark.parametrize("name", TYPES)
def test_a_long_answer_comes_in_slices_and_whole(name: str) -> None:
    with (server := Server(max_inputs_per_request=4000)).client:
        texts = [f"text {number}" for number in range(3000)]
        answer = v2(server, texts=texts, embedding_types=[name])
        assert "content-length" not in answer.headers
        assert answer.json()["texts"] == texts
        found = answer.json()["embeddings"][name]
        short = v2(server, texts=texts[-2:], embedding_types=[name])
        assert "content-length" in short.headers
        assert len(found) == 3000
        assert found[-2:] == short.json()["embeddings"][name]


def test_all_types_together_decide_whether_an_answer_is_long(server: Server) -> None:
    texts = ["a"] * 500
    assert "content-length" in v2(server, texts=texts).headers
    assert "content-length" not in v2(server, texts=texts, embedding_types=TYPES).headers


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"input_type": "search_query"}, {"input_type": "query"}),
        ({"input_type": "search_document"}, {}),
        ({"input_type": "classification"}, {"prompt_name": "classification"}),
        ({"input_type": "clustering"}, {"prompt_name": "clustering"}),
        ({"input_type": "SciFact"}, {"prompt_name": "SciFact"}),
        ({"input_type": "search_query", "instruction": "Classify:"}, {"instruction": "Classify:"}),
        ({"input_type": "search_query", "model": "fake:document"}, {"input_type": "query"}),
        ({"input_type": None, "model": "fake:query"}, {"input_type": "query"}),
        ({"input_type": "search_query", "output_dimension": 3}, {"input_type": "query", "dimensions": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_instructions(server: Server, path: str, fields: dict[str, Any], same: dict[str, Any]) -> None:
    answer = post(server, path, texts=["a"], embedding_types=["float"], **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["embeddings"]["float"] == reference(server, ["a"], **same)


def test_the_instruction_from_headers_a_default_or_the_text() -> None:
    with (server := Server(instruction_separator=" ||| ", default_input_type="query")).client:
        asked: dict[str, Any] = {"texts": ["a"], "embedding_types": ["float"]}
        answer = post(server, "/v2/embed", {"x-instruction": "Classify:"}, **asked)
        assert answer.json()["embeddings"]["float"] == reference(server, ["a"], instruction="Classify:")
        answer = post(server, "/v2/embed", **asked)
        assert answer.json()["embeddings"]["float"] == reference(server, ["a"], input_type="query")
        answer = v2(server, texts=["Classify: ||| a"])
        assert answer.json()["texts"] == ["Classify: ||| a"]
        assert answer.json()["embeddings"]["float"] == reference(server, ["a"], instruction="Classify:")


def test_null_means_absent(server: Server) -> None:
    first = post(server, "/v1/embed", **{**NULLS, "texts": ["a"]}).json()
    assert first["embeddings"] == reference(server, ["a"])
    second = post(server, "/v2/embed", **{**NULLS, "texts": ["a"], "input_type": "search_query"}).json()
    assert second["embeddings"] == {"float": reference(server, ["a"], input_type="query")}


@pytest.mark.parametrize(
    ("truncate", "stays"),
    [(None, slice(511)), ("END", slice(511)), ("end", slice(511)), ("START", slice(-511, None))],
)
@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_truncation_is_told(server: Server, path: str, truncate: str | None, stays: slice) -> None:
    text = "".join(chr(0x400 + place) for place in range(600))
    body: dict[str, Any] = {
        "texts": ["a", text],
        "input_type": "search_document",
        "embedding_types": ["float"],
        "truncate": truncate,
    }
    answer = post(server, path, **body)
    assert answer.json()["embeddings"]["float"] == reference(server, ["a", text[stays]])
    assert answer.headers["x-truncated-inputs"] == "1"
    (warning,) = answer.json()["meta"]["warnings"]
    assert warning.startswith("1 of 2 texts")
    assert warning.endswith("start" if truncate == "START" else "end")
    assert server.metric("llm2vec_truncated_inputs_total") == 1


def test_fields_without_an_effect_are_named(server: Server) -> None:
    answer = v2(server, texts=["a"], colour="red", max_tokens=512, priority=0)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "colour"
    with (strict := Server(reject_unknown_fields=True)).client:
        refused = v2(strict, texts=["a"], colour="red")
        assert (refused.status_code, refused.json()) == (400, {"message": "unknown fields: colour"})


def test_a_priority_above_0_yields(server: Server) -> None:
    for priority, lane in ((None, "interactive"), (0, "interactive"), (1, "bulk"), (999, "bulk")):
        line = f'llm2vec_queue_wait_seconds_count{{class="{lane}"}}'
        before = server.metric(line)
        assert v2(server, texts=["a"], priority=priority).status_code == 200
        assert server.metric(line) == before + 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "texts is missing"),
        ({"texts": []}, 400, "texts is empty"),
        ({"inputs": []}, 400, "inputs is empty"),
        ({"texts": ["a", " "]}, 400, "index 1"),
        ({"texts": "a"}, 400, "texts: "),
        ({"texts": ["a", 7]}, 400, "texts.1: "),
        ({"texts": [None]}, 400, "texts.0: "),
        ({"texts": [[1, 2]]}, 400, "texts.0: "),
        ({"texts": ["a"], "inputs": [{"content": [{"type": "text", "text": "a"}]}]}, 400, "either texts or inputs"),
        ({"inputs": ["a"]}, 400, "inputs.0: "),
        ({"inputs": [{"content": []}]}, 400, "inputs.0.content: "),
        ({"inputs": [{"content": [{"type": "text"}]}]}, 400, "index 0"),
        ({"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, 400, "only text is taken"),
        ({"images": ["data:image/png;base64,AA=="], "input_type": "image"}, 400, "images are not taken"),
        ({"texts": ["a"], "input_type": "image"}, 400, "search_query"),
        ({"texts": ["a"], "input_type": "poem"}, 400, "poem"),
        ({"texts": ["a"], "input_type": 7}, 400, "input_type: "),
        ({"texts": ["a"], "embedding_types": ["float16"]}, 400, "embedding_types.0: "),
        ({"texts": ["a"], "embedding_types": "float"}, 400, "embedding_types: "),
        ({"texts": ["a"], "output_dimension": 0}, 400, "1 to 8"),
        ({"texts": ["a"], "output_dimension": 9}, 400, "1 to 8"),
        ({"texts": ["a"], "output_dimension": "3"}, 400, "output_dimension: "),
        ({"texts": ["a"], "max_tokens": 511}, 400, "max_tokens is 511"),
        ({"texts": ["a"], "max_tokens": 0}, 400, "max_tokens: "),
        ({"texts": ["a"], "truncate": "MIDDLE"}, 400, "NONE, START or END"),
        ({"texts": ["a"], "truncate": True}, 400, "truncate: "),
        ({"texts": ["a"], "priority": -1}, 400, "priority: "),
        ({"texts": ["a"], "model": "embed-english-v3.0"}, 404, "embed-english-v3.0"),
        ({"texts": ["a", "x" * 600], "truncate": "NONE"}, 400, "maximum context length is 512 tokens"),
        ({"texts": ["a"] * 2049}, 400, "at most 2048"),
        ({"texts": ["a", NO_TOKENS]}, 400, "input index 1"),
        ({"texts": ["a", NOT_FINITE]}, 500, "input index 1"),
        ({"texts": ["a", OUT_OF_MEMORY, "b"]}, 503, "input index 1"),
        ({"texts": [BREAKS_THE_BATCH]}, 500, "input index 0"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_errors_have_cohere_s_shape(server: Server, path: str, body: dict[str, Any], status: int, message: str) -> None:
    answer = post(server, path, **{"input_type": "search_document", **body})
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["message"]
    assert message in answer.json()["message"]
    assert answer.headers["x-request-id"]


def test_the_device_s_errors_say_whether_to_try_again(server: Server) -> None:
    assert v2(server, texts=[NOT_FINITE]).headers["x-should-retry"] == "false"
    assert v2(server, texts=[OUT_OF_MEMORY]).headers["x-should-retry"] == "true"


def test_the_second_api_wants_an_input_type(server: Server) -> None:
    answer = post(server, "/v2/embed", texts=["a"])
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("input_type is missing")


@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_other_errors_have_the_same_shape(path: str) -> None:
    with (server := Server(max_body_bytes=2000, max_tokens_per_request=100)).client:
        for answer, status in (
            (server.client.get(path), 405),
            (server.client.post(path, content=b"{"), 400),
            (server.client.post(path, content=b"[1]"), 400),
            (server.client.post(path, content=b"x" * 3000), 413),
            (post(server, path, texts=["x" * 60, "x" * 60], input_type="search_document"), 400),
        ):
            assert answer.status_code == status, answer.text
            assert list(answer.json()) == ["message"]
        drain(server.app)
        answer = post(server, path, texts=["a"])
        assert answer.status_code == 503
        assert answer.json() == {"message": "the server is draining: try again later"}
        assert answer.headers["retry-after"]


async def test_an_overloaded_server_says_when_to_come_again() -> None:
    async with overloaded() as (_, client):
        refused = await client.post("/v1/embed", json={"texts": ["one too many"]})
        assert refused.status_code == 429
        assert "overloaded" in refused.json()["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_any_model_by_a_setting_and_names_of_one_s_own() -> None:
    with (server := Server(any_model=True)).client:
        assert v2(server, texts=["a"], model="embed-english-v3.0").status_code == 200
    with (server := Server(model_aliases={"embed-english-v3.0": "query"})).client:
        answer = post(server, "/v1/embed", texts=["a"], model="embed-english-v3.0")
        assert answer.json()["embeddings"] == reference(server, ["a"], input_type="query")


def test_an_empty_text_by_a_setting() -> None:
    with (server := Server(empty_text="bos")).client:
        answer = post(server, "/v1/embed", texts=["", "a"])
        assert answer.json()["embeddings"] == reference(server, ["", "a"])


def test_the_document_describes_it(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    for path in ("/v1/embed", "/v2/embed"):
        about = document["paths"][path]["post"]
        assert about["tags"] == ["Cohere"]
        content = about["requestBody"]["content"]["application/json"]
        assert content["examples"]
        assert "$defs" not in content["schema"]
        assert about["responses"]["404"]["content"]["application/json"]["schema"]["$ref"].endswith("CohereErrorAnswer")
        for example in content["examples"].values():
            assert server.client.post(path, json={**example["value"], "output_dimension": 8}).status_code == 200
    assert document["components"]["schemas"]["CohereByTypeAnswer"]["example"]
