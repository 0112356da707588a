"""Cohere's dialect: `/v1/embed` and `/v2/embed`. Translation only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, WithJsonSchema

from service.embedding.requests import EmbedRequest, EmbedResult
from service.embedding.rows import Vector
from service.errors import InvalidRequest
from service.http.answers import encode_vectors, json_array
from service.http.call import Call
from service.http.common import Dimensions, ModelName, Name, RequestBody, Text, truncation
from service.http.error_responses import Dialect
from service.http.openapi import described, documented, with_example
from service.http.requests import missing
from service.logs import request_id

Version = Literal["1", "2"]
EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]

# Texts of a long answer that are written between two turns of the event loop.
_TEXTS_AT_ONCE = 64

_INPUTS_SCHEMA = {
    "anyOf": [
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["content"],
                "properties": {
                    "content": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    }
                },
            },
        },
        {"type": "null"},
    ]
}


class _Part(BaseModel):
    type: Name
    text: Text | None = None


class _Input(BaseModel):
    content: list[_Part] = Field(min_length=1)


class CohereEmbedBody(RequestBody):
    """The body of `POST /v1/embed` and `POST /v2/embed`; null means absent."""

    model: ModelName = None
    texts: list[Text] | None = None
    """the texts"""
    inputs: Annotated[list[_Input] | None, WithJsonSchema(_INPUTS_SCHEMA)] = None
    """or texts in parts, which are joined by line breaks"""
    images: list[Any] | None = None
    """not taken: the model reads text only"""
    input_type: Name | None = None
    """search_query, search_document, classification, clustering, or a prompt's name; v2 requires it, unless the
    instruction is said otherwise"""
    instruction: Text | None = None
    """not Cohere's: LLM2Vec instruction, put before each text and not pooled"""
    embedding_types: list[EmbeddingType] | None = None
    """float by default, which v1 then gives as a plain list. int8 is scaled by each vector's largest number, uint8 is
    that and 128; ubinary and binary are signs, eight to a number; base64 is of little-endian float32"""
    output_dimension: Dimensions = None
    max_tokens: int | None = Field(None, ge=1, strict=True)
    """no fewer than the server reads: texts are not cut before"""
    truncate: str | None = None
    """the part of a too long text that is cut: END (the default) or START; NONE refuses the text"""
    priority: int | None = Field(None, ge=0, le=999, strict=True)
    """above 0, the request yields to small ones whatever its size"""


class _Meta(BaseModel):
    class _ApiVersion(BaseModel):
        version: str

    class _BilledUnits(BaseModel):
        input_tokens: int

    api_version: _ApiVersion
    billed_units: _BilledUnits
    warnings: list[str] | None = Field(None, description="says so where texts were cut")


class CohereByTypeAnswer(BaseModel):
    """The answer's shape, for the documentation; answers are written straight to bytes."""

    class _Embeddings(BaseModel):
        float_: list[list[float]] | None = Field(None, alias="float")
        int8: list[list[int]] | None = None
        uint8: list[list[int]] | None = None
        binary: list[list[int]] | None = None
        ubinary: list[list[int]] | None = None
        base64: list[str] | None = None

    model_config = with_example(
        id="0c9ad0a6e9f94a0f8f5e6d1c2b3a4958",
        response_type="embeddings_by_type",
        texts=["A plane is taking off."],
        embeddings={"float": [[0.0213, -0.0071, 0.0149]], "int8": [[127, -42, 89]]},
        meta={"api_version": {"version": "2"}, "billed_units": {"input_tokens": 7}},
    )

    id: str
    response_type: Literal["embeddings_by_type"]
    texts: list[str]
    embeddings: _Embeddings
    meta: _Meta


class CohereFloatsAnswer(BaseModel):
    """The answer's shape where v1 is asked for no types."""

    model_config = with_example(
        id="0c9ad0a6e9f94a0f8f5e6d1c2b3a4958",
        response_type="embeddings_floats",
        texts=["A plane is taking off."],
        embeddings=[[0.0213, -0.0071, 0.0149]],
        meta={"api_version": {"version": "1"}, "billed_units": {"input_tokens": 7}},
    )

    id: str
    response_type: Literal["embeddings_floats"]
    texts: list[str]
    embeddings: list[list[float]]
    meta: _Meta


class CohereErrorAnswer(BaseModel):
    """An error's shape."""

    message: str


_DIALECT = Dialect(lambda message, status, code, param: {"message": message})
_ERRORS = described(CohereErrorAnswer)
router = APIRouter(tags=["Cohere"], responses={401: _ERRORS[401]})


@router.post(
    "/v1/embed",
    **documented(
        _ERRORS,
        CohereEmbedBody,
        CohereFloatsAnswer | CohereByTypeAnswer,
        {"texts": ["A plane is taking off.", "A man is playing a flute."], "input_type": "search_document"},
        {"texts": ["how much protein a day"], "input_type": "search_query", "embedding_types": ["float", "int8"]},
    ),
)
async def embed_v1(request: Request) -> Response:
    """Embed texts, as Cohere's first API does."""
    return await _embed(request, "1")


