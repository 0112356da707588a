"""Ollama's dialect over a fake device: embeddings, models, errors."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from service.server.app import drain
from tests.service.fakes import (
    BREAKS_THE_BATCH,
    NO_TOKENS,
    NOT_FINITE,
    OUT_OF_MEMORY,
    WIDTH,
    Server,
    fake_manifest,
    overloaded,
)


def embed(server: Server, _headers: dict[str, str] | None = None, **body: Any) -> Any:
    return server.client.post("/api/embed", json=body, headers=_headers)


def embeddings(server: Server, _headers: dict[str, str] | None = None, **body: Any) -> Any:
    return server.client.post("/api/embeddings", json=body, headers=_headers)


def reference(server: Server, texts: list[str], **body: Any) -> Any:
    """The vectors that OpenAI's dialect gives for the same."""
    answer = server.embed(input=texts, **body)
    assert answer.status_code == 200, answer.text
    return [item["embedding"] for item in answer.json()["data"]]


def test_a_text_and_a_list_of_texts(server: Server) -> None:
    answer = embed(server, model="fake", input="a")
    assert answer.status_code == 200, answer.text
    assert answer.json()["embeddings"] == reference(server, ["a"])
    answer = embed(server, model="fake", input=["a", "bc"])
    body = answer.json()
    assert list(body) == ["model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"]
    assert body["model"] == "fake"
    assert body["embeddings"] == reference(server, ["a", "bc"])
    assert 0 < body["total_duration"] < 60e9
    assert body["load_duration"] == 0
    assert body["prompt_eval_count"] == 5
    assert answer.headers["x-embedding-space"] == fake_manifest().embedding_space
    assert answer.headers["x-truncated-inputs"] == "0"


def test_dimensions(server: Server) -> None:
    assert embed(server, input="a", dimensions=3).json()["embeddings"] == reference(server, ["a"], dimensions=3)


def test_the_older_endpoint_gives_the_same_vector(server: Server) -> None:
    answer = embeddings(server, model="fake", prompt="a")
    assert answer.json() == {"embedding": reference(server, ["a"])[0]}
    assert answer.headers["x-compute-tokens"] == "2"


def test_a_long_answer_comes_in_slices_and_whole() -> None:
    with (server := Server(max_inputs_per_request=20_000)).client:
        texts = [f"text {number}" for number in range(10_000)]
        answer = embed(server, input=texts)
        assert "content-length" not in answer.headers
        found = answer.json()["embeddings"]
        assert len(found) == 10_000
        assert found[:2] + found[-2:] == reference(server, texts[:2] + texts[-2:])


def test_what_asks_to_load_the_model_gets_no_vectors(server: Server) -> None:
    inputs: list[dict[str, Any]] = [{}, {"input": None}, {"input": ""}, {"input": []}]
    for body in inputs:
        answer = embed(server, model="fake", keep_alive=-1, **body)
        assert answer.status_code == 200
        assert answer.json()["embeddings"] == []
        assert answer.headers["x-instruction-sha"] == "none"
        assert answer.headers["content-type"] == "application/json"
    for body in ({}, {"prompt": None}):
        assert embeddings(server, model="fake", **body).json() == {"embedding": []}
    assert not server.worker.batches


def test_an_empty_text_by_a_setting() -> None:
    with (server := Server(empty_text="bos")).client:
        nothing = reference(server, [""])
        assert embed(server, input="").json()["embeddings"] == nothing
        assert embed(server, input=["a", ""]).json()["embeddings"][1:] == nothing
        assert embeddings(server, prompt="").json() == {"embedding": nothing[0]}


@pytest.mark.parametrize(
    ("model", "headers", "same"),
    [
        ("fake", {}, {}),
        (None, {}, {}),
        ("fake:latest", {}, {}),
        ("fake:query", {}, {"input_type": "query"}),
        ("fake:query:latest", {}, {"input_type": "query"}),
        ("fake:document", {}, {}),
        ("fake:SciFact", {}, {"prompt_name": "SciFact"}),
        ("search", {}, {"input_type": "query"}),
        ("search:latest", {}, {"input_type": "query"}),
        ("fake", {"x-instruction": "Classify:"}, {"instruction": "Classify:"}),
        ("fake:latest", {"x-input-type": "query"}, {"input_type": "query"}),
    ],
)
def test_names_and_instructions(model: str | None, headers: dict[str, str], same: dict[str, Any]) -> None:
    with (server := Server(model_aliases={"search": "query"})).client:
        answer = embed(server, headers, model=model, input=["a"])
        assert answer.json()["embeddings"] == reference(server, ["a"], **same)
        assert answer.json()["model"] == (model or "fake")
        answer = embeddings(server, headers, model=model, prompt="a")
        assert answer.json()["embedding"] == reference(server, ["a"], **same)[0]
        assert server.client.post("/api/show", json={"model": model}).status_code == 200


