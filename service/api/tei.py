"""The dialect of text-embeddings-inference (TEI), which huggingface_hub speaks too: `/embed` and its like.

Translation only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from service.api import openai
from service.embedding.embedder import Embedder, EmbedInput, EmbedRequest, EmbedResult, LocatedTokens
from service.embedding.instructions import NONE, Chosen
from service.embedding.rows import Vector
from service.errors import EncodingError, InvalidRequest, OutOfMemory
from service.http.answers import encode_vectors, json_answer, json_array
from service.http.common import (
    Name,
    Text,
    answer_headers,
    are_ids,
    as_items,
    choose_instruction,
    ignored_fields,
    instructions_of,
    with_instruction,
)
from service.http.error_responses import MEANINGS, Dialect, described
from service.http.parts import parts_of
from service.http.requests import parse, read, read_document, require_ready, while_connected
from service.version import VERSION

_UNSUPPORTED = "unsupported_by_model"

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUTS_SCHEMA = {
    "description": "a text or a list of texts; or token ids of this model, one text's or a list of such",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, _IDS]}},
        _IDS,
    ],
}
_IDS_SCHEMA = {
    "description": "token ids of this model, one text's or a list of such",
    "anyOf": [_IDS, {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": "integer"}}}],
}


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Inputs = Annotated[Any, WithJsonSchema(_INPUTS_SCHEMA)]
Direction = Annotated[Literal["left", "right"] | None, BeforeValidator(_lower)]
Flag = Annotated[bool | None, Field(strict=True)]


class TruncateFields(BaseModel):
    """What is done with a text that is too long; null means absent."""

    model_config = ConfigDict(extra="allow")

    truncate: Flag = Field(None, description="cut what is too long; by default it is an error")
    truncation_direction: Direction = Field(None, description="the side that goes, right by default; in any case")


class EmbedAllBody(TruncateFields):
    """The body of `POST /embed_all`; null means absent."""

    inputs: Inputs
    prompt_name: Name | None = Field(None, description="a prompt's name, or query or document")


class EmbedBody(EmbedAllBody):
    """The body of `POST /embed`; null means absent."""

    normalize: Flag = Field(None, description="vectors of length 1, the default, or as the model gives them")
    dimensions: int | None = Field(None, strict=True, description="cut vectors to this many dimensions")


class _Sentences(BaseModel):
    source_sentence: Text
    sentences: list[Text]


class _SimilarityParameters(TruncateFields):
    prompt_name: Name | None = Field(None, description="a prompt's name, or query or document, for all sentences")


class SimilarityBody(BaseModel):
    """The body of `POST /similarity`; null means absent."""

    model_config = ConfigDict(extra="allow")

    inputs: Annotated[_Sentences, WithJsonSchema(_Sentences.model_json_schema())]
    parameters: Annotated[
        _SimilarityParameters | None,
        WithJsonSchema({"anyOf": [_SimilarityParameters.model_json_schema(), {"type": "null"}]}),
    ] = None


class RerankBody(TruncateFields):
    """The body of `POST /rerank`; null means absent."""

    query: Text
    texts: list[Text]
    raw_scores: Flag = Field(
        None, description="the cosine, -1 to 1; by default it is moved to 0 to 1: (1 + cosine) / 2"
    )
    return_text: Flag = Field(None, description="give each text again beside its score")


class TokenizeBody(BaseModel):
    """The body of `POST /tokenize`; null means absent."""

    model_config = ConfigDict(extra="allow")

    inputs: Text | list[Text]
    add_special_tokens: Flag = Field(
        None, description="all that the model reads, the default, or without what stands around every text"
    )
    prompt_name: Name | None = Field(None, description="a prompt's name, or query or document")


class DecodeBody(BaseModel):
    """The body of `POST /decode`; null means absent."""

    model_config = ConfigDict(extra="allow")

    ids: Annotated[Any, WithJsonSchema(_IDS_SCHEMA)]
    skip_special_tokens: Flag = Field(None, description="leave special tokens out, the default")


class TEIRank(BaseModel):
    """One of a list: how close the text at `index` is to the query."""

    index: int
    score: float
    text: str | None = None


class TEIToken(BaseModel):
    """One of a text's tokens: the bytes [start, stop) of prompt and text that it stands for."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TEIInfo(BaseModel):
    """What is served, and within which limits."""

    class _ModelType(BaseModel):
        class _Embedding(BaseModel):
            pooling: str

        embedding: _Embedding

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: _ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


ErrorType = Literal["Validation", "Tokenizer", "Empty", "Overloaded", "Backend", "Unhealthy"]


class TEIErrorAnswer(BaseModel):
    """An error's shape."""

    error: str
    error_type: ErrorType


