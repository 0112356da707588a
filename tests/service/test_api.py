"""The HTTP contract over a fake device: shapes, errors, headers, metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model_store.text.tokenizer import TokenizedText
from service.api.openai import _tell_once
from service.embedding.rows import EmbedRow, Vector
from service.errors import EncodingError, StartupError
from service.server.app import drain
from tests.service.fakes import (
    BREAKS_THE_BATCH,
    CHARACTERS,
    NO_TOKENS,
    NOT_FINITE,
    OUT_OF_MEMORY,
    WIDTH,
    FakeWorker,
    Server,
    expected,
    fake_manifest,
    fake_vector,
    overloaded,
    until,
)

Answer = httpx.Response


def vectors(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


def test_a_text_and_a_list_of_texts(server: Server) -> None:
    answer = server.embed(input="hello", model="fake")
    np.testing.assert_allclose(vectors(answer), [expected("hello")], rtol=1e-6)
    body = answer.json()
    assert body["object"] == "list"
    assert body["model"] == "fake"
    assert body["data"][0]["object"] == "embedding"
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6, "truncated_inputs": 0}
    texts = [f"text {i}" for i in range(150)]
    answer = server.embed(input=texts)
    np.testing.assert_allclose(vectors(answer), [expected(text) for text in texts], rtol=1e-6)
    assert [item["index"] for item in answer.json()["data"]] == list(range(150))


def test_base64_is_the_same_float32(server: Server) -> None:
    plain = vectors(server.embed(input=["a", "b"]))
    packed = server.embed(input=["a", "b"], encoding_format="base64").json()["data"]
    decoded = np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed])
    assert (plain == decoded).all()


def test_dimensions_are_cut_and_normalized_again(server: Server) -> None:
    np.testing.assert_allclose(vectors(server.embed(input="a", dimensions=3)), [expected("a", dimensions=3)], rtol=1e-6)
    np.testing.assert_allclose(vectors(server.embed(input="a", dimensions=WIDTH)), [expected("a")], rtol=1e-6)


def test_instructions(server: Server) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"instruction": "Classify:"}, "Classify:"),
        ({"input_type": "query"}, "Find:"),
        ({"input_type": "search_query"}, "Find:"),
        ({"input_type": "document"}, ""),
        ({"input_type": "passage"}, ""),
        ({"input_type": "query", "instruction": "Classify:"}, "Classify:"),
        ({"instruction": None, "input_type": None, "dimensions": None, "encoding_format": None, "user": None}, ""),
    ]
    for fields, instruction in cases:
        np.testing.assert_allclose(
            vectors(server.embed(input="a", **fields)), [expected("a", instruction)], rtol=1e-6, err_msg=str(fields)
        )
    assert server.metric('llm2vec_instruction_inputs_total{source="input_type"}') == 4


def test_the_most_particular_instruction_wins(server: Server) -> None:
    """item > instruction > input_type, prompt_name, task > the model's alias > headers: each tried with all below."""
    nq = "Given a question, retrieve Wikipedia passages that answer the question:"
    levels: list[tuple[dict[str, Any], str, str]] = [
        ({"input": [{"text": "a", "instruction": "Item:"}]}, "Item:", "item"),
        ({"instruction": "Field:"}, "Field:", "request"),
        ({"prompt_name": "NQ"}, nq, "input_type"),
        ({"model": "fake:query"}, "Find:", "alias"),
    ]
    headers: Any = {"x-instruction": "Größe:".encode()}
    np.testing.assert_allclose(
        vectors(server.embed(headers, input="a")), [expected("a", "Größe:")], rtol=1e-6, err_msg="header"
    )
    body: dict[str, Any] = {"input": "a"}
    for fields, instruction, source in reversed(levels):
        body |= fields
        before = server.metric(f'llm2vec_instruction_inputs_total{{source="{source}"}}')
        np.testing.assert_allclose(vectors(server.embed(headers, **body)), [expected("a", instruction)], rtol=1e-6)
        assert server.metric(f'llm2vec_instruction_inputs_total{{source="{source}"}}') == before + 1
    both: Any = {**headers, "x-input-type": "document"}
    assert server.embed(both, input="a").json()["error"]["code"] == "conflicting_instructions"


def test_a_role_beside_a_prompt_says_which_side(server: Server) -> None:
    sts = "Retrieve semantically similar text:"
    nq = "Given a question, retrieve Wikipedia passages that answer the question:"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt_name": "NQ", "input_type": "query"}, nq),
        ({"prompt_name": "nq", "input_type": "document"}, ""),
        ({"task": "sts", "input_type": "document"}, sts),
        ({"task": "retrieval.query"}, "Find:"),
        ({"model": "fake:STS12"}, sts),
        ({"input_type": "query", "task": "retrieval.query"}, "Find:"),
    ]
    for fields, instruction in cases:
        found = vectors(server.embed(input="a", **fields))
        np.testing.assert_allclose(found, [expected("a", instruction)], rtol=1e-6, err_msg=str(fields))


