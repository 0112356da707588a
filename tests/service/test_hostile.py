"""Requests that mean harm, over a fake device: compressed, deep, long, and with headers that are not what they seem."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from service.embedding.spans import tokens_of_spans
from service.errors import DeadlineExceeded, InvalidRequest
from tests.service.fakes import FakeTokenizer, Server


class Counting(FakeTokenizer):
    """Of whose tokens it is known that each is one character; and it must not be given much."""

    characters_per_token = 1

    def encode_batch(self, texts: Any, instructions: Any) -> Any:
        assert sum(map(len, texts)) < 100_000, "this is tokenized"
        return super().encode_batch(texts, instructions)


def with_tokenizer(**given: Any) -> Server:
    server = Server(**given)
    server.client.__enter__()
    server.app.state.parts.embedder.tokenizer = Counting()
    return server


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "x" * 500])
def test_compressed_bodies_are_refused_unread(server: Server, encoding: str) -> None:
    body = gzip.compress(b'{"input": "' + b"a" * 5_000_000 + b'"}')
    answer = server.client.post("/v1/embeddings", content=body, headers={"content-encoding": encoding})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_content_encoding"
    assert len(answer.text) < 500
    assert server.client.post("/embed", content=body, headers={"content-encoding": encoding}).status_code == 415


def test_identity_is_no_compression(server: Server) -> None:
    assert server.embed({"content-encoding": "identity"}, input="a").status_code == 200


@pytest.mark.parametrize("depth", [500, 2_000, 1_000_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/v2/embed", "/api/embed", "/v1/chunk_embeddings"])
def test_deep_bodies_are_refused(server: Server, depth: int, brackets: tuple[str, str], path: str) -> None:
    nested = brackets[0] * depth + "1" + brackets[1] * depth
    for field in ("input", "inputs", "texts", "x"):
        answer = server.client.post(path, content=f'{{"{field}": {nested}}}')
        assert answer.status_code < 500, answer.text[:300]  # 200 where it is an unknown field
        assert len(answer.text) < 5_000
    if depth > 1024 and path == "/v1/embeddings":
        assert answer.json()["error"]["code"] == ("invalid_json" if depth < 100_000 else "request_too_large")


def test_five_million_characters_are_refused_before_they_are_tokenized() -> None:
    own = with_tokenizer()
    for path, body in (
        ("/v1/embeddings", {"input": "a" * 5_000_000}),
        ("/v1/embeddings", {"input": "a" * 5_000_000, "overflow": "truncate"}),
        ("/v1/embeddings", {"input": "a" * 5_000_000, "overflow": "mean"}),
        ("/v1/embeddings", {"input": "a", "instruction": "b" * 5_000_000}),
        ("/embed", {"inputs": "a" * 5_000_000, "truncate": True}),
        ("/v1/chunk_embeddings", {"input": "a" * 5_000_000, "chunk_size": 5}),
        ("/v1/prompts/preview", {"input": "a" * 5_000_000}),
        ("/tokenize", {"inputs": "a" * 5_000_000}),
    ):
        answer = own.client.post(path, json=body)
        assert answer.status_code in (400, 422), (path, answer.text[:200])
        assert "5000000 characters" in answer.text
    own.client.__exit__(None, None, None)


def test_too_many_token_ids_are_refused_before_anything_is_made_of_them() -> None:
    own = with_tokenizer()
    for count, message in (
        (300_000, "requested at least 300000 tokens"),
        (4_000_000, "the body holds 3999999 values: at most 316384 are taken, send fewer inputs at once"),
    ):
        ids = b"[" + b"5," * (count - 1) + b"5]"
        for path, field in (("/v1/embeddings", b"input"), ("/embed", b"inputs")):
            answer = own.client.post(path, content=b'{"%b": %b}' % (field, ids))
            assert answer.status_code in (400, 422)
            assert message in answer.text
    own.client.__exit__(None, None, None)


def test_what_is_certainly_too_long_is_not_tokenized_and_what_may_fit_is() -> None:
    own = with_tokenizer()
    for path, body in (("/v1/embeddings", {}), ("/v1/chunk_embeddings", {"chunk_size": 5})):
        answer = own.client.post(path, json={"input": "a" * 500_000, **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 512 tokens, however you requested at least 500000 tokens" in answer.text
    exact = own.embed(input="a" * 512)  # and one for BOS
    assert "requested 513 tokens" in exact.text
    # White space at the end may be no tokens at all, by the template.
    assert "requested 601 tokens" in own.embed(input="a" + " " * 599).text
    assert own.embed(input="a" * 9_000, truncate="END").status_code == 200
    own.client.__exit__(None, None, None)


@pytest.mark.parametrize(
    "asked", ["a\r\nx-evil: 1", "a\nb", "é", "größe", "a" * 129, "a" * 60_000, "", " ", "a;b", "日本"]
)
def test_a_request_id_that_is_not_sane_is_replaced(server: Server, asked: str) -> None:
    answer = server.embed({"x-request-id": asked.encode()}, input="a")  # type: ignore[dict-item]
    own = answer.headers["x-request-id"]
    assert own != asked
    assert own.isalnum()
    assert "x-evil" not in answer.headers


@pytest.mark.parametrize("name", ["a\r\nx-evil: 1", "größe", "\x00", "a" * 100_000, "日本", "\x7f"])
def test_names_of_ignored_fields_can_not_make_headers(server: Server, name: str) -> None:
    answer = server.client.post("/v1/embeddings", content=json.dumps({"input": "a", name: 1}))
    assert answer.status_code == 200
    shown = answer.headers["x-ignored-fields"]
    assert len(shown) <= 1024
    assert shown.isascii()
    assert shown.isprintable()
    assert "x-evil" not in answer.headers


def test_instructions_in_headers_are_only_text(server: Server) -> None:
    for value in (b"a\xff\xfe", "größe".encode(), b"\t" * 100, b"x" * 50_000):
        answer = server.embed({"x-instruction": value}, input="a")  # type: ignore[dict-item]
        assert answer.status_code in (200, 400)
    assert server.embed({"x-input-type": "../../etc/passwd"}, input="a").status_code == 400


@pytest.mark.parametrize(
    "where",
    [
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/docs/../../etc/passwd",
        "//etc/passwd",
        "/v1/models//etc/passwd",
        "/%00",
        "/static/../pyproject.toml",
    ],
)
def test_paths_lead_to_no_files(server: Server, where: str) -> None:
    answer = server.client.get(where)
    assert answer.status_code == 404, answer.text
    assert "root:" not in answer.text


def test_fields_that_name_files_lead_to_none(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("tangerine")
    for field in ("model", "prompt_name", "input_type"):
        answer = server.client.post("/v1/embeddings", json={"input": "a", field: str(tmp_path / "secret")})
        assert answer.status_code in (400, 404)
        assert "tangerine" not in answer.text


def lines_of(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]


def test_every_answer_of_500_and_above_is_logged_once_with_its_reason(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Server()
    with own.client:
        for path, text, error, status in (
            ("/v1/embeddings", "tangerine", RuntimeError("about tangerine"), 500),
            ("/v1/prompts/preview", "tangerine", ValueError("tangerine"), 500),
            ("/v1/embeddings", "tangerine", DeadlineExceeded(), 504),
        ):

            async def fail(*_: Any, error: Exception = error) -> None:
                raise error from KeyError("tangerine")

            monkeypatch.setattr(own.app.state.parts.embedder, "embed", fail)
            monkeypatch.setattr(own.app.state.parts.embedder, "preview", fail)
            capfd.readouterr()
            answer = own.client.post(path, json={"input": text})
            assert answer.status_code == status
            lines = lines_of(capfd)
            (line,) = [line for line in lines if line["message"] == "request"]
            assert line["level"] in ("error", "warning")
            assert line["request_id"] == answer.headers["x-request-id"]
            assert (line["route"], line["status"]) == (path, status)
            assert line["code"]
            assert line["reason"]
            assert "tangerine" not in json.dumps(lines)


def test_the_place_of_a_bug_is_logged_without_its_message(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Server()
    with own.client:

        async def fail(*_: Any) -> None:
            raise ValueError("tangerine")

        monkeypatch.setattr(own.app.state.parts.embedder, "embed", fail)
        assert own.embed(input="a").status_code == 500
    (record,) = [record for record in caplog.records if record.getMessage() == "unexpected error"]
    places = record.fields["exception"]  # type: ignore[attr-defined]
    assert "ValueError" in places
    assert "test_hostile.py" in places
    assert "tangerine" not in places.replace('raise ValueError("tangerine")', "")


def test_chunks_are_counted_before_they_are_made() -> None:
    """Each of the 16,000 chunks would hold the instruction's 511 tokens again."""
    server = Server()
    body: dict[str, Any] = {"input": "y" * 16_000, "instruction": "x" * 509, "overflow": "mean"}
    with server.client:
        assert server.embed(**{**body, "input": "y" * 16}).status_code == 200
        tracemalloc.start()
        try:
            answer = server.embed(**body)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "request_too_large"
    assert most < 20_000_000