def error_body(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The body that TEI's clients read."""
    return {"error": message, "error_type": _error_type(status, code)}


def _error_type(status: int, code: str) -> ErrorType:
    by_code: dict[str, ErrorType] = {
        "empty_input": "Empty",
        "invalid_token_ids": "Tokenizer",
        "invalid_input": "Tokenizer",
    }
    by_status: dict[int, ErrorType] = {
        424: "Backend",
        429: "Overloaded",
        500: "Backend",
        503: "Unhealthy",
        504: "Overloaded",
    }
    return by_code.get(code) or by_status.get(status, "Validation")


TEI = Dialect(
    error_body,
    {InvalidRequest: 422, EncodingError: 424, OutOfMemory: 424},
    {"empty_input": 400, _UNSUPPORTED: 424},
)

_PATHS = (
    "/",
    "/embed",
    "/embed_all",
    "/embed_sparse",
    "/similarity",
    "/rerank",
    "/predict",
    "/tokenize",
    "/decode",
    "/info",
)
DIALECTS = dict.fromkeys(_PATHS, TEI)

_ERRORS = described(
    TEIErrorAnswer,
    {
        **{status: about for status, about in MEANINGS.items() if status not in (404, 500)},
        400: "there is nothing to work on",
        422: "the request can't be served as it is",
        424: "the model gave no finite vector or ran out of memory, or it is not one that can do this",
        429: "overloaded, and still so after a wait: come again after `Retry-After` seconds",
        503: "loading or draining",
    },
)
router = APIRouter(tags=["text-embeddings-inference"], responses={401: _ERRORS[401]})


_documented = partial(openai.documented, errors=_ERRORS)


@router.post(
    "/embed",
    **_documented(
        EmbedBody,
        list[list[float]],
        {"inputs": ["A plane is taking off.", "A man is playing a flute."]},
        {"inputs": "how much protein a day", "prompt_name": "query", "dimensions": 256},
        {"inputs": ["A long text …"], "truncate": True, "truncation_direction": "Left"},
    ),
)
async def embed(request: Request) -> Response:
    """A vector for each text. `POST /` does the same."""
    began = time.perf_counter()
    return await _embed(request, await read(request, EmbedBody), began)


@router.post("/", include_in_schema=False)
async def embed_at_root(request: Request) -> Response:
    """What huggingface_hub asks of a bare URL: vectors, or how close sentences are."""
    began = time.perf_counter()
    require_ready(request)
    document = await read_document(request)
    if isinstance(document.get("inputs"), dict):
        return await _compare(request, parse(SimilarityBody, document), began)
    return await _embed(request, parse(EmbedBody, document), began)


# Called for these without FastAPI in between.
DIRECT = {("POST", "/embed"): embed, ("POST", "/"): embed_at_root}


@router.post(
    "/embed_all", **_documented(EmbedAllBody, list[list[list[float]]], {"inputs": ["A man is playing a flute."]})
)
async def embed_all(request: Request) -> Response:
    """A vector for each token of each text, special ones and instruction included, as the model gives it."""
    began = time.perf_counter()
    body = await read(request, EmbedAllBody)
    embedder = parts_of(request).embedder
    more = ignored_fields(embedder, body.model_extra or {})
    asked = _asked(request, _inputs(request, body), body, normalize=False, each_token=True)
    result = await while_connected(request, embedder.embed(asked))
    # Whether they are many is told by the first.
    by_size = sorted(result.vectors, key=np.size, reverse=True)
    writer = parts_of(request).writer
    headers = _headers(request, asked, result, began)
    return writer.answer(write_token_vectors(result.vectors), by_size, {**headers, **more})


@router.post(
    "/similarity",
    **_documented(
        SimilarityBody,
        list[float],
        {
            "inputs": {
                "source_sentence": "A plane is taking off.",
                "sentences": ["An air plane is taking off.", "A man is playing a flute."],
            }
        },
    ),
)
async def similarity(request: Request) -> Response:
    """The cosine of each sentence and the source sentence, which a message calls the input after the last sentence."""
    began = time.perf_counter()
    return await _compare(request, await read(request, SimilarityBody), began)


@router.post(
    "/rerank",
    **_documented(
        RerankBody,
        list[TEIRank],
        {
            "query": "how much protein a day",
            "texts": ["Women need 46 grams of protein a day.", "A man is playing a flute."],
            "return_text": True,
        },
    ),
)
async def rerank(request: Request) -> Response:
    """The texts by how close they are to the query, the closest first.

    Both are embedded, the query with the server's query instruction or that of the headers, the texts with none. A
    score is (1 + cosine) / 2, from 0 to 1 as a classifier's would be; with raw_scores it is the cosine itself, and the
    order the same. A message calls the query the input after the last text.
    """
    began = time.perf_counter()
    body = await read(request, RerankBody)
    embedder = parts_of(request).embedder
    more = ignored_fields(embedder, body.model_extra or {})
    if not body.texts:
        raise InvalidRequest("texts is empty: send at least one", "empty_input", "texts")
    chosen = choose_instruction(request)
    if chosen.source != "header":
        chosen = Chosen(instructions_of(request).query, "default")
    separator = embedder.settings.instruction_separator
    inputs = with_instruction(body.texts, NONE, separator) + with_instruction([body.query], chosen, separator)
    asked = _asked(request, inputs, body, param="texts", beside=1)
    result = await while_connected(request, embedder.embed(asked))

    cosines = _cosines(result)
    scores = cosines if body.raw_scores else (1 + cosines) / 2
    ranks: list[dict[str, Any]] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        text = {"text": body.texts[index]} if body.return_text else {}
        ranks.append({"index": index, **text, "score": scores[index]})
    return json_answer(ranks, {**_headers(request, asked, result, began), **more})


@router.post(
    "/tokenize",
    **_documented(TokenizeBody, list[list[TEIToken]], {"inputs": "how much protein a day", "prompt_name": "query"}),
)
async def tokenize(request: Request) -> Response:
    """The tokens of each text, before anything is cut, and the bytes of prompt and text that each stands for."""
    body = await read(request, TokenizeBody)
    embedder = parts_of(request).embedder
    more = ignored_fields(embedder, body.model_extra or {})
    chosen = choose_instruction(request, names={"prompt_name": body.prompt_name})
    inputs = with_instruction(as_items(body.inputs), chosen, embedder.settings.instruction_separator)
    asked = EmbedRequest(inputs, param="inputs", wait_seconds=embedder.settings.overload_wait_seconds)
    rows = await while_connected(request, embedder.locate(asked))
    around = body.add_special_tokens is not False
    # In a thread, as there can be hundreds of thousands of tokens.
    content = await asyncio.to_thread(_write_tokens, embedder, rows, around)
    return Response(content, 200, more, "application/json")


@router.post("/decode", **_documented(DecodeBody, list[str], {"ids": [[1, 2, 3]]}))
async def decode(request: Request) -> Response:
    """The texts of token ids."""
    body = await read(request, DecodeBody)
    embedder = parts_of(request).embedder
    more = ignored_fields(embedder, body.model_extra or {})
    ids = [body.ids] if are_ids(body.ids) else body.ids
    if not isinstance(ids, list) or not all(item == [] or are_ids(item) for item in ids):
        raise InvalidRequest("ids must be a list of token ids, or a list of such lists", "invalid_value", "ids")
    skip, wait_seconds = body.skip_special_tokens is not False, embedder.settings.overload_wait_seconds
    texts = await while_connected(request, embedder.decode(ids, skip, wait_seconds=wait_seconds))
    return json_answer(texts, more)


@router.get("/info", responses={200: {"model": TEIInfo}, 503: _ERRORS[503]})
async def info(request: Request) -> Response:
    """What is served, and within which limits."""
    require_ready(request)
    state = parts_of(request)
    settings = state.embedder.settings
    return json_answer(
        {
            "model_id": state.served_name,
            "model_sha": state.manifest.embedding_space,
            "model_dtype": state.life.facts.get("dtype", state.manifest.dtype),
            "served_model_name": state.served_name,
            "model_type": {"embedding": {"pooling": state.manifest.pooling}},
            # Tokens are limited, not requests; each has at least one.
            "max_concurrent_requests": settings.max_queued_tokens,
            "max_input_length": state.limits.max_input_tokens,
            "max_batch_tokens": state.limits.token_budget,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_inputs_per_request,
            "auto_truncate": settings.truncation == "reference",
            "tokenization_workers": settings.tokenizer_threads,
            "version": VERSION,
            "sha": None,
            "docker_label": None,
        }
    )


@router.post("/embed_sparse", responses={424: _ERRORS[424]})
async def embed_sparse(request: Request) -> Response:
    """Not for this model."""
    raise InvalidRequest("this model gives dense vectors, no sparse ones: use /embed", _UNSUPPORTED)


@router.post("/predict", responses={424: _ERRORS[424]})
async def predict(request: Request) -> Response:
    """Not for this model."""
    raise InvalidRequest("this model gives vectors, it is no classifier: use /embed, or /rerank", _UNSUPPORTED)


def write_vectors(vectors: Sequence[Vector]) -> Iterator[bytes]:
    """A JSON array of vectors, in slices."""
    return json_array(encode_vectors(vectors, "float"))


def write_token_vectors(texts: Sequence[Vector]) -> Iterator[bytes]:
    """A JSON array of arrays of vectors, in slices: texts are (tokens, width)."""
    before = b"["
    for vectors in texts:
        for part in write_vectors(list(vectors)):
            yield before + part
            before = b""
        before = b","
    yield b"]"


async def _embed(request: Request, body: EmbedBody, began: float) -> Response:
    embedder = parts_of(request).embedder
    more = ignored_fields(embedder, body.model_extra or {})
    normalize = body.normalize is not False
    asked = _asked(request, _inputs(request, body), body, normalize=normalize, dimensions=body.dimensions)
    result = await while_connected(request, embedder.embed(asked))
    writer = parts_of(request).writer
    headers = _headers(request, asked, result, began)
    return writer.answer(write_vectors(result.vectors), result.vectors, {**headers, **more})


async def _compare(request: Request, body: SimilarityBody, began: float) -> Response:
    embedder = parts_of(request).embedder
    parameters = body.parameters or _SimilarityParameters()
    more = ignored_fields(embedder, [*(body.model_extra or {}), *(parameters.model_extra or {})])
    sentences = body.inputs.sentences
    if not sentences:
        raise InvalidRequest("inputs.sentences is empty: send at least one", "empty_input", "inputs")
    chosen = choose_instruction(request, names={"prompt_name": parameters.prompt_name})
    separator = embedder.settings.instruction_separator
    # The source comes last, so that messages call each sentence by its own index.
    inputs = with_instruction([*sentences, body.inputs.source_sentence], chosen, separator)
    asked = _asked(request, inputs, parameters, beside=1)
    result = await while_connected(request, embedder.embed(asked))
    return json_answer(_cosines(result), {**_headers(request, asked, result, began), **more})


def _inputs(request: Request, body: EmbedAllBody) -> list[EmbedInput]:
    """The inputs, each with its instruction.

    Raises:
        InvalidRequest: if they are no texts or token ids, or ids where none are taken.
    """
    embedder = parts_of(request).embedder
    given = [body.inputs] if isinstance(body.inputs, str) or are_ids(body.inputs) else body.inputs
    if not isinstance(given, list):
        raise InvalidRequest("inputs must be a text, a list of texts, or token ids", "invalid_value", "inputs")
    ids = 0
    for index, item in enumerate(given):
        if isinstance(item, str):
            continue
        if item != [] and not are_ids(item):
            raise InvalidRequest(f"input index {index} must be a text or token ids", "invalid_value", "inputs")
        ids += 1
    if ids:
        if embedder.settings.token_ids == "reject":
            raise InvalidRequest("token ids are not taken: send texts", "invalid_token_ids", "inputs")
        embedder.metrics.token_id_inputs.labels("model").inc(ids)
    chosen = choose_instruction(request, names={"prompt_name": body.prompt_name})
    return with_instruction(given, chosen, embedder.settings.instruction_separator)


def _asked(
    request: Request,
    inputs: Sequence[EmbedInput],
    body: TruncateFields,
    *,
    normalize: bool = True,
    dimensions: int | None = None,
    each_token: bool = False,
    param: str = "inputs",
    beside: int = 0,
) -> EmbedRequest:
    embedder = parts_of(request).embedder
    return EmbedRequest(
        inputs,
        dimensions,
        overflow="truncate" if body.truncate else "error",
        keep="end" if body.truncation_direction == "left" else "start",
        normalize=normalize,
        each_token=each_token,
        wait_seconds=embedder.settings.overload_wait_seconds,
        param=param,
        beside=beside,
    )


def _cosines(result: EmbedResult) -> Vector:
    """The cosine of the last input's vector and that of each one before; all have length 1."""
    *vectors, last = result.vectors
    cosines: Vector = np.array([vector @ last for vector in vectors], dtype=np.float32).clip(-1, 1)
    return cosines


def _write_tokens(embedder: Embedder, rows: Iterable[LocatedTokens], around: bool) -> bytes:
    """The tokens of each row as JSON, with those around its text or without."""
    special = embedder.tokenizer.special_tokens()
    parts = []
    for row in rows:
        bytes_before = list(accumulate((len(character.encode()) for character in row.text), initial=0))
        spelled = embedder.tokenizer.tokens(row.token_ids)
        tokens: list[dict[str, Any]] = []
        for place in range(len(row.token_ids)) if around else row.own:
            start, stop = row.characters[place]
            own = place in row.own and start < stop
            tokens.append(
                {
                    "id": row.token_ids[place],
                    "text": row.text[start:stop] if own else spelled[place],
                    "special": place not in row.own and row.token_ids[place] in special,
                    "start": bytes_before[start] if own else None,
                    "stop": bytes_before[stop] if own else None,
                }
            )
        parts.append(orjson.dumps(tokens))
    return b"[%b]" % b",".join(parts)


def _headers(request: Request, asked: EmbedRequest, result: EmbedResult, began: float) -> dict[str, str]:
    return answer_headers(parts_of(request).embedder, asked.inputs, result, time.perf_counter() - began)