def test_inputs_can_bring_instructions_of_their_own(server: Server) -> None:
    given = [
        "a",
        ["One:", "b"],
        {"text": "c", "instruction": "Two:"},
        {"text": "d", "input_type": "query"},
        {"text": "e"},
    ]
    found = vectors(server.embed(input=given, instruction="All:"))
    wanted = [("a", "All:"), ("b", "One:"), ("c", "Two:"), ("d", "Find:"), ("e", "All:")]
    np.testing.assert_allclose(found, [expected(text, one) for text, one in wanted], rtol=1e-6)
    found = vectors(server.embed(input=["a", "b"], instruction=["One:", None]))
    np.testing.assert_allclose(found, [expected("a", "One:"), expected("b")], rtol=1e-6)


def test_the_applied_instruction_is_reported(server: Server) -> None:
    def sha(**fields: Any) -> str:
        return str(server.embed(**fields).headers["x-instruction-sha"])

    assert sha(input="a") == "none"
    assert (
        sha(input=["a", "b"], input_type="query")
        == sha(input="c", instruction="Find:")
        != sha(input="a", instruction="F")
    )
    assert sha(input=["a", ["Find:", "b"]]) == "mixed"


def test_instructions_in_the_text_by_a_separator() -> None:
    with (server := Server(instruction_separator="|||")).client:
        found = vectors(server.embed(input=["Find: |||a", "b"], instruction="All:"))
        np.testing.assert_allclose(found, [expected("a", "Find:"), expected("b", "All:")], rtol=1e-6)


def test_aliases_and_defaults() -> None:
    aliases = {"text-embedding-3-small": "", "queries": "query"}
    with (server := Server(model_aliases=aliases, default_input_type="sts")).client:
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]][-2:] == list(aliases)
        sts = "Retrieve semantically similar text:"
        for model, instruction in (("text-embedding-3-small", sts), ("queries", "Find:"), (None, sts), ("fake", sts)):
            np.testing.assert_allclose(
                vectors(server.embed(input="a", model=model)), [expected("a", instruction)], rtol=1e-6
            )
        assert server.client.get("/v1/models/queries").json()["id"] == "queries"
        assert server.embed(input="a", model="gpt-9").status_code == 404
    with (server := Server(any_model=True)).client:
        assert server.embed(input="a", model="gpt-9").status_code == 200


@pytest.mark.parametrize("wrong", [{"default_input_type": "poem"}, {"model_aliases": {"a": "poem"}}])
def test_settings_that_name_no_prompt_are_refused_at_the_start(wrong: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match="poem"):
        Server(**wrong)


def test_prompts_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.toml").write_text('legal = { query = "Find the statute:" }\nboth = "Sort:"\n')
    with (server := Server(prompts_file=tmp_path / "prompts.toml")).client:
        listed = server.client.get("/v1/prompts").json()
        assert listed["prompts"]["legal"] == {"query": "Find the statute:", "document": ""}
        assert listed["prompts"]["both"]["document"] == "Sort:"
        assert listed["roles"]["search_query"] == "Find:"
        assert listed["lead"] == "{instruction} "
        found = vectors(server.embed(input="a", prompt_name="legal"))
        np.testing.assert_allclose(found, [expected("a", "Find the statute:")], rtol=1e-6)
    (tmp_path / "prompts.toml").write_text('legal = { document = "Find:" }')
    with pytest.raises(ValueError, match="legal must be"):
        Server(prompts_file=tmp_path / "prompts.toml")


def test_preview_shows_what_is_pooled(server: Server) -> None:
    answer = server.client.post("/v1/prompts/preview", json={"input": ["ab", "c"], "input_type": "query"}).json()
    first = answer["data"][0]
    assert first["instruction"] == "Find:"
    assert first["source"] == "input_type"
    assert [token["token"] for token in first["tokens"]] == ["<bos>", *"Find: ab"]
    assert [token["token"] for token in first["tokens"] if token["pooled"]] == ["a", "b"]
    parts = [token["part"] for token in first["tokens"]]
    assert parts == ["special", *["instruction"] * 6, "text", "text"]
    assert first["tokens"][1] == {
        "id": ord("F"),
        "token": "F",
        "text": "F",
        "part": "instruction",
        "pooled": False,
        "cut": False,
    }
    assert (first["token_count"], first["pooled_count"], first["cut_count"], first["over_limit"]) == (9, 2, 0, 0)
    assert server.worker.batches == []


