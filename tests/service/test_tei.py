"""The dialect of text-embeddings-inference over a fake device."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from model_store.templates import Template
from model_store.text.tokenizer import TextTokenizer, TokenizationError, TokenizedText
from service.api.tei.bodies import TEI
from service.embedding.rows import EmbedRow
from service.errors import (
    ClientGone,
    DeadlineExceeded,
    EncodingError,
    NonFiniteEmbedding,
    OutOfMemory,
    Overloaded,
    RequestTooLarge,
    Unavailable,
)
from service.server.app import drain
from tests.service.fakes import (
    BREAKS_THE_BATCH,
    CHARACTERS,
    NO_TOKENS,
    NOT_FINITE,
    OUT_OF_MEMORY,
    WIDTH,
    FakeTokenizer,
    FakeWorker,
    Server,
    expected,
    fake_manifest,
    fake_vector,
    overloaded,
)
from tests.tiny import VOCABULARY, tiny_tokenizer

Numbers = np.ndarray[Any, Any]

EMBEDDING_PATHS = ("/embed", "/")
PATHS = ("/embed", "/", "/embed_all", "/embed_sparse", "/similarity", "/rerank", "/predict", "/tokenize", "/decode")
SENTENCES = {"source_sentence": "a", "sentences": ["b", "c"]}


def post(server: Server, path: str, _headers: Any = None, **body: Any) -> Any:
    return server.client.post(path, json=body, headers=_headers)


def good(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def of_rows(*rows: Sequence[int], normalize: bool = True) -> Numbers:
    return np.array([fake_vector(EmbedRow(TokenizedText(list(row), 1), WIDTH, normalize)) for row in rows])


@pytest.mark.parametrize("path", EMBEDDING_PATHS)
def test_the_answer_is_a_bare_list_of_vectors(server: Server, path: str) -> None:
    np.testing.assert_allclose(good(post(server, path, inputs="hello")), [expected("hello")], rtol=1e-6)
    np.testing.assert_allclose(
        good(post(server, path, inputs=["one", "two"])), [expected("one"), expected("two")], rtol=1e-6
    )


def test_a_large_answer_is_written_in_slices() -> None:
    with (server := Server(max_inputs_per_request=3000)).client:
        texts = [f"text {number}" for number in range(3000)]
        answer = post(server, "/embed", inputs=texts)
        assert "content-length" not in answer.headers
        np.testing.assert_allclose(good(answer), [expected(text) for text in texts], rtol=1e-6)
        answer = post(server, "/embed_all", inputs=["ab", "x" * 400, "y" * 400, "z" * 400] * 5)
        assert "content-length" not in answer.headers
        vectors = good(answer)
        assert [len(rows) for rows in vectors] == [3, 401, 401, 401] * 5
        np.testing.assert_allclose(vectors[-1][-1], of_rows([ord("z")], normalize=False)[0], rtol=1e-6)


def test_token_ids_are_the_model_s_own(server: Server) -> None:
    ids, other = [104, 105], [106]
    whole = of_rows([1, *ids], [1, *other])
    np.testing.assert_allclose(good(post(server, "/embed", inputs=ids)), whole[:1], rtol=1e-6)
    np.testing.assert_allclose(good(post(server, "/embed", inputs=[ids, other])), whole, rtol=1e-6)
    mixed = good(post(server, "/embed", {"user-agent": "OpenAI/Python"}, inputs=["hi", other]))
    np.testing.assert_allclose(mixed, whole, rtol=1e-6)
    assert server.metric('llm2vec_token_id_inputs_total{decoder="model"}') == 4
    with (strict := Server(token_ids="reject")).client:
        answer = post(strict, "/embed", inputs=ids)
        assert answer.status_code == 422
        assert answer.json() == {"error": "token ids are not taken: send texts", "error_type": "Tokenizer"}


CUT = {"truncate": None, "truncation_direction": None}
NULLS = {**CUT, "prompt_name": None}


@pytest.mark.parametrize(
    ("path", "body", "nulls"),
    [
        ("/embed", {"inputs": "a"}, {**NULLS, "normalize": None, "dimensions": None}),
        ("/", {"inputs": "a"}, {**NULLS, "normalize": None, "dimensions": None}),
        ("/embed_all", {"inputs": "a"}, NULLS),
        ("/similarity", {"inputs": SENTENCES}, {"parameters": None}),
        ("/similarity", {"inputs": SENTENCES}, {"parameters": NULLS}),
        ("/", {"inputs": SENTENCES}, {"parameters": {}}),
        ("/rerank", {"query": "a", "texts": ["b"]}, {**CUT, "raw_scores": None, "return_text": None}),
        ("/tokenize", {"inputs": "a"}, {"add_special_tokens": None, "prompt_name": None}),
        ("/decode", {"ids": [1, 97]}, {"skip_special_tokens": None}),
    ],
)
def test_null_is_accepted_for_what_is_optional(
    server: Server, path: str, body: dict[str, Any], nulls: dict[str, Any]
) -> None:
    answer = post(server, path, **body, **nulls)
    assert good(answer) == good(post(server, path, **body))
    assert "x-ignored-fields" not in answer.headers


def test_normalize_and_dimensions(server: Server) -> None:
    cut = good(post(server, "/embed", inputs="a", dimensions=3))
    np.testing.assert_allclose(cut, [expected("a", dimensions=3)], rtol=1e-6)
    raw = good(post(server, "/embed", inputs="a", normalize=False))
    np.testing.assert_allclose(raw, [expected("a", normalize=False)], rtol=1e-6)
    assert np.linalg.norm(raw) > 1.5
    np.testing.assert_allclose(np.linalg.norm(cut), 1, rtol=1e-6)


def test_instructions() -> None:
    with (server := Server(instruction_separator="||")).client:
        cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
            ({}, {}, ""),
            ({}, {"prompt_name": "query"}, "Find:"),
            ({}, {"prompt_name": "document"}, ""),
            ({"x-instruction": "Größe:"}, {}, "Größe:"),
            ({"x-input-type": "query"}, {}, "Find:"),
            ({"x-instruction": "Other:"}, {"prompt_name": "query"}, "Find:"),
            ({}, {"inputs": "Mine: || a"}, "Mine:"),
        ]
        for headers, fields, instruction in cases:
            encoded = {name: value.encode() for name, value in headers.items()}
            answer = post(server, "/embed", encoded, **{"inputs": "a", **fields})
            text = " a" if "inputs" in fields else "a"
            np.testing.assert_allclose(good(answer), [expected(text, instruction)], rtol=1e-6, err_msg=str(fields))


def test_truncation_cuts_either_side_and_says_so(server: Server) -> None:
    text = "".join(chr(300 + place) for place in range(600))
    ids = list(map(ord, text))
    kept = 512 - 1
    for direction, own in (
        (None, ids[:kept]),
        ("right", ids[:kept]),
        ("Right", ids[:kept]),
        ("Left", ids[-kept:]),
        ("LEFT", ids[-kept:]),
    ):
        answer = post(server, "/embed", inputs=["a", text], truncate=True, truncation_direction=direction)
        np.testing.assert_allclose(good(answer)[1], of_rows([1, *own])[0], rtol=1e-6, err_msg=str(direction))
        assert answer.headers["x-truncated-inputs"] == "1"
        assert answer.headers["x-compute-tokens"] == "514"
    for path, body in (
        ("/embed_all", {"inputs": text, "truncate": True}),
        ("/rerank", {"query": "a", "texts": [text], "truncate": True}),
        ("/similarity", {"inputs": {"source_sentence": text, "sentences": ["b"]}, "parameters": {"truncate": True}}),
    ):
        answer = post(server, path, **body)
        assert answer.status_code == 200
        assert answer.headers["x-truncated-inputs"] == "1"
    assert server.metric("llm2vec_truncated_inputs_total") == 8


def test_headers_say_what_it_took(server: Server) -> None:
    for path, body in (
        ("/embed", {"inputs": "ab"}),
        ("/", {"inputs": SENTENCES}),
        ("/embed_all", {"inputs": "ab"}),
        ("/similarity", {"inputs": SENTENCES}),
        ("/rerank", {"query": "a", "texts": ["b"]}),
    ):
        answer = post(server, path, {"x-request-id": "mine-1"}, **body, colour="red")
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-embedding-space"] == fake_manifest().embedding_space
        assert answer.headers["x-truncated-inputs"] == "0"
        assert answer.headers["x-ignored-fields"] == "colour"
        assert answer.headers["x-instruction-sha"] == ("mixed" if path == "/rerank" else "none")
        for name in ("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time", "x-compute-tokens"):
            assert float(answer.headers[name]) >= 0
    answer = post(server, "/similarity", inputs=SENTENCES, parameters={"shape": 1}, colour="red")
    assert answer.headers["x-ignored-fields"] == "colour, shape"


def test_embed_all_gives_a_vector_for_each_token(server: Server) -> None:
    first, second = good(post(server, "/embed_all", inputs=["ab", "c"], prompt_name="document"))
    for row, ids in ((first, [1, 97, 98]), (second, [1, 99])):
        np.testing.assert_allclose(row, of_rows(*([token_id] for token_id in ids), normalize=False), rtol=1e-6)


def test_similarity_is_the_cosine_of_the_vectors(server: Server) -> None:
    sentences = ["b", "c", "a"]
    for prompt_name in (None, "query"):
        vectors = np.array(good(post(server, "/embed", inputs=["a", *sentences], prompt_name=prompt_name)))
        body: dict[str, Any] = {
            "inputs": {"source_sentence": "a", "sentences": sentences},
            "parameters": {"prompt_name": prompt_name},
        }
        for path in ("/similarity", "/"):
            cosines = good(post(server, path, **body))
            np.testing.assert_allclose(cosines, vectors[1:] @ vectors[0], atol=1e-6)
            assert cosines[2] == pytest.approx(1, abs=1e-6)
            assert cosines[2] <= 1


def test_rerank_orders_texts_by_their_cosine_with_the_query(server: Server) -> None:
    texts = [f"text {number}" for number in range(20)]
    query = np.array(good(post(server, "/embed", inputs="q", prompt_name="query"))[0])
    cosines = np.array(good(post(server, "/embed", inputs=texts))) @ query
    answer = post(server, "/rerank", query="q", texts=texts, raw_scores=True)
    ranks = good(answer)
    assert [rank["index"] for rank in ranks] == np.argsort(-cosines).tolist()
    assert ranks[0].keys() == {"index", "score"}
    np.testing.assert_allclose([rank["score"] for rank in ranks], sorted(cosines, reverse=True), atol=1e-6)

    moved = good(post(server, "/rerank", query="q", texts=texts, return_text=True))
    assert [rank["text"] for rank in moved] == [texts[rank["index"]] for rank in ranks]
    np.testing.assert_allclose(
        [rank["score"] for rank in moved], [(1 + rank["score"]) / 2 for rank in ranks], atol=1e-6
    )


def test_rerank_takes_the_query_s_instruction_from_headers_alone(server: Server) -> None:
    text = np.array(good(post(server, "/embed", inputs="t"))[0])
    for headers, instruction in (
        ({}, "Find:"),
        ({"x-instruction": "Classify:"}, "Classify:"),
        ({"x-input-type": "document"}, ""),
    ):
        rank = good(post(server, "/rerank", headers, query="q", texts=["t"], raw_scores=True))[0]
        np.testing.assert_allclose(rank["score"], expected("q", instruction) @ text, atol=1e-6)
    with (default := Server(default_input_type="document")).client:
        rank = good(post(default, "/rerank", query="q", texts=["t"], raw_scores=True))[0]
        np.testing.assert_allclose(rank["score"], expected("q", "Find:") @ text, atol=1e-6)


def test_documents_of_an_encoder_that_has_a_prompt_for_them_get_it() -> None:
    with (server := Server(described={"document_instruction": "title:"})).client:
        rank = good(post(server, "/rerank", query="q", texts=["t"], raw_scores=True))[0]
        np.testing.assert_allclose(rank["score"], expected("q", "Find:") @ expected("t", "title:"), atol=1e-6)
        listed = server.client.get("/v1/prompts").json()
        assert (listed["roles"]["passage"], listed["roles"]["query"]) == ("title:", "Find:")
        vectors = server.embed(input="t", input_type="document").json()["data"]
        np.testing.assert_allclose(vectors[0]["embedding"], expected("t", "title:"), rtol=1e-6)


def test_tokenize(server: Server) -> None:
    bos = {"id": 1, "text": "<bos>", "special": True, "start": None, "stop": None}
    letters = [
        {"id": 97, "text": "a", "special": False, "start": 0, "stop": 1},
        {"id": 252, "text": "ü", "special": False, "start": 1, "stop": 3},
        {"id": 98, "text": "b", "special": False, "start": 3, "stop": 4},
    ]
    assert good(post(server, "/tokenize", inputs="aüb")) == [[bos, *letters]]
    assert good(post(server, "/tokenize", inputs=["aüb", "a"], add_special_tokens=None, prompt_name=None)) == [
        [bos, *letters],
        [bos, letters[0]],
    ]
    assert good(post(server, "/tokenize", inputs="aüb", add_special_tokens=False)) == [letters]
    with_prompt = good(post(server, "/tokenize", inputs="a", prompt_name="query"))[0]
    assert [token["text"] for token in with_prompt] == ["<bos>", *"Find: a"]
    assert [token["start"] for token in with_prompt] == [None, *range(7)]
    assert (
        good(post(server, "/tokenize", inputs="a", prompt_name="query", add_special_tokens=False))[0] == with_prompt[1:]
    )
    assert server.worker.batches == []


def test_tokenize_gives_the_row_that_is_embedded() -> None:
    """With a real tokenizer and a template; without what stands around a text, its ids give the same row again."""
    for template in (Template(), Template("[INST] ", " [/INST]", strip=True)):
        tokenizer = TextTokenizer(tiny_tokenizer(), template, True, VOCABULARY)
        with (server := Server()).client:
            server.app.state.parts.embedder.tokenizer = tokenizer
            text = " how much protein\na day – Größe "
            for instruction in ("", "Given a query, retrieve"):
                headers = {"x-instruction": instruction}
                tokens = good(post(server, "/tokenize", headers, inputs=text))[0]
                row = tokenizer.encode_batch([text], [instruction])[0]
                assert [token["id"] for token in tokens] == row.token_ids
                assert [token["text"] for token in tokens if token["special"]] == ["<bos>"]
                whole = (f"{instruction} {text}" if instruction else text).encode()
                placed = [token for token in tokens if token["start"] is not None]
                for token in placed:
                    assert token["text"].encode() == whole[token["start"] : token["stop"]]
                shown = whole.rstrip() if template.strip else whole
                assert {byte for token in placed for byte in range(token["start"], token["stop"])} == {
                    *range(len(shown))
                }
            own = [token["id"] for token in good(post(server, "/tokenize", inputs=text, add_special_tokens=False))[0]]
            assert good(post(server, "/decode", ids=own)) == [text.rstrip() if template.strip else text]
            assert tokenizer.encode_batch([own], [""])[0].token_ids == tokenizer.encode_batch([text], [""])[0].token_ids


def test_tokenize_of_nothing_where_that_is_embedded() -> None:
    with (server := Server(empty_text="bos")).client:
        tokens = good(post(server, "/tokenize", inputs=["", "a"]))
        assert [[token["id"] for token in row] for row in tokens] == [[1], [1, 97]]
        assert tokens[0][0]["special"]
        assert good(post(server, "/tokenize", inputs="", add_special_tokens=False)) == [[]]


def test_decode(server: Server) -> None:
    assert good(post(server, "/decode", ids=[1, 97, 98])) == ["ab"]
    assert good(post(server, "/decode", ids=[[1, 97], [98], []], skip_special_tokens=None)) == ["a", "b", ""]
    assert good(post(server, "/decode", ids=[1, 97], skip_special_tokens=False)) == ["\x01a"]


def test_info() -> None:
    with (server := Server(served_name="mine", max_inputs_per_request=77, tokenizer_threads=3)).client:
        assert good(server.client.get("/info")) == {
            "model_id": "mine",
            "model_sha": fake_manifest().embedding_space,
            "model_dtype": "float32",
            "served_model_name": "mine",
            "model_type": {"embedding": {"pooling": "mean"}},
            "max_concurrent_requests": 1_000_000,
            "max_input_length": 512,
            "max_batch_tokens": 8192,
            "max_batch_requests": None,
            "max_client_batch_size": 77,
            "auto_truncate": False,
            "tokenization_workers": 3,
            "version": server.app.version,
            "sha": None,
            "docker_label": None,
        }


@pytest.mark.parametrize("path", EMBEDDING_PATHS)
@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"inputs": []}, 400, "Empty", "at least one"),
        ({"inputs": ["a", "  "]}, 400, "Empty", "index 1"),
        ({"inputs": ""}, 400, "Empty", "index 0"),
        ({"inputs": ["a", []]}, 400, "Empty", "index 1"),
        ({}, 422, "Validation", "inputs is missing"),
        ({"inputs": None}, 422, "Validation", "text, a list of texts"),
        ({"inputs": 7}, 422, "Validation", "text, a list of texts"),
        ({"inputs": ["a", None]}, 422, "Validation", "input index 1"),
        ({"inputs": ["a", ["b", "c"]]}, 422, "Validation", "input index 1"),
        ({"inputs": [True]}, 422, "Validation", "input index 0"),
        ({"inputs": [1.5]}, 422, "Validation", "input index 0"),
        ({"inputs": "a", "dimensions": 0}, 422, "Validation", "1 to 8"),
        ({"inputs": "a", "dimensions": 9}, 422, "Validation", "1 to 8"),
        ({"inputs": "a", "dimensions": "3"}, 422, "Validation", "dimensions"),
        ({"inputs": "a", "normalize": "no"}, 422, "Validation", "normalize"),
        ({"inputs": "a", "truncate": "END"}, 422, "Validation", "truncate"),
        ({"inputs": "a", "truncation_direction": "up"}, 422, "Validation", "truncation_direction"),
        ({"inputs": "a", "prompt_name": "poem"}, 422, "Validation", "prompt_name 'poem'"),
        ({"inputs": ["ok", "x" * 600]}, 422, "Validation", "maximum context length is 512 tokens"),
        ({"inputs": ["a"] * 2049}, 422, "Validation", "at most 2048"),
        ({"inputs": ["a", NO_TOKENS]}, 422, "Tokenizer", "input index 1"),
        ({"inputs": ["a", [7, -1]]}, 422, "Tokenizer", "input index 1: there is no token -1"),
        ({"inputs": [3_000_000_000]}, 422, "Tokenizer", "there is no token 3000000000"),
        ({"inputs": ["a", NOT_FINITE]}, 424, "Backend", "input index 1"),
        ({"inputs": ["a", OUT_OF_MEMORY, "b"]}, 424, "Backend", "input index 1"),
        ({"inputs": [BREAKS_THE_BATCH]}, 424, "Backend", "input index 0"),
    ],
)
def test_errors_have_tei_s_shape(
    server: Server, path: str, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    server.app.state.parts.embedder.tokenizer = CheckingTokenizer()
    is_error(post(server, path, **body), status, kind, message)


class CheckingTokenizer(FakeTokenizer):
    """Refuses ids that the model does not have, as the real one does."""

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                self._check(text, index)
        return super().encode_batch(texts, instructions)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self._check(token_ids, 0)
        return super().decode(token_ids, skip_special_tokens)

    @staticmethod
    def _check(token_ids: Sequence[int], index: int) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < CHARACTERS:
                raise TokenizationError(f"there is no token {token_id}", index)


def is_error(answer: Any, status: int, kind: str, message: str = "") -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error", "error_type"}
    assert body["error_type"] == kind
    assert message in body["error"]
    assert answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "message"),
    [
        ("/embed_all", {"inputs": []}, 400, "Empty", "at least one"),
        ("/embed_all", {"inputs": "x" * 600}, 422, "Validation", "input index 0"),
        ("/embed_all", {"inputs": NOT_FINITE}, 424, "Backend", ""),
        ("/similarity", {}, 422, "Validation", "inputs"),
        ("/similarity", {"inputs": "a"}, 422, "Validation", "inputs"),
        ("/similarity", {"inputs": {"source_sentence": "a"}}, 422, "Validation", "sentences"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty", "sentences is empty"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", ""]}}, 400, "Empty", "index 1"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", 1]}}, 422, "Validation", "sentences.1"),
        ("/similarity", {"inputs": SENTENCES, "parameters": {"truncate": 1}}, 422, "Validation", "truncate"),
        ("/similarity", {"inputs": SENTENCES, "parameters": {"prompt_name": "poem"}}, 422, "Validation", "poem"),
        ("/", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty", "sentences is empty"),
        ("/rerank", {"query": "a"}, 422, "Validation", "texts"),
        ("/rerank", {"query": "a", "texts": "b"}, 422, "Validation", "texts"),
        ("/rerank", {"query": None, "texts": ["b"]}, 422, "Validation", "query"),
        ("/rerank", {"query": "a", "texts": []}, 400, "Empty", "texts is empty"),
        ("/rerank", {"query": "a", "texts": ["b", " "]}, 400, "Empty", "index 1"),
        ("/rerank", {"query": "", "texts": ["b"]}, 400, "Empty", "index 1"),
        ("/rerank", {"query": "a", "texts": ["b", "x" * 600]}, 422, "Validation", "input index 1"),
        (
            "/rerank",
            {"query": "a", "texts": ["b"] * 2049},
            422,
            "Validation",
            "2049 inputs in one request: at most 2048",
        ),
        ("/rerank", {"query": "a", "texts": ["b", NOT_FINITE]}, 424, "Backend", "input index 1"),
        ("/tokenize", {"inputs": []}, 400, "Empty", "at least one"),
        ("/tokenize", {"inputs": ["a", ""]}, 400, "Empty", "index 1"),
        ("/tokenize", {"inputs": [1, 2]}, 422, "Validation", "inputs"),
        ("/tokenize", {"inputs": ["a", NO_TOKENS]}, 422, "Tokenizer", "input index 1"),
        ("/tokenize", {"inputs": ["a"] * 2049}, 422, "Validation", "at most 2048"),
        ("/tokenize", {"inputs": "x" * 300_000}, 422, "Validation", "at most 300000"),
        ("/tokenize", {"inputs": "a", "add_special_tokens": "yes"}, 422, "Validation", "add_special_tokens"),
        ("/tokenize", {"inputs": "a", "prompt_name": "poem"}, 422, "Validation", "poem"),
        ("/decode", {"ids": []}, 400, "Empty", "at least one"),
        ("/decode", {}, 422, "Validation", "ids"),
        ("/decode", {"ids": "a"}, 422, "Validation", "token ids"),
        ("/decode", {"ids": ["a"]}, 422, "Validation", "token ids"),
        ("/decode", {"ids": [[1], 2]}, 422, "Validation", "token ids"),
        ("/decode", {"ids": [[97], [97, -5]]}, 422, "Tokenizer", "ids index 1: there is no token -5"),
        ("/decode", {"ids": [[97]] * 2049}, 422, "Validation", "at most 2048"),
        ("/embed_sparse", {"inputs": "a"}, 424, "Backend", "dense vectors"),
        ("/predict", {"inputs": "a"}, 424, "Backend", "no classifier"),
    ],
)
def test_errors_of_the_other_endpoints(
    server: Server, path: str, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    server.app.state.parts.embedder.tokenizer = CheckingTokenizer()
    is_error(post(server, path, **body), status, kind, message)


def test_as_many_texts_are_compared_as_are_embedded() -> None:
    with (few := Server(max_inputs_per_request=3)).client:
        assert len(post(few, "/rerank", query="a", texts=["b"] * 3).json()) == 3
        assert len(post(few, "/similarity", inputs={"source_sentence": "a", "sentences": ["b"] * 3}).json()) == 3
        is_error(
            post(few, "/rerank", query="a", texts=["b"] * 4), 422, "Validation", "4 inputs in one request: at most 3"
        )


def test_errors_of_http(server: Server) -> None:
    for path in PATHS:
        is_error(server.client.request("DELETE", path), 405, "Validation", path)
        if path not in ("/embed_sparse", "/predict"):
            for content in (b"{", b"[1]", b"\xff\xfe", b""):
                is_error(server.client.post(path, content=content), 422, "Validation", "JSON")
    is_error(server.client.post("/info"), 405, "Validation")
    with (small := Server(max_body_bytes=2000)).client:
        for path in set(PATHS) - {"/embed_sparse", "/predict"}:
            is_error(small.client.post(path, content=b"x" * 3000), 413, "Validation", "2000 bytes")
    with (few := Server(max_tokens_per_request=100)).client:
        is_error(post(few, "/embed", inputs=["x" * 60, "x" * 60]), 422, "Validation", "at most 100")
    with (strict := Server(reject_unknown_fields=True)).client:
        is_error(post(strict, "/embed", inputs="a", colour="red"), 422, "Validation", "colour")


def test_what_can_not_be_mended_is_said_to_retrying_clients(server: Server) -> None:
    assert post(server, "/embed", inputs=NOT_FINITE).headers["x-should-retry"] == "false"
    assert post(server, "/embed", inputs=OUT_OF_MEMORY).headers["x-should-retry"] == "true"


def test_loading_and_draining() -> None:
    worker = FakeWorker()
    worker.start_error = ValueError("no such device")
    with (loading := Server(worker)).client:
        for path in set(PATHS) - {"/embed_sparse", "/predict"}:
            is_error(post(loading, path, inputs="a"), 503, "Unhealthy", "the server is")
        is_error(loading.client.get("/info"), 503, "Unhealthy")
    with (server := Server()).client:
        drain(server.app)
        answer = post(server, "/embed", inputs="a")
        is_error(answer, 503, "Unhealthy", "draining")
        assert answer.headers["retry-after"]


def test_a_deadline_and_a_bug(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = [DeadlineExceeded(), ZeroDivisionError("secret")]

    async def fail(*_: Any) -> None:
        raise failures.pop(0)

    monkeypatch.setattr(server.app.state.parts.embedder, "embed", fail)
    is_error(post(server, "/embed", inputs="a"), 504, "Overloaded", "deadline")
    answer = post(server, "/embed_all", inputs="a")
    is_error(answer, 500, "Backend")
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestTooLarge(1), 413),
        (Overloaded(1, 1.0), 429),
        (Unavailable(""), 503),
        (DeadlineExceeded(), 504),
        (ClientGone(), 499),
        (EncodingError(), 424),
        (NonFiniteEmbedding(), 424),
        (OutOfMemory(), 424),
    ],
)
def test_the_status_of_each_case(error: Any, status: int) -> None:
    assert TEI.status_for(error) == status


REQUESTS_OF_EACH_KIND: list[tuple[str, dict[str, Any]]] = [
    ("/embed", {"inputs": "one too many"}),
    ("/", {"inputs": "one too many"}),
    ("/embed_all", {"inputs": "one too many"}),
    ("/similarity", {"inputs": {"source_sentence": "one too many", "sentences": ["b"]}}),
    ("/rerank", {"query": "one too many", "texts": ["b"]}),
]


async def test_an_overload_that_stays_is_429() -> None:
    async with overloaded(overload_wait_seconds=0.05) as (_, client):
        for path, body in REQUESTS_OF_EACH_KIND:
            loop = asyncio.get_running_loop()
            began = loop.time()
            refused = await client.post(path, json=body)
            assert loop.time() - began >= 0.05
            is_error(refused, 429, "Overloaded", "overloaded")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000


async def test_a_short_overload_is_waited_out() -> None:
    async with overloaded() as (worker, client):
        waiting = [asyncio.create_task(client.post(path, json=body)) for path, body in REQUESTS_OF_EACH_KIND]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        assert worker.batches == [["computing"]]
        worker.gate.set()
        for task in waiting:
            assert (await task).status_code == 200


def test_everything_is_documented_with_its_errors(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    for path in set(PATHS) - {"/", "/embed_sparse", "/predict"}:
        operation = document["paths"][path]["post"]
        content = operation["requestBody"]["content"]["application/json"]
        assert content["schema"]["required"]
        assert content["examples"]
        assert operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith(
            "/TEIErrorAnswer"
        )
        assert "application/json" in operation["responses"]["200"]["content"]
        for example in content["examples"].values():
            good(post(server, path, **{**example["value"], **({"dimensions": 4} if path == "/embed" else {})}))
    assert "get" in document["paths"]["/info"]
    references = [value["$ref"] for value in objects(document) if "$ref" in value]
    assert all(reference.startswith("#/components/schemas/") for reference in references)
    assert {reference.rpartition("/")[2] for reference in references} <= document["components"]["schemas"].keys()


def objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(item)