def test_the_instruction_in_the_text() -> None:
    with (server := Server(instruction_separator=" ||| ")).client:
        wanted = reference(server, ["a"], instruction="Classify:")
        assert embed(server, input="Classify: ||| a").json()["embeddings"] == wanted
        assert embeddings(server, prompt="Classify: ||| a").json()["embedding"] == wanted[0]


def test_null_means_absent(server: Server) -> None:
    nulls = dict.fromkeys(("model", "truncate", "options", "keep_alive", "dimensions"))
    answer = embed(server, input="a", **nulls)
    assert answer.json()["embeddings"] == reference(server, ["a"])
    assert "x-ignored-fields" not in answer.headers
    answer = embeddings(server, prompt="a", model=None, options=None, keep_alive=None)
    assert answer.json()["embedding"] == reference(server, ["a"])[0]


def test_fields_and_options_without_an_effect_are_named(server: Server) -> None:
    options = {"num_ctx": 8, "temperature": None}
    answer = embed(server, input="a", options=options, keep_alive="5m", colour="red")
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "colour, options.num_ctx"
    answer = embeddings(server, prompt="a", options=options, keep_alive=300)
    assert answer.headers["x-ignored-fields"] == "options.num_ctx"
    with (strict := Server(reject_unknown_fields=True)).client:
        # as LangChain sends them
        assert embed(strict, input="a", options={"temperature": None}, keep_alive=300).status_code == 200
        refused = embed(strict, input="a", options=options)
        assert (refused.status_code, refused.json()) == (400, {"error": "unknown fields: options.num_ctx"})