def test_spans_that_overlap_many_times_are_refused() -> None:
    server = Server()
    with server.client:
        text = "abcdefgh" * 50
        for count, status in ((15, 200), (40, 400)):
            body = {"input": text, "spans": [[0, len(text) - number] for number in range(count)]}
            answer = server.client.post("/v1/chunk_embeddings", json=body)
            assert answer.status_code == status
    assert answer.json()["error"]["param"] == "spans"


def test_a_span_holds_the_tokens_that_touch_it() -> None:
    """Against looking at every token; texts with tokens of no characters and of several."""
    chance = random.Random(0)
    for _ in range(300):
        ends = sorted(chance.choices(range(40), k=chance.randint(1, 20)))
        characters = [(0, 0), *zip([0, *ends], ends, strict=False), (0, 0)]
        own = range(1, len(characters) - 1)
        start = chance.randrange(40)
        end = start + chance.randrange(8)
        inside = [place for place in own if characters[place][0] < end and characters[place][1] > start]
        if inside:
            assert tokens_of_spans([(start, end)], own, characters) == [(inside[0], inside[-1] + 1)]
        else:
            with pytest.raises(InvalidRequest, match="index 0"):
                tokens_of_spans([(start, end)], own, characters)


def test_token_ids_do_not_spoil_the_guess_of_a_text_s_tokens(server: Server) -> None:
    embedder = server.app.state.parts.embedder
    before = embedder._admission.tokens_per_character
    for number in range(100):
        assert server.embed(input=[number] * 50, token_ids="model").status_code == 200
    assert embedder._admission.tokens_per_character == before


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/embeddings", "input"),
        ("/embed", "inputs"),
        ("/rerank", "texts"),
        ("/v2/embed", "texts"),
        ("/api/embed", "input"),
    ],
)
def test_inputs_are_counted_before_an_object_is_made_for_each(server: Server, path: str, field: str) -> None:
    """So their number is told, and not what is wrong with the last of them."""
    body: dict[str, Any] = {"query": "a", "model": "fake", "input_type": "search_document"}
    assert server.client.post(path, json={**body, field: ["a", {}]}).status_code in (400, 422)
    answer = server.client.post(path, json={**body, field: [*["a"] * 2999, {}]})
    assert answer.status_code in (400, 413, 422)
    assert "3000" in answer.text