@router.post(
    "/v2/embed",
    **documented(
        _ERRORS,
        CohereEmbedBody,
        CohereByTypeAnswer,
        {"texts": ["how much protein a day"], "input_type": "search_query", "embedding_types": ["float"]},
        {
            "inputs": [{"content": [{"type": "text", "text": "A plane is taking off."}]}],
            "input_type": "search_document",
            "embedding_types": ["ubinary", "base64"],
            "output_dimension": 256,
        },
    ),
)
async def embed_v2(request: Request) -> Response:
    """Embed texts, as Cohere's second API does."""
    return await _embed(request, "2")


DIRECT = {("POST", "/v1/embed"): embed_v1, ("POST", "/v2/embed"): embed_v2}
DIALECTS = {path: _DIALECT for _, path in DIRECT}


async def _embed(request: Request, version: Version) -> Response:
    call = await Call.read(request, CohereEmbedBody)
    body = call.body
    alias = call.alias(body.model)
    call.ignore(body.model_extra)
    texts, param = _texts(body)
    asked = _to_embed_request(call, alias, texts, param, version)
    result = await call.embed(asked)
    default: list[EmbeddingType] = ["float"] if version == "2" else []  # without types, v1 gives one list of floats
    types = list(dict.fromkeys(body.embedding_types or default))
    slices = _write_answer(request_id.get() or "", result, texts, types, _meta(asked, result, version))
    return call.answer(slices, asked.inputs, result, [*result.vectors] * max(len(types), 1))


def _to_embed_request(
    call: Call[CohereEmbedBody], alias: str, texts: Sequence[str], param: str, version: Version
) -> EmbedRequest:
    body, most = call.body, call.parts.limits.max_input_tokens
    if body.max_tokens is not None and body.max_tokens < most:
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens}: texts are cut at the {most} tokens that the server reads and not "
            "before, leave it out",
            "invalid_value",
            "max_tokens",
        )
    chosen = call.choose(body.instruction, {"input_type": body.input_type}, alias)
    if version == "2" and chosen.source == "none":
        raise InvalidRequest(
            "input_type is missing: send search_query, search_document, classification, clustering, or a prompt's "
            "name (GET /v1/prompts lists them)",
            "invalid_input_type",
            "input_type",
        )
    keep = truncation(body.truncate or "END")
    return EmbedRequest(
        call.inputs(texts, chosen),
        body.output_dimension,
        overflow="truncate" if keep else "error",
        keep=keep or "start",
        lane="bulk" if body.priority else None,
        param=param,
        dimensions_param="output_dimension",
    )


def _write_answer(
    identity: str, result: EmbedResult, texts: Sequence[str], types: Sequence[EmbeddingType], meta: dict[str, Any]
) -> Iterator[bytes]:
    """The answer as JSON bytes, in slices of some milliseconds' work each. Without types it has one list of floats."""
    yield b'{"id":%b,"response_type":"embeddings_%b","texts":' % (
        orjson.dumps(identity),
        b"by_type" if types else b"floats",
    )
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    yield from json_array([orjson.dumps(text) for text in texts[at : at + _TEXTS_AT_ONCE]] for at in starts)
    yield b',"embeddings":'
    if types:
        before = b"{"
        for name in types:
            yield before + b'"%b":' % name.encode()
            yield from json_array(_encode_as(result.vectors, name))
            before = b","
        yield b"}"
    else:
        yield from json_array(encode_vectors(result.vectors, "float"))
    yield b',"meta":%b}' % orjson.dumps(meta)


def _texts(body: CohereEmbedBody) -> tuple[Sequence[str], str]:
    """The texts, and the name of their field."""
    if body.images:
        raise InvalidRequest("images are not taken: this model reads text only", "invalid_input", "images")
    if body.inputs is None:
        if body.texts is None:
            raise missing("texts", body.model_extra or {})
        return body.texts, "texts"
    if body.texts:
        raise InvalidRequest("send either texts or inputs", "invalid_input", "inputs")
    return [_text_of(item, index) for index, item in enumerate(body.inputs)], "inputs"


def _text_of(item: _Input, index: int) -> str:
    for part in item.content:
        if part.type != "text":
            raise InvalidRequest(
                f"input index {index} has a part of type {part.type!r}: only text is taken, this model reads nothing "
                "else",
                "invalid_input",
                "inputs",
            )
    return "\n".join(part.text or "" for part in item.content)


def _meta(asked: EmbedRequest, result: EmbedResult, version: Version) -> dict[str, Any]:
    meta: dict[str, Any] = {"api_version": {"version": version}, "billed_units": {"input_tokens": result.prompt_tokens}}
    if result.truncated_inputs:
        lost = "end" if asked.keep == "start" else "start"
        meta["warnings"] = [
            f"{result.truncated_inputs} of {len(asked.inputs)} texts had more tokens than the model reads and lost "
            f"their {lost}"
        ]
    return meta


def _encode_as(vectors: Sequence[Vector], name: EmbeddingType) -> Iterator[list[bytes]]:
    if name == "float" or name == "base64":
        return encode_vectors(vectors, name)
    return encode_vectors(vectors, "float", name)