@pytest.mark.parametrize("truncate", [None, True])
def test_truncation_is_told(server: Server, truncate: bool | None) -> None:
    text = "".join(chr(0x400 + place) for place in range(600))
    answer = embed(server, input=["a", text], truncate=truncate)
    assert answer.json()["embeddings"] == reference(server, ["a", text[:511]])
    assert answer.headers["x-truncated-inputs"] == "1"
    assert server.metric("llm2vec_truncated_inputs_total") == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("embed", {"input": ["a", " "]}, 400, "index 1"),
        ("embed", {"input": [""]}, 400, "index 0"),
        ("embed", {"input": 7}, 400, "input must be a text or a list of texts"),
        ("embed", {"input": ["a", None]}, 400, "input must be a text or a list of texts"),
        ("embed", {"input": [1, 2]}, 400, "input must be a text or a list of texts"),
        ("embed", {"input": {}}, 400, "input must be a text or a list of texts"),
        ("embed", {"input": "a", "dimensions": 0}, 400, "1 to 8"),
        ("embed", {"input": "a", "dimensions": 9}, 400, "1 to 8"),
        ("embed", {"input": "a", "dimensions": "3"}, 400, "dimensions: "),
        ("embed", {"input": "a", "truncate": "END"}, 400, "truncate: "),
        ("embed", {"input": "a", "options": []}, 400, "options: "),
        ("embed", {"input": "a", "model": "gpt-9"}, 404, "gpt-9"),
        ("embed", {"input": "a", "model": "gpt-9:latest"}, 404, "gpt-9"),
        ("embed", {"input": "a", "model": ""}, 404, "fake"),
        ("embed", {"input": [], "model": "gpt-9"}, 404, "gpt-9"),
        ("embed", {"input": "a", "model": "fake:poem"}, 400, "poem"),
        ("embed", {"input": ["ok", "x" * 600], "truncate": False}, 400, "maximum context length is 512 tokens"),
        ("embed", {"input": ["a"] * 2049}, 400, "at most 2048"),
        ("embed", {"prompt": "a"}, 400, "input is missing: this path reads input, not prompt"),
        ("embed", {"input": None, "texts": ["a"]}, 400, "input is missing: this path reads input, not texts"),
        ("embeddings", {"input": "a"}, 400, "prompt is missing: this path reads prompt, not input"),
        ("embed", {"input": ["a", NO_TOKENS]}, 400, "input index 1"),
        ("embed", {"input": ["a", NOT_FINITE]}, 500, "input index 1"),
        ("embed", {"input": ["a", OUT_OF_MEMORY, "b"]}, 503, "input index 1"),
        ("embed", {"input": BREAKS_THE_BATCH}, 500, "input index 0"),
        ("embeddings", {"prompt": ""}, 400, "index 0"),
        ("embeddings", {"prompt": ["a"]}, 400, "prompt: "),
        ("embeddings", {"prompt": "a", "model": "gpt-9"}, 404, "gpt-9"),
        ("embeddings", {"model": "gpt-9"}, 404, "gpt-9"),
        ("embeddings", {"prompt": "x" * 600}, 400, "maximum context length is 512 tokens"),
        ("embeddings", {"prompt": NO_TOKENS}, 400, "input index 0"),
        ("embeddings", {"prompt": NOT_FINITE}, 500, "input index 0"),
        ("embeddings", {"prompt": OUT_OF_MEMORY}, 503, "input index 0"),
        ("show", {"model": "gpt-9"}, 404, "gpt-9"),
        ("show", {"name": "gpt-9"}, 404, "gpt-9"),
        ("show", {"model": 7}, 400, "model: "),
    ],
    ids=lambda value: str(value)[:60],
)
def test_errors_have_ollama_s_shape(server: Server, path: str, body: dict[str, Any], status: int, message: str) -> None:
    answer = server.client.post(f"/api/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]
    assert answer.headers["x-request-id"]


def test_the_device_s_errors_say_whether_to_try_again(server: Server) -> None:
    assert embed(server, input=NOT_FINITE).headers["x-should-retry"] == "false"
    assert embed(server, input=OUT_OF_MEMORY).headers["x-should-retry"] == "true"


def test_other_errors_have_the_same_shape() -> None:
    with (server := Server(max_body_bytes=2000, max_tokens_per_request=100)).client:
        for answer, status in (
            (server.client.get("/api/embed"), 405),
            (server.client.get("/api/embeddings"), 405),
            (server.client.post("/api/tags"), 405),
            (server.client.post("/api/version"), 405),
            (server.client.get("/api/show"), 405),
            (server.client.post("/api/chat", json={}), 404),
            (server.client.post("/api/pull", json={}), 404),
            (server.client.post("/api/embed", content=b"{"), 400),
            (server.client.post("/api/embeddings", content=b"[1]"), 400),
            (server.client.post("/api/show", content=b""), 400),
            (server.client.post("/api/embed", content=b"x" * 3000), 413),
            (embed(server, input=["x" * 60, "x" * 60]), 400),
        ):
            assert answer.status_code == status, answer.text
            assert list(answer.json()) == ["error"]
            assert isinstance(answer.json()["error"], str)
        drain(server.app)
        for answer in (embed(server, input="a"), embed(server), embeddings(server, prompt="a")):
            assert answer.status_code == 503
            assert answer.json() == {"error": "the server is draining: try again later"}
            assert answer.headers["retry-after"]


async def test_an_overloaded_server_says_when_to_come_again() -> None:
    async with overloaded(overload_wait_seconds=0.05) as (_, client):
        for path, field in (("/api/embed", "input"), ("/api/embeddings", "prompt")):
            refused = await client.post(path, json={field: "one too many"})
            assert refused.status_code == 429
            assert "overloaded" in refused.json()["error"]
            assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_models() -> None:
    with (server := Server(model_aliases={"search": "query"})).client:
        listed = server.client.get("/api/tags").json()["models"]
        assert [model["name"] for model in listed] == ["fake:latest", "fake:query", "fake:document", "search:latest"]
        for model in listed:
            assert model["model"] == model["name"]
            assert datetime.fromisoformat(model["modified_at"]).tzinfo
            assert model["digest"] == fake_manifest().embedding_space
            assert model["size"] == 0
            assert model["details"]["embedding_length"] == WIDTH
            assert model["details"]["context_length"] == 512
            assert model["details"]["quantization_level"] == "F32"
            assert model["capabilities"] == ["embedding"]
            assert embed(server, model=model["name"], input="a").status_code == 200


def test_show(server: Server) -> None:
    for body in ({"model": "fake"}, {"name": "fake:latest"}, {"model": "fake:query", "verbose": True}):
        shown = server.client.post("/api/show", json=body).json()
        assert shown["model_info"]["general.architecture"] == "llama"
        assert shown["model_info"]["llama.context_length"] == 512
        assert shown["model_info"]["llama.embedding_length"] == WIDTH
        assert shown["capabilities"] == ["embedding"]
        assert shown["details"]["family"] == "llama"


def test_version(server: Server) -> None:
    major, minor, _ = server.client.get("/api/version").json()["version"].split(".")
    assert (int(major), int(minor)) >= (0, 12), "else clients would not ask for dimensions"


def test_the_document_describes_it(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for path in ("/api/embed", "/api/embeddings", "/api/show"):
        about = paths[path]["post"]
        assert about["tags"] == ["Ollama"]
        content = about["requestBody"]["content"]["application/json"]
        assert "$defs" not in content["schema"]
        assert about["responses"]["404"]["content"]["application/json"]["schema"]["$ref"].endswith("OllamaErrorAnswer")
        for example in content["examples"].values():
            body = {**example["value"], "model": example["value"]["model"].replace("demo", "fake"), "dimensions": 8}
            assert server.client.post(path, json=body).status_code == 200
    assert paths["/api/tags"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