def previewed(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.client.post("/v1/prompts/preview", json=body)
    assert answer.status_code == 200, answer.text
    row: dict[str, Any] = answer.json()["data"][0]
    return row


def letters(row: dict[str, Any], cut: bool) -> str:
    return "".join(token["text"] for token in row["tokens"] if token["cut"] == cut)


def test_preview_shows_what_is_cut_where_it_stood() -> None:
    with (server := Server(max_input_tokens=10)).client:
        text = "abcdefghijkl"
        end = previewed(server, input=text, truncate="END", instruction="Q:")
        assert (letters(end, False), letters(end, True)) == ("Q: abcdef", "ghijkl")
        assert [token["cut"] for token in end["tokens"]] == [False] * 10 + [True] * 6
        assert (end["token_count"], end["pooled_count"], end["cut_count"], end["over_limit"]) == (10, 6, 6, 0)
        start = previewed(server, input=text, truncate="START", instruction="Q:")
        assert (letters(start, False), letters(start, True)) == ("Q: ghijkl", "abcdef")
        assert [token["cut"] for token in start["tokens"]] == [False] * 4 + [True] * 6 + [False] * 6
        for other in ({}, {"overflow": "mean"}, {"truncate": "END", "instruction": "far too long for a text"}):
            whole = previewed(server, input=text, **other)
            assert whole["cut_count"] == 0
            assert whole["over_limit"] == whole["token_count"] - 10 > 0
        kept = server.embed(input=text, truncate="END", instruction="Q:")
        assert kept.json()["usage"]["prompt_tokens"] == end["token_count"]


def test_preview_is_limited_like_embedding() -> None:
    with (server := Server(max_tokens_per_request=20)).client:
        answer = server.client.post("/v1/prompts/preview", json={"input": ["a" * 30]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_large")
        answer = server.client.post("/v1/prompts/preview", json={"input": "a", "colour": "red"})
        assert answer.headers["x-ignored-fields"] == "colour"


def test_token_ids(server: Server) -> None:
    """The model's own by default; cl100k_base from OpenAI's SDKs; whole texts or lists of them."""
    own = [ord("a"), ord("b")]
    np.testing.assert_allclose(vectors(server.embed(input=own)), [expected("ab")], rtol=1e-6)
    np.testing.assert_allclose(vectors(server.embed(input=[own, own[:1]])), [expected("ab"), expected("a")], rtol=1e-6)
    by_tiktoken = [15339, 1917]  # "hello world"
    for headers in (
        {"user-agent": "OpenAI/Python 2.0"},
        {"user-agent": "AsyncOpenAI/Python 2"},
        {"x-stainless-lang": "js"},
    ):
        answer = server.embed(headers, input=[by_tiktoken])
        assert answer.headers["x-token-ids-decoded"] == "cl100k_base"
        np.testing.assert_allclose(vectors(answer), [expected("hello world")], rtol=1e-6)
    answer = server.embed(input=by_tiktoken, token_ids="cl100k_base", instruction="Find:")
    np.testing.assert_allclose(vectors(answer), [expected("hello world", "Find:")], rtol=1e-6)
    assert server.metric('llm2vec_token_id_inputs_total{decoder="cl100k_base"}') == 4
    assert server.metric('llm2vec_token_id_inputs_total{decoder="model"}') == 3
    with (strict := Server(token_ids="reject")).client:
        assert strict.embed(input=own).json()["error"]["code"] == "invalid_token_ids"


def test_ids_of_openai_s_sdks_that_cl100k_base_lacks_are_the_model_s(caplog: pytest.LogCaptureFixture) -> None:
    """Of the whole request; the fakes' ids are characters, of which "𠀀" is one that cl100k_base has no token for."""
    _tell_once.cache_clear()
    sdk = {"x-stainless-lang": "python"}
    own = [list(map(ord, text)) for text in ("ab", "a𠀀")]
    with (server := Server()).client:
        for _ in range(2):
            answer = server.embed(sdk, input=own)
            assert "x-token-ids-decoded" not in answer.headers
            np.testing.assert_allclose(vectors(answer), [expected("ab"), expected("a𠀀")], rtol=1e-6)
            assert server.embed(sdk, input=own[:1]).headers["x-token-ids-decoded"] == "cl100k_base"
        said = server.embed(sdk, input=own[:1], token_ids="model")
        assert "x-token-ids-decoded" not in said.headers
        np.testing.assert_allclose(vectors(said), [expected("ab")], rtol=1e-6)
        error = server.embed(sdk, input=[own[1], [97, CHARACTERS]]).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_token_ids", "input")
        assert error["message"].startswith("input index 1: this model has no token 1114112")
        assert (
            "cl100k_base, as which ids of OpenAI's clients are read otherwise, has no token 131072" in error["message"]
        )
    with (server := Server(token_ids="model")).client:
        np.testing.assert_allclose(vectors(server.embed(sdk, input=own[:1])), [expected("ab")], rtol=1e-6)
    told = [line for line in caplog.messages if "OpenAI's SDK" in line]
    assert len(told) == 2
    assert all("set LLM2VEC_TOKEN_IDS=model" in line for line in told)


def test_empty_texts_by_setting() -> None:
    with (server := Server(empty_text="bos")).client:
        found = vectors(server.embed(input=["a", "", "  ", []]))
        assert (found[1] == found[2]).all()
        assert (found[1] == found[3]).all()
        np.testing.assert_allclose(found[0], expected("a"), rtol=1e-6)
        assert server.embed(input=[15339, 220], token_ids="cl100k_base").status_code == 200


def test_long_inputs(server: Server) -> None:
    """511 characters and BOS are what fits; nothing is cut unless asked for, and then it is said."""
    long = "".join(chr(97 + place % 26) for place in range(1200))
    assert server.embed(input=long).json()["error"]["code"] == "context_length_exceeded"
    for fields, kept in (
        ({"truncate": True}, long[:511]),
        ({"truncate": "END"}, long[:511]),
        ({"truncate": "START"}, long[-511:]),
        ({"overflow": "truncate"}, long[:511]),
    ):
        answer = server.embed(input=["short", long], **fields)
        np.testing.assert_allclose(vectors(answer)[1], expected(kept), rtol=1e-6, err_msg=str(fields))
        assert answer.json()["usage"]["truncated_inputs"] == 1
        assert answer.headers["x-truncated-inputs"] == "1"
    kept = long[: 511 - len("Find: ")]
    answer = server.embed(input=long, truncate=True, instruction="Find:")
    np.testing.assert_allclose(vectors(answer), [expected(kept, "Find:")], rtol=1e-6)


def test_a_long_input_as_the_mean_of_its_chunks(server: Server) -> None:
    long = "".join(chr(97 + place % 26) for place in range(1200))
    room = 511 - len("Find: ")
    parts = [long[start : start + room] for start in range(0, 1200, room)]
    mean: Any = sum(len(part) * expected(part, "Find:") for part in parts)
    for fields, wanted in (
        ({}, mean / np.linalg.norm(mean)),
        ({"dimensions": 3}, mean[:3] / np.linalg.norm(mean[:3])),
        ({"normalize": False}, sum(len(part) * expected(part, "Find:", normalize=False) for part in parts) / 1200),
    ):
        answer = server.embed(input=["short", long], overflow="mean", instruction="Find:", **fields)
        np.testing.assert_allclose(vectors(answer)[1], wanted, rtol=1e-5, err_msg=str(fields))
        assert answer.json()["usage"]["truncated_inputs"] == 0
        assert answer.json()["usage"]["prompt_tokens"] == 1200 + 3 * 7 + len("Find: short") + 1


class OpposedWorker(FakeWorker):
    """Texts of "b" get the opposite of other texts' vector, and those of "0" one of zeros."""

    async def run_batch(self, rows: list[EmbedRow]) -> Sequence[Vector | EncodingError]:
        signs = {ord("b"): -1, ord("0"): 0}
        found = await super().run_batch(rows)
        return [
            vector if isinstance(vector, EncodingError) else np.full_like(vector, signs.get(row.text.token_ids[-1], 1))
            for row, vector in zip(rows, found, strict=True)
        ]


@pytest.mark.parametrize("second", ["b", "0"])
def test_chunks_that_cancel_each_other_out_have_no_mean_of_length_1(second: str) -> None:
    first = second.replace("b", "a")
    long = first * 511 + second * 511
    with (server := Server(OpposedWorker())).client:
        answer = server.embed(input=["a", long], overflow="mean")
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert (error["code"], "input index 1" in error["message"]) == ("non_finite_embedding", True)
        assert "llm2vec_nonfinite_total 1.0" in server.client.get("/metrics").text
        as_it_is = server.embed(input=["a", long], overflow="mean", normalize=False)
        assert vectors(as_it_is)[1].tolist() == [0.0] * WIDTH


def test_an_error_behind_a_long_input_names_the_input_and_not_the_chunk(server: Server) -> None:
    answer = server.embed(input=["a" * 1200, "b", NOT_FINITE], overflow="mean")
    assert answer.status_code == 500
    assert "input index 2" in answer.json()["error"]["message"]


def test_vectors_as_the_model_gives_them(server: Server) -> None:
    np.testing.assert_allclose(
        vectors(server.embed(input="a", normalize=False)), [expected("a", normalize=False)], rtol=1e-6
    )
    np.testing.assert_allclose(vectors(server.embed(input="a", normalize=None)), [expected("a")], rtol=1e-6)


def test_fewer_bits(server: Server) -> None:
    """Cut, normalised, and then quantised; the same in both encodings."""
    cut = expected("a", dimensions=7)
    bits = np.packbits(cut > 0)
    wanted = {
        "float32": cut,
        "float16": cut.astype(np.float16),
        "int8": np.rint(cut * 127 / np.abs(cut).max()),
        "ubinary": bits,
        "binary": bits.astype(int) - 128,
    }
    types = {"float32": "<f4", "float16": "<f2", "int8": "i1", "ubinary": "u1", "binary": "i1"}
    for dtype, numbers in wanted.items():
        body: dict[str, Any] = {"input": "a", "dimensions": 7, "embed_dtype": dtype}
        np.testing.assert_allclose(vectors(server.embed(**body))[0], numbers, rtol=1e-6, err_msg=dtype)
        packed = server.embed(**body, encoding_format="base64").json()["data"][0]["embedding"]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), types[dtype]), numbers, rtol=1e-6)


