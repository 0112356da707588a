"""Anything at all as a request, a frame between processes or a setting: a clear answer, never a 5xx, never a hang.

FUZZ_EXAMPLES is how many cases each test tries.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from service.errors import StartupError
from service.processes.wire import Splitter, Submit, Vectors, decode, encode
from service.settings import Settings, load_settings
from tests.service.fakes import CHARACTERS, Server

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=5000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize=EXAMPLES == 200,
)

SCALARS = some.none() | some.booleans() | some.integers(-(2**63), 2**64 - 1) | some.floats() | some.text(max_size=30)
ANYTHING = some.recursive(
    SCALARS, lambda inner: some.lists(inner, max_size=5) | some.dictionaries(some.text(max_size=8), inner, max_size=5)
)
TOKEN_IDS = some.lists(some.integers(-5, 2**22), min_size=1, max_size=8)
ITEM = (
    some.text(max_size=20)
    | TOKEN_IDS
    | some.lists(some.text(max_size=8), min_size=2, max_size=2)
    | some.fixed_dictionaries(
        {"text": some.text(max_size=10)}, optional={"instruction": SCALARS, "input_type": SCALARS}
    )
)
NAMED = (
    some.sampled_from(("query", "document", "float", "base64", "int8", "NONE", "END", "mean", "auto", "bulk")) | SCALARS
)
FIELDS: Any = some.fixed_dictionaries(
    {"input": some.lists(ITEM, max_size=5) | ITEM | ANYTHING},
    optional=dict.fromkeys(
        (
            "model",
            "dimensions",
            "encoding_format",
            "embed_dtype",
            "normalize",
            "instruction",
            "input_type",
            "prompt_name",
            "truncate",
            "overflow",
            "priority",
            "timeout_ms",
            "token_ids",
        ),
        NAMED | some.integers(-1, 10) | ANYTHING,
    ),
)
SPANS = some.lists(some.lists(some.integers(-2, 12), max_size=3), max_size=4) | ANYTHING
CHUNKS: Any = some.fixed_dictionaries(
    {"input": some.text(max_size=12) | ANYTHING},
    optional={"spans": SPANS, "chunk_tokens": NAMED | some.integers(-1, 9)},
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    with server.client:
        yield server


def answers_clearly(server: Server, path: str, body: bytes) -> None:
    answer = server.client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 413, 504), (answer.status_code, answer.text, body)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def json_of(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # half of a surrogate pair, say: as another writer would put it
        import json

        return json.dumps(value).encode()


@fuzzed
@given(body=FIELDS)
@example(body={"input": [CHARACTERS]})
def test_embeddings(server: Server, body: Any) -> None:
    answers_clearly(server, "/v1/embeddings", json_of(body))


@fuzzed
@given(body=CHUNKS)
def test_chunks(server: Server, body: Any) -> None:
    answers_clearly(server, "/v1/chunk_embeddings", json_of(body))


@fuzzed
@given(body=some.binary(max_size=60) | ANYTHING.map(json_of))
def test_bodies_of_any_bytes(server: Server, body: bytes) -> None:
    answers_clearly(server, "/v1/embeddings", body)


@fuzzed
@given(header=some.binary(max_size=30), name=some.sampled_from(("x-instruction", "x-input-type", "x-request-id")))
def test_headers_of_any_text(server: Server, name: str, header: bytes) -> None:
    clean = bytes(byte for byte in header if 0x20 <= byte < 0x7F)  # what the test client can send
    answer = server.client.post("/v1/embeddings", json={"input": "a"}, headers={name.encode(): clean})
    assert answer.status_code in (200, 400)


@fuzzed
@given(
    keys=some.lists(some.binary(max_size=40), max_size=8),
    number=some.integers(0, 2**32 - 1),
    lane=some.sampled_from(("interactive", "bulk")),
    timeout=some.none() | some.floats(0, 1e9),
    caller=some.integers(0, 2**64 - 1),
    cuts=some.lists(some.integers(0, 500), max_size=6),
)
def test_frames_however_they_are_cut(
    keys: Any, number: int, lane: Any, timeout: float | None, caller: int, cuts: Any
) -> None:
    message = Submit(number, keys, lane, timeout_seconds=timeout, caller=caller)
    stream = encode(message) * 2
    splitter = Splitter()
    ends = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    frames = [frame for start, end in itertools.pairwise(ends) for frame in splitter.feed(stream[start:end])]
    assert list(map(decode, frames)) == [message, message]


@fuzzed
@given(content=some.binary(max_size=80))
def test_frames_of_any_bytes_are_read_or_refused_at_once(content: bytes) -> None:
    """Nothing else than an error of the kinds that bad bytes make; a count in a frame reserves no memory by itself."""
    try:
        message = decode(content)
    except (ValueError, KeyError, TypeError, IndexError, struct.error):
        return
    assert not isinstance(message, Vectors) or len(message.computed) <= len(content)


@fuzzed
@given(given_settings=some.dictionaries(some.sampled_from(sorted(Settings.model_fields)), SCALARS.map(str), max_size=4))
def test_settings_are_taken_or_refused_with_a_sentence(given_settings: dict[str, str]) -> None:
    try:
        load_settings(given_settings)
    except StartupError as error:
        assert "LLM2VEC_" in str(error)  # noqa: PT017  most are taken
