"""The handlers of TEI's dialect, whose `/embed` huggingface_hub speaks too. Translation only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from service.api.tei.bodies import (
    ERRORS,
    UNSUPPORTED,
    DecodeBody,
    EmbedAllBody,
    EmbedBody,
    RerankBody,
    SimilarityBody,
    SimilarityParameters,
    TEIInfo,
    TEIRank,
    TEIToken,
    TokenizeBody,
    TruncateFields,
)
from service.embedding.embedder import Embedder
from service.embedding.instructions import NONE, Chosen
from service.embedding.requests import EmbedInput, EmbedRequest, EmbedResult, LocatedTokens
from service.embedding.rows import Vector
from service.errors import InvalidRequest
from service.http.answers import encode_vectors, json_answer, json_array
from service.http.call import Call
from service.http.common import are_ids
from service.http.openapi import documented
from service.http.parts import parts_of
from service.http.requests import parse, read_document, require_ready
from service.version import VERSION

router = APIRouter(tags=["text-embeddings-inference"], responses={401: ERRORS[401]})


@router.post(
    "/embed",
    **documented(
        ERRORS,
        EmbedBody,
        list[list[float]],
        {"inputs": ["A plane is taking off.", "A man is playing a flute."]},
        {"inputs": "how much protein a day", "prompt_name": "query", "dimensions": 256},
        {"inputs": ["A long text …"], "truncate": True, "truncation_direction": "Left"},
    ),
)
async def embed(request: Request) -> Response:
    """A vector for each text. `POST /` does the same."""
    return await _embed_texts(await Call.read(request, EmbedBody))


@router.post("/embed_sparse", responses={424: ERRORS[424]})
async def embed_sparse(request: Request) -> Response:
    """Not for this model."""
    raise InvalidRequest("this model gives dense vectors, no sparse ones: use /embed", UNSUPPORTED)


@router.post(
    "/embed_all", **documented(ERRORS, EmbedAllBody, list[list[list[float]]], {"inputs": ["A man is playing a flute."]})
)
async def embed_all(request: Request) -> Response:
    """A vector for each token of each text, special ones and instruction included, as the model gives it."""
    call = await Call.read(request, EmbedAllBody)
    call.ignore(call.body.model_extra)
    asked = _to_embed_request(call, _inputs(call), call.body, normalize=False, each_token=True)
    result = await call.embed(asked)
    # The first of them tells the writer whether the answer is large.
    by_size = sorted(result.vectors, key=np.size, reverse=True)
    return call.answer(_write_token_vectors(result.vectors), asked.inputs, result, by_size)


@router.post(
    "/similarity",
    **documented(
        ERRORS,
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
    """The cosine of each sentence and the source sentence, which messages call the input after the last sentence."""
    return await _compare(await Call.read(request, SimilarityBody))


@router.post(
    "/rerank",
    **documented(
        ERRORS,
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

    The query is embedded with the server's query instruction, or with the headers' one, and the texts with that of
    documents, which LLM2Vec's encoders have none of. A
    score is (1 + cosine) / 2, from 0 to 1 like a classifier's. With raw_scores it is the cosine itself, in the same
    order. Messages call the query the input after the last text.
    """
    call = await Call.read(request, RerankBody)
    body = call.body
    call.ignore(body.model_extra)
    if not body.texts:
        raise InvalidRequest("texts is empty: send at least one", "empty_input", "texts")
    known, chosen = call.parts.instructions, call.choose()
    if chosen.source != "header":
        chosen = Chosen(known.query, "default")
    documents = Chosen(known.document, "default") if known.document else NONE
    inputs = call.inputs(body.texts, documents) + call.inputs([body.query], chosen)
    asked = _to_embed_request(call, inputs, body, param="texts", beside=1)
    result = await call.embed(asked)
    cosines = _cosines(result)
    scores = cosines if body.raw_scores else (1 + cosines) / 2
    ranks: list[dict[str, Any]] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        text = {"text": body.texts[index]} if body.return_text else {}
        ranks.append({"index": index, **text, "score": scores[index]})
    return call.json(ranks, inputs, result)


@router.post("/predict", responses={424: ERRORS[424]})
async def predict(request: Request) -> Response:
    """Not for this model."""
    raise InvalidRequest("this model gives vectors, it is no classifier: use /embed, or /rerank", UNSUPPORTED)


@router.post(
    "/tokenize",
    **documented(
        ERRORS, TokenizeBody, list[list[TEIToken]], {"inputs": "how much protein a day", "prompt_name": "query"}
    ),
)
async def tokenize(request: Request) -> Response:
    """The tokens of each text, before anything is cut, and the bytes of prompt and text behind each token."""
    call = await Call.read(request, TokenizeBody)
    body = call.body
    call.ignore(body.model_extra)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    inputs = call.inputs(texts, call.choose(names={"prompt_name": body.prompt_name}))
    asked = EmbedRequest(inputs, param="inputs", wait_seconds=call.settings.overload_wait_seconds)
    rows = await call.while_connected(call.embedder.locate(asked))
    around = body.add_special_tokens is not False
    # In a thread, as there can be hundreds of thousands of tokens.
    content = await asyncio.to_thread(_write_tokens, call.embedder, rows, around)
    return Response(content, 200, call.headers, "application/json")


