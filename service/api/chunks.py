"""`/v1/chunk_embeddings`: one long text read once, a vector for each chunk of it (late chunking). Translation only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from service.api.openai import ERRORS, Embedding, EmbeddingsAnswer, EmbedFields, write_answer
from service.embedding.requests import EmbedInput, EmbedRequest
from service.errors import InvalidRequest
from service.http.call import Call
from service.http.common import Text
from service.http.openapi import documented

router = APIRouter(tags=["late chunking"], responses={401: ERRORS[401]})

_Place = Annotated[int, Field(strict=True, ge=0, le=1 << 31)]


class ChunkEmbeddingsBody(EmbedFields):
    """The body of `POST /v1/chunk_embeddings`; null means absent."""

    input: Text
    """one text, no longer than the model reads"""
    chunk_size: int | None = Field(None, ge=1, strict=True)
    """tokens of a chunk; the last has the rest"""
    spans: list[tuple[_Place, _Place]] | None = Field(None, min_length=1)
    """the chunks instead: characters [start, end) of each; they may overlap"""
    instruction: Text | None = None
    """put before the text and not pooled into any chunk"""


class _Chunk(Embedding):
    start: int
    end: int
    tokens: int


class ChunkEmbeddingsAnswer(EmbeddingsAnswer):
    """The answer's shape."""

    data: Sequence[_Chunk]


@router.post(
    "/v1/chunk_embeddings",
    **documented(
        ERRORS,
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
    asked = EmbedRequest(
        [EmbedInput(body.input, call.choose(body.instruction, body.names(), alias))],
        body.dimensions,
        normalize=body.normalize is not False,
        lane=body.priority,
        timeout_seconds=body.timeout_seconds(),
    )
    work = call.embedder.embed_chunks(asked, body.chunk_size or 0, body.spans or (), call.note_lane)
    result = await call.measured(work)

    def place_of(chunk: int) -> bytes:
        return b'"start":%d,"end":%d,"tokens":%d,' % (*result.spans[chunk], result.tokens[chunk])

    slices = write_answer(result, call.parts.served_name, body, place_of)
    return call.answer(slices, asked.inputs, result)