def test_chunks_of_one_text(server: Server) -> None:
    """Each chunk's vector is of its own tokens; the text around is read once."""
    url, text = "/v1/chunk_embeddings", "abcdefgh"

    def chunk(characters: str) -> Any:
        spans = ((1, 1 + len(characters)),)
        return fake_vector(EmbedRow(TokenizedText([1, *map(ord, characters)], 1, spans=spans), WIDTH))[0]

    answer = server.client.post(url, json={"input": text, "chunk_size": 3}).json()
    assert [(item["start"], item["end"], item["tokens"]) for item in answer["data"]] == [
        (0, 3, 3),
        (3, 6, 3),
        (6, 8, 2),
    ]
    wanted = [chunk("abc"), chunk("def"), chunk("gh")]
    np.testing.assert_allclose([item["embedding"] for item in answer["data"]], wanted, rtol=1e-6)
    assert answer["usage"]["prompt_tokens"] == 9
    body: dict[str, Any] = {
        "input": text,
        "spans": [[2, 5], [0, 8]],
        "instruction": "Find:",
        "encoding_format": "base64",
    }
    packed = server.client.post(url, json=body).json()["data"]
    found = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed]
    np.testing.assert_allclose(found, [chunk("cde"), chunk(text)], rtol=1e-6)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"input": text}, "invalid_value"),
        ({"input": text, "chunk_size": 3, "spans": [[0, 1]]}, "invalid_value"),
        ({"input": text, "spans": [[8, 9]]}, "invalid_span"),
        ({"input": text, "spans": [[3, 3]]}, "invalid_span"),
        ({"input": "x" * 600, "chunk_size": 100}, "context_length_exceeded"),
        ({"input": " ", "chunk_size": 100}, "empty_input"),
        ({"input": [text], "chunk_size": 100}, "invalid_value"),
    ]
    for body, code in refused:
        answer = server.client.post(url, json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["code"] == code


async def test_a_deadline_passed_in_the_queue_drops_the_request() -> None:
    server = Server()
    worker = server.worker
    async with server.running() as client:
        await client.post("/v1/embeddings", json={"input": "first of all"})
        worker.gate.clear()
        worker.batches.clear()
        first = asyncio.create_task(client.post("/v1/embeddings", json={"input": "a", "timeout_ms": 20}))
        await until(lambda: worker.batches)
        late = await client.post("/v1/embeddings", json={"input": "b", "timeout_ms": 20})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        worker.gate.set()
        assert (await first).status_code == 200  # it was computed already, and is not thrown away
    assert worker.batches == [["a"]]


def test_priority_interactive_is_for_half_a_batch_at_most() -> None:
    server = Server(batch_tokens=40)
    with server.client:
        assert server.embed(input=["a"] * 10, priority="interactive").status_code == 200
        for path, more in (("/v1/embeddings", {}), ("/v1/chunk_embeddings", {"chunk_size": 8})):
            body = {"input": "a" * 30, "priority": "interactive", **more}
            answer = server.client.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "priority")
            assert "31 tokens" in error["message"]
            assert "leave priority out" in error["message"]
        assert server.embed(input="a" * 30).status_code == 200


