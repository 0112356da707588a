"""TEI's `/embed` and `/embed_all`, which huggingface_hub speaks too. Translation only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response

from service.api.tei.bodies import EmbedAllBody, EmbedBody, TruncateFields
from service.api.tei.dialect import ERRORS, UNSUPPORTED, tei_documented
from service.embedding.requests import EmbedInput, EmbedRequest
from service.embedding.rows import Vector
from service.errors import InvalidRequest
from service.http.answers import encode_vectors, json_array
from service.http.call import Call
from service.http.common import are_ids

router = APIRouter(tags=["text-embeddings-inference"], responses={401: ERRORS[401]})


AnyBody = TypeVar("AnyBody", bound=EmbedAllBody)


@router.post(
    "/embed",
    **tei_documented(
        EmbedBody,
        list[list[float]],
        {"inputs": ["A plane is taking off.", "A man is playing a flute."]},
        {"inputs": "how much protein a day", "prompt_name": "query", "dimensions": 256},
        {"inputs": ["A long text …"], "truncate": True, "truncation_direction": "Left"},
    ),
)
async def embed(request: Request) -> Response:
    """A vector for each text. `POST /` does the same."""
    return await embed_texts(await Call.read(request, EmbedBody))


@router.post("/embed_sparse", responses={424: ERRORS[424]})
async def embed_sparse(request: Request) -> Response:
    """Not for this model."""
    raise InvalidRequest("this model gives dense vectors, no sparse ones: use /embed", UNSUPPORTED)


@router.post(
    "/embed_all", **tei_documented(EmbedAllBody, list[list[list[float]]], {"inputs": ["A man is playing a flute."]})
)
async def embed_all(request: Request) -> Response:
    """A vector for each token of each text, special ones and instruction included, as the model gives it."""
    call = await Call.read(request, EmbedAllBody)
    call.ignore(call.body.model_extra)
    asked = to_embed_request(call, _inputs(call), call.body, normalize=False, each_token=True)
    result = await call.embed(asked)
    # The first of them tells the writer whether the answer is large.
    by_size = sorted(result.vectors, key=np.size, reverse=True)
    return call.answer(write_token_vectors(result.vectors), asked.inputs, result, by_size)


async def embed_texts(call: Call[EmbedBody]) -> Response:
    """The answer to `/embed`."""
    body = call.body
    call.ignore(body.model_extra)
    normalize = body.normalize is not False
    asked = to_embed_request(call, _inputs(call), body, normalize=normalize, dimensions=body.dimensions)
    result = await call.embed(asked)
    return call.answer(write_vectors(result.vectors), asked.inputs, result)


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


def _inputs(call: Call[AnyBody]) -> list[EmbedInput]:
    """The inputs, each with its instruction.

    Raises:
        InvalidRequest: if they are no texts or token ids, or ids where none are taken.
    """
    body = call.body
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
        if call.settings.token_ids == "reject":
            raise InvalidRequest("token ids are not taken: send texts", "invalid_token_ids", "inputs")
        call.parts.metrics.token_id_inputs.labels("model").inc(ids)
    chosen = call.choose(names={"prompt_name": body.prompt_name})
    return call.inputs(given, chosen)


def to_embed_request(
    call: Call[Any],
    inputs: Sequence[EmbedInput],
    body: TruncateFields,
    *,
    normalize: bool = True,
    dimensions: int | None = None,
    each_token: bool = False,
    param: str = "inputs",
    beside: int = 0,
) -> EmbedRequest:
    return EmbedRequest(
        inputs,
        dimensions,
        overflow="truncate" if body.truncate else "error",
        keep="end" if body.truncation_direction == "left" else "start",
        normalize=normalize,
        each_token=each_token,
        wait_seconds=call.settings.overload_wait_seconds,
        param=param,
        beside=beside,
    )