@router.post("/decode", **documented(ERRORS, DecodeBody, list[str], {"ids": [[1, 2, 3]]}))
async def decode(request: Request) -> Response:
    """The texts of token ids."""
    call = await Call.read(request, DecodeBody)
    body = call.body
    call.ignore(body.model_extra)
    ids = [body.ids] if are_ids(body.ids) else body.ids
    if not isinstance(ids, list) or not all(item == [] or are_ids(item) for item in ids):
        raise InvalidRequest("ids must be a list of token ids, or a list of such lists", "invalid_value", "ids")
    skip, wait_seconds = body.skip_special_tokens is not False, call.settings.overload_wait_seconds
    texts = await call.while_connected(call.embedder.decode(ids, skip, wait_seconds))
    return json_answer(texts, call.headers)


@router.post("/", include_in_schema=False)
async def embed_at_root(request: Request) -> Response:
    """huggingface_hub asks a bare URL for vectors, or for how close sentences are."""
    began = time.perf_counter()
    require_ready(request)
    document = await read_document(request)
    if isinstance(document.get("inputs"), dict):
        return await _compare(Call(request, parse(SimilarityBody, document), began))
    return await _embed_texts(Call(request, parse(EmbedBody, document), began))


@router.get("/info", responses={200: {"model": TEIInfo}, 503: ERRORS[503]})
async def info(request: Request) -> Response:
    """The model that is served, and the server's limits."""
    require_ready(request)
    parts = parts_of(request)
    settings = parts.settings
    return json_answer(
        {
            "model_id": parts.served_name,
            "model_sha": parts.manifest.embedding_space,
            "model_dtype": parts.life.facts.get("dtype", parts.manifest.dtype),
            "served_model_name": parts.served_name,
            "model_type": {"embedding": {"pooling": parts.manifest.pooling}},
            # Tokens are limited, not requests; each has at least one.
            "max_concurrent_requests": settings.max_queued_tokens,
            "max_input_length": parts.limits.max_input_tokens,
            "max_batch_tokens": parts.limits.token_budget,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_inputs_per_request,
            "auto_truncate": settings.truncation == "reference",
            "tokenization_workers": settings.tokenizer_threads,
            "version": VERSION,
            "sha": None,
            "docker_label": None,
        }
    )


# The middleware calls these functions itself, without FastAPI's routing.
DIRECT = {("POST", "/embed"): embed, ("POST", "/"): embed_at_root}


async def _embed_texts(call: Call[EmbedBody]) -> Response:
    body = call.body
    call.ignore(body.model_extra)
    normalize = body.normalize is not False
    asked = _to_embed_request(call, _inputs(call), body, normalize=normalize, dimensions=body.dimensions)
    result = await call.embed(asked)
    return call.answer(json_array(encode_vectors(result.vectors, "float")), asked.inputs, result)


def _write_token_vectors(texts: Sequence[Vector]) -> Iterator[bytes]:
    """A JSON array of arrays of vectors, in slices: texts are (tokens, width)."""
    before = b"["
    for vectors in texts:
        for part in json_array(encode_vectors(list(vectors), "float")):
            yield before + part
            before = b""
        before = b","
    yield b"]"


def _inputs(call: Call[Any]) -> list[EmbedInput]:
    body: EmbedAllBody = call.body
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


def _to_embed_request(
    call: Call[Any], inputs: Sequence[EmbedInput], body: TruncateFields, param: str = "inputs", **more: Any
) -> EmbedRequest:
    """The request in the service's own terms, of which `more` are further fields."""
    return EmbedRequest(
        inputs,
        overflow="truncate" if body.truncate else "error",
        keep="end" if body.truncation_direction == "left" else "start",
        wait_seconds=call.settings.overload_wait_seconds,
        param=param,
        **more,
    )


async def _compare(call: Call[SimilarityBody]) -> Response:
    body = call.body
    parameters = body.parameters or SimilarityParameters()
    call.ignore([*(body.model_extra or {}), *(parameters.model_extra or {})])
    sentences = body.inputs.sentences
    if not sentences:
        raise InvalidRequest("inputs.sentences is empty: send at least one", "empty_input", "inputs")
    chosen = call.choose(names={"prompt_name": parameters.prompt_name})
    # The source comes last, so that messages call each sentence by its own index.
    inputs = call.inputs([*sentences, body.inputs.source_sentence], chosen)
    result = await call.embed(_to_embed_request(call, inputs, parameters, beside=1))
    return call.json(_cosines(result), inputs, result)


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
        tokens: list[TEIToken] = []
        for place in range(len(row.token_ids)) if around else row.own:
            token_id, (start, stop) = row.token_ids[place], row.characters[place]
            if place in row.own and start < stop:
                text = row.text[start:stop]
                tokens.append(TEIToken(token_id, text, False, bytes_before[start], bytes_before[stop]))
            else:
                is_special = place not in row.own and token_id in special
                tokens.append(TEIToken(token_id, spelled[place], is_special, None, None))
        parts.append(orjson.dumps(tokens))
    return b"[%b]" % b",".join(parts)