async def test_a_preview_is_refused_like_an_embedding_where_there_is_no_room() -> None:
    async with overloaded() as (_, client):
        answer = await client.post("/v1/prompts/preview", json={"input": "one too many" * 4})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1


def test_bulk_by_name(server: Server) -> None:
    server.embed(input="a", priority="bulk")
    server.embed(input="b", priority="interactive")
    assert server.metric('llm2vec_queue_wait_seconds_count{class="bulk"}') == 1
    assert server.metric('llm2vec_queue_wait_seconds_count{class="interactive"}') == 1
    for lane in ("bulk", "interactive"):
        series = f'llm2vec_request_duration_seconds_count{{class="{lane}",route="/v1/embeddings"}}'
        assert server.metric(series) == 1


def test_metrics_under_the_names_of_text_embeddings_inference() -> None:
    with (server := Server(tei_metrics=True)).client:
        server.embed(input=["a", "bc"])
        server.embed(input="a", dimensions=99)
        route = 'route="/v1/embeddings"'
        assert server.metric(f'te_request_success{{code="",{route},status="200"}}') == 1
        assert server.metric(f'te_request_count{{code="invalid_dimensions",{route},status="400"}}') == 1
        assert server.metric("te_embed_count") == 2
        assert server.metric("te_request_input_length_sum") == 5
        assert server.metric('te_batch_next_tokens_bucket{le="8.0"}') >= 1
        page = server.client.get("/metrics").text
        assert "# TYPE te_request_duration histogram" in page
    with (server := Server()).client:
        assert "\nte_" not in server.client.get("/metrics").text


