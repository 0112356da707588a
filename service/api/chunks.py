"""`/v1/chunk_embeddings`: one long text read once, a vector for each chunk of it (late chunking). Translation only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from service.api.openai import ERRORS, EmbedFields, usage
from service.embedding.choices import EmbedDtype
from service.embedding.requests import ChunkRequest, ChunkResult, EmbedInput
from service.errors import InvalidRequest
from service.http.answers import EncodingFormat, encode_vectors
from service.http.call import Call
from service.http.common import Text
from service.http.openapi import documented

router = APIRouter(tags=["late chunking"], responses={401: ERRORS[401]})

_Place = Annotated[int, Field(strict=True, ge=0, le=1 << 31)]


class ChunkEmbeddingsBody(EmbedFields):
    """The body of `POST /v1/chunk_embeddings`; null means absent."""

    input: Text = Field(description="one text, no longer than the model reads")
    chunk_size: int | None = Field(None, ge=1, strict=True, description="tokens of a chunk; the last has the rest")
    spans: list[tuple[_Place, _Place]] | None = Field(
        None, min_length=1, description="the chunks instead: characters [start, end) of each; they may overlap"
    )
    instruction: Text | None = Field(None, description="put before the text and not pooled into any chunk")


class ChunkEmbeddingsAnswer(BaseModel):
    """The answer's shape."""

    class _Chunk(BaseModel):
        object: Literal["embedding"]
        index: int
        start: int
        end: int
        tokens: int
        embedding: list[float] | str

    class _Usage(BaseModel):
        prompt_tokens: int
        total_tokens: int
        truncated_inputs: int

    object: Literal["list"]
    data: list[_Chunk]
    model: str
    usage: _Usage


@router.post(
    "/v1/chunk_embeddings",
    **partial(documented, errors=ERRORS)(
        ChunkEmbeddingsBody,
        ChunkEmbeddingsAnswer,
        {"input": "Berlin is the capital of Germany. It has 3.7 million people.", "chunk_size": 8},
        {"input": "Berlin is the capital of Germany. It has 3.7 million people.", "spans": [[0, 33], [34, 60]]},
    ),
)
async def create_chunk_embeddings(request: Request) -> Response:
    """Embed one text with all of its context, and give a vector for each chunk of it."""
    call = await Call.read(request, ChunkEmbeddingsBody)
    body = call.body
    alias = call.alias(body.model)
    call.ignore(body.model_extra)
    if (body.chunk_size is None) == (body.spans is None):
        raise InvalidRequest("send either chunk_size or spans", "invalid_value", "chunk_size")
    asked = ChunkRequest(
        body.input,
        call.choose(body.instruction, body.names(), alias),
        body.chunk_size or 0,
        body.spans or (),
        body.dimensions,
        body.normalize is not False,
        body.priority,
        body.timeout_seconds(),
    )
    result = await call.embed_chunks(asked)
    slices = write_answer(
        result, call.parts.served_name, body.encoding_format or "float", body.embed_dtype or "float32"
    )
    return call.answer(slices, [EmbedInput(asked.text, asked.instruction)], result.embedded)


def write_answer(
    result: ChunkResult, model: str, encoding_format: EncodingFormat, dtype: EmbedDtype
) -> Iterator[bytes]:
    """The answer as JSON bytes, in slices."""
    before = b'{"object":"list","data":['
    index = 0
    for part in encode_vectors(result.embedded.vectors, encoding_format, dtype):
        items = [
            b'{"object":"embedding","index":%d,"start":%d,"end":%d,"tokens":%d,"embedding":%b}'
            % (place, *result.spans[place], result.tokens[place], vector)
            for place, vector in enumerate(part, index)
        ]
        yield before + b",".join(items)
        before = b","
        index += len(part)
    yield b'],"model":%b,"usage":%b}' % (orjson.dumps(model), orjson.dumps(usage(result.embedded)))