def test_the_server_can_have_its_own_query_instruction() -> None:
    with (server := Server(query_instruction="Look up:")).client:
        np.testing.assert_allclose(
            vectors(server.embed(input="a", input_type="query")), [expected("a", "Look up:")], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "message"),
    [
        ({"input": []}, 400, "empty_input", "input", "at least one"),
        ({"input": ["a", "  "]}, 400, "empty_input", "input", "index 1"),
        ({"input": ""}, 400, "empty_input", "input", "index 0"),
        ({}, 400, "invalid_value", "input", "input is missing"),
        ({"input": None}, 400, "invalid_value", "input", "input is missing"),
        ({"inputs": ["a"]}, 400, "invalid_value", "input", "input is missing: this path reads input, not inputs"),
        ({"input": "a", "timeout_ms": True}, 400, "invalid_value", "timeout_ms", "valid number"),
        ({"input": "a", "timeout_ms": "5"}, 400, "invalid_value", "timeout_ms", "valid number"),
        ({"input": 7}, 400, "invalid_input", "input", "a list of texts"),
        (
            {"input": [1, 2], "token_ids": "reject"},
            400,
            "invalid_token_ids",
            "input",
            "check_embedding_ctx_length=False",
        ),
        (
            {"input": [[1, 2], [100257, 999999]], "token_ids": "cl100k_base"},
            400,
            "invalid_token_ids",
            "input",
            "index 1",
        ),
        ({"input": ["a", None]}, 400, "invalid_input", "input", "input index 1"),
        ({"input": ["a", [1, True]]}, 400, "invalid_input", "input", "input index 1"),
        ({"input": ["a", {"txt": "b"}]}, 400, "invalid_input", "input", "input index 1"),
        ({"input": [{"text": "b", "colour": "red"}]}, 400, "invalid_input", "input", "'colour'"),
        ({"input": [{"text": "b", "instruction": 7}]}, 400, "invalid_input", "input", "'instruction'"),
        ({"input": ["a", []]}, 400, "empty_input", "input", "index 1"),
        ({"input": "a", "truncate": "MIDDLE"}, 400, "invalid_value", "truncate", "START"),
        ({"input": "a", "overflow": "split"}, 400, "invalid_value", "overflow", "mean"),
        ({"input": ["a", "b"], "instruction": ["c"]}, 400, "invalid_value", "instruction", "1 instructions for 2"),
        (
            {"input": "a", "instruction": "x" * 600, "overflow": "mean"},
            400,
            "context_length_exceeded",
            "instruction",
            "room",
        ),
        (
            {"input": "a", "input_type": "query", "task": "document"},
            400,
            "conflicting_instructions",
            "task",
            "one of them",
        ),
        ({"input": "a", "prompt_name": "NQ", "task": "sts"}, 400, "conflicting_instructions", "task", "one of them"),
        ({"input": "a", "prompt_name": "NQx"}, 400, "invalid_input_type", "prompt_name", "did you mean NQ"),
        ({"input": "a", "model": "fake:poem"}, 400, "invalid_input_type", "model", "GET /v1/prompts"),
        ({"input": "a", "priority": "high"}, 400, "invalid_value", "priority", "interactive"),
        ({"input": "a", "timeout_ms": 0}, 400, "invalid_value", "timeout_ms", "greater than 0"),
        ({"input": "a", "dimensions": 0}, 400, "invalid_dimensions", "dimensions", "1 to 8"),
        ({"input": "a", "dimensions": 9}, 400, "invalid_dimensions", "dimensions", "1 to 8"),
        ({"input": "a", "dimensions": "3"}, 400, "invalid_value", "dimensions", "integer"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format", "float"),
        ({"input": "a", "input_type": "poem"}, 400, "invalid_input_type", "input_type", "search_query"),
        ({"input": "a", "model": "gpt-9"}, 404, "model_not_found", "model", "fake"),
        ({"input": ["ok", "x" * 600]}, 400, "context_length_exceeded", "input", "maximum context length is 512 tokens"),
        ({"input": ["a"] * 2049}, 400, "too_many_inputs", "input", "at most 2048"),
        ({"input": ["a", NO_TOKENS]}, 400, "invalid_input", "input", "input index 1"),
        ({"input": ["a", NOT_FINITE]}, 500, "non_finite_embedding", None, "input index 1"),
        ({"input": ["a", OUT_OF_MEMORY, "b"]}, 503, "out_of_memory", None, "input index 1"),
        ({"input": [BREAKS_THE_BATCH]}, 500, "encoding_failed", None, "input index 0"),
    ],
)
def test_errors_have_openai_s_shape(
    server: Server, body: dict[str, Any], status: int, code: str, param: str | None, message: str
) -> None:
    answer = server.embed(**body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"]
    assert answer.headers["x-request-id"]


def test_other_errors_have_the_same_shape(server: Server) -> None:
    for answer, status, code in (
        (server.client.get("/v1/nothing"), 404, "not_found"),
        (server.client.get("/v1/embeddings"), 405, "method_not_allowed"),
        (server.client.post("/v1/embeddings", content=b"{"), 400, "invalid_json"),
        (server.client.post("/v1/embeddings", content=b"[1]"), 400, "invalid_json"),
        (server.client.post("/v1/embeddings", content=b"\xff\xfe"), 400, "invalid_json"),
        (server.client.get("/v1/models/other"), 404, "model_not_found"),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code


def test_a_body_that_is_too_large_is_refused_while_it_streams() -> None:
    with (server := Server(max_body_bytes=2000)).client:
        read: list[int] = []

        def endless() -> Iterator[bytes]:
            for number in range(1000):
                read.append(number)
                yield b"x" * 1000

        for content in (b"x" * 3000, endless()):
            answer = server.client.post("/v1/embeddings", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"


def test_too_many_tokens_in_one_request() -> None:
    with (server := Server(max_tokens_per_request=100)).client:
        answer = server.embed(input=["x" * 60, "x" * 60])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "request_too_large"


def test_unknown_fields_are_named_or_refused(server: Server) -> None:
    answer = server.embed(input="a", colour="red", shape=1)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "colour, shape"
    odd: dict[str, Any] = {"x\r\nset-cookie: a=b": 1, "größe": 2}
    answer = server.embed(input="a", **odd)
    assert answer.headers["x-ignored-fields"] == "gr??e, x??set-cookie:?a=b"
    assert "set-cookie" not in answer.headers
    with (strict := Server(reject_unknown_fields=True)).client:
        assert strict.embed(input="a", colour="red").json()["error"]["code"] == "unknown_field"


def test_headers_say_what_it_took(server: Server) -> None:
    answer = server.embed(input=["abc", "de"], _headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-compute-tokens"] == "7"
    assert answer.headers["x-embedding-space"] == fake_manifest().embedding_space
    for name in ("x-tokenization-time", "x-queue-time", "x-inference-time"):
        assert float(answer.headers[name]) >= 0
    assert server.embed(input="a", _headers={"x-request-id": "bad id\t"}).headers["x-request-id"] != "bad id\t"


def test_models(server: Server) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["fake", "fake:query", "fake:document"]
    assert listed["data"][0]["dimensions"] == WIDTH
    assert "widths" not in listed["data"][0]
    assert server.client.get("/v1/models/fake").json()["id"] == "fake"
    with (renamed := Server(served_name="org/mine")).client:
        assert renamed.client.get("/v1/models/org/mine").json()["id"] == "org/mine"
        assert renamed.embed(input="a", model="org/mine").status_code == 200


def test_operations(server: Server) -> None:
    for path in ("/livez", "/readyz", "/health", "/ping", "/version", "/docs", "/openapi.json"):
        assert server.client.get(path).status_code == 200, path
    assert "EmbeddingsBody" in json.dumps(server.client.get("/openapi.json").json()["paths"]["/v1/embeddings"])


def test_head_is_get_without_the_body(server: Server) -> None:
    document = server.client.get("/openapi.json").json()["paths"]
    for path in [path for path, methods in document.items() if "get" in methods and "{" not in path] + ["/", "/docs"]:
        got, head = server.client.get(path), server.client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"], path
    assert server.client.head("/v1/models/fake").status_code == 200
    assert server.client.head("/nonesuch").status_code == 404
    assert server.client.head("/v1/embeddings").status_code == 405
    assert server.metric('llm2vec_requests_total{code="",route="/api/tags",status="200"}') == 2


@pytest.mark.parametrize("model", ["text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"])
def test_the_models_that_openai_s_clients_ask_for_by_default_are_the_served_one(server: Server, model: str) -> None:
    answer = server.embed(input="a", model=model)
    np.testing.assert_allclose(vectors(answer), [expected("a")], rtol=1e-6)
    assert answer.json()["model"] == "fake"
    assert answer.headers["x-requested-model"] == model
    np.testing.assert_allclose(vectors(server.embed(input="a", model=f"{model}:query")), [expected("a", "Find:")])
    assert server.client.get(f"/v1/models/{model}").json()["root"] == "fake"
    with (own := Server(model_aliases={model: "query"})).client:
        np.testing.assert_allclose(vectors(own.embed(input="a", model=model)), [expected("a", "Find:")], rtol=1e-6)


def test_other_models_are_not_there(server: Server) -> None:
    for model in ("text-embedding-3", "text-embedding-3-small-2", "gpt-4o", "x" * 10_000):
        answer = server.embed(input="a", model=model)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert len(answer.content) < 400
    for name in ("fake:nonsense", "text-embedding-3-small:nonsense", "nonsense"):
        answer = server.client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name
        assert server.client.post("/api/show", json={"model": name}).status_code == 404
    for name in ("fake:query", "fake:Retrieval.Query", "fake:STS12"):
        assert server.client.get(f"/v1/models/{name}").json()["id"] == name


def test_answers_say_the_served_model_and_which_name_was_asked_for() -> None:
    with (own := Server(any_model=True)).client:
        for path, body in (("/v1/embeddings", {}), ("/v1/chunk_embeddings", {"chunk_size": 2})):
            for model, shown in (("fake:query", "fake:query"), ("größe\r\nx-evil: 1", "gr??e??x-evil:?1")):
                answer = own.client.post(path, json={"input": "a", "model": model, **body})
                assert answer.json()["model"] == "fake"
                assert answer.headers["x-requested-model"] == shown
            for named in ({"model": "fake"}, {}):
                answer = own.client.post(path, json={"input": "a", **named, **body})
                assert "x-requested-model" not in answer.headers
        assert len(own.embed(input="a", model="x" * 10_000).headers["x-requested-model"]) == 200


def test_azure_s_clients_name_the_model_in_the_path_and_send_an_api_key() -> None:
    with (own := Server(api_keys="sk-one", served_name="org/mine")).client:
        query = "api-version=2024-10-21"
        for deployment, instruction in (("text-embedding-3-small", ""), ("text-embedding-ada-002:query", "Find:")):
            path = f"/openai/deployments/{deployment}/embeddings?{query}"
            answer = own.client.post(path, json={"input": "a", "model": "other"}, headers={"api-key": "sk-one"})
            np.testing.assert_allclose(vectors(answer), [expected("a", instruction)], rtol=1e-6)
            assert answer.json()["model"] == "org/mine"
            assert own.client.post(path, json={"input": "a"}, headers={"api-key": "sk-two"}).status_code == 401
        key = {"api-key": "sk-one"}
        unknown = own.client.post(f"/openai/deployments/nonesuch/embeddings?{query}", json={"input": "a"}, headers=key)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert own.client.post("/openai/v1/embeddings", json={"input": "a"}, headers=key).status_code == 200


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/v1/embeddings", "/v1/embeddings"),
        ("/v1/embeddings/embeddings", "/embeddings"),
        ("/v1/embeddings/v1/embeddings", "/v1/embeddings"),
        ("/api/v1/embeddings", "/v1/embeddings"),
        ("/v1/rerank", "/rerank"),
        ("/v1/api/embed", "/api/embed"),
        ("/v1/health", "/health"),
    ],
)
def test_a_path_joined_wrongly_is_told_the_right_one(server: Server, path: str, meant: str) -> None:
    answer = server.client.post(path, json={"input": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith(f"did you mean {meant}?")


def test_other_paths_are_told_where_texts_are_embedded(server: Server) -> None:
    message = server.client.post("/v1/chat/completions", json={}).json()["error"]["message"]
    assert message.endswith("texts are embedded at /v1/embeddings, /docs shows all paths")
    assert server.client.get("/v1/embeddings").json()["error"]["message"].endswith("use POST")
    assert len(server.client.get("/" + "x" * 10_000).content) < 500
    assert server.client.get("/models").json() == server.client.get("/v1/models").json()


@pytest.mark.parametrize("body", [b'{"input": "\xe4"}', '{"input": "a"}'.encode("utf-16"), b"\xff"])
def test_a_body_that_is_not_utf_8_is_told_so(server: Server, body: bytes) -> None:
    answer = server.client.post("/v1/embeddings", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert "the body is not UTF-8, as JSON has to be: the byte at" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings/", {"input": "a"}),
        ("//v1/embeddings", {"input": "a"}),
        ("/v1//embeddings//", {"input": "a"}),
        ("/embed/", {"inputs": "a"}),
        ("//", {"inputs": "a"}),
        ("/v1/embed/", {"texts": ["a"]}),
        ("/api/embed/", {"input": "a"}),
        ("/rerank/", {"query": "a", "texts": ["b"]}),
        ("/v1/prompts/preview/", {"input": "a"}),
    ],
)
def test_slashes_too_many_are_served_and_never_redirected(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.client.post(f"http://testserver{path}", json=body, follow_redirects=False)
    assert answer.status_code == 200, answer.text
    assert server.client.get("http://testserver/v1//models/", follow_redirects=False).status_code == 200


def test_slashes_too_many_need_a_key_too() -> None:
    with (own := Server(api_keys="sk-one", metrics_key="sk-two")).client:
        for path in ("//v1/models", "/v1/models/", "/metrics/", "//metrics", "/docs/", "/v1/embeddings/"):
            url = f"http://testserver{path}"
            assert own.client.get(url, follow_redirects=False).status_code == 401, path
        assert own.client.get("/livez/").status_code == 200


def test_the_page_of_the_api_has_all_of_it_and_loads_nothing(server: Server) -> None:
    answer = server.client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy
    assert not re.search(r"<script|src=|@import|url\(|<link|https?:", answer.text)
    for path, methods in server.client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in answer.text
            for content in operation.get("requestBody", {}).get("content", {}).values():
                for field in content["schema"]["properties"]:
                    assert f"<td><code>{field}</code>" in answer.text, (path, field)
    assert server.client.get("/redoc").status_code == 404


def test_health_is_red_while_the_device_fails_and_green_again_after() -> None:
    worker = FakeWorker()
    with (server := Server(worker)).client:
        worker.broken = True
        assert server.embed(input="a").status_code == 500
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        worker.broken = False
        assert server.client.get("/readyz").status_code == 200


def test_a_worker_that_can_not_start_ends_the_process() -> None:
    worker = FakeWorker()
    worker.start_error = ValueError("no such device")
    with (server := Server(worker)).client:
        assert server.client.get("/readyz").status_code == 503
        assert server.embed(input="a").json()["error"]["code"] == "server_unavailable"
    assert [str(error) for error in server.fatal] == ["no such device"]


def test_draining_refuses_what_is_new(server: Server) -> None:
    drain(server.app)
    answer = server.embed(input="a")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert server.client.get("/readyz").status_code == 503
    assert server.metric("llm2vec_ready") == 0
    assert server.metric('llm2vec_rejected_total{reason="draining"}') == 1


def test_metrics_count_what_happened(server: Server) -> None:
    server.embed(input=["abc", "de"], instruction="Do:")
    server.embed(input="a", model="other")
    for line, value in {
        'llm2vec_requests_total{code="",route="/v1/embeddings",status="200"}': 1,
        'llm2vec_requests_total{code="model_not_found",route="/v1/embeddings",status="404"}': 1,
        "llm2vec_inputs_total": 2,
        'llm2vec_tokens_total{kind="text"}': 5,
        'llm2vec_tokens_total{kind="instruction"}': 10,
        'llm2vec_rejected_total{reason="invalid"}': 1,
        "llm2vec_queue_inputs": 0,
        "llm2vec_queue_tokens": 0,
        "llm2vec_ready": 1,
        "llm2vec_batch_inputs_sum": 2,
        "llm2vec_nonfinite_total": 0,
    }.items():
        assert server.metric(line) == value, line
    assert server.metric("llm2vec_build_info{") == 1


async def test_an_overloaded_server_says_when_to_come_again() -> None:
    async with overloaded() as (worker, client):
        refused = await client.post("/v1/embeddings", json={"input": "one too many"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000
        worker.gate.set()
        await until(lambda: len(worker.batches) == 2)
        assert (await client.post("/v1/embeddings", json={"input": "one too many"})).status_code == 200
    assert worker.batches == [["computing"], ["waiting one"], ["one too many"]]
