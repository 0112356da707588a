"""TEI's `/tokenize` and `/decode`. Translation only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from service.api.tei.bodies import DecodeBody, TEIToken, TokenizeBody
from service.api.tei.dialect import ERRORS, tei_documented
from service.embedding.embedder import Embedder
from service.embedding.requests import EmbedRequest, LocatedTokens
from service.errors import InvalidRequest
from service.http.answers import json_answer
from service.http.call import Call
from service.http.common import are_ids, as_items

router = APIRouter(tags=["text-embeddings-inference"], responses={401: ERRORS[401]})


@router.post(
    "/tokenize",
    **tei_documented(TokenizeBody, list[list[TEIToken]], {"inputs": "how much protein a day", "prompt_name": "query"}),
)
async def tokenize(request: Request) -> Response:
    """The tokens of each text, before anything is cut, and the bytes of prompt and text behind each token."""
    call = await Call.read(request, TokenizeBody)
    body = call.body
    call.ignore(body.model_extra)
    inputs = call.inputs(as_items(body.inputs), call.choose(names={"prompt_name": body.prompt_name}))
    asked = EmbedRequest(inputs, param="inputs", wait_seconds=call.settings.overload_wait_seconds)
    rows = await call.while_connected(call.embedder.locate(asked))
    around = body.add_special_tokens is not False
    # In a thread, as there can be hundreds of thousands of tokens.
    content = await asyncio.to_thread(_write_tokens, call.embedder, rows, around)
    return Response(content, 200, call.headers, "application/json")


@router.post("/decode", **tei_documented(DecodeBody, list[str], {"ids": [[1, 2, 3]]}))
async def decode(request: Request) -> Response:
    """The texts of token ids."""
    call = await Call.read(request, DecodeBody)
    body = call.body
    call.ignore(body.model_extra)
    ids = [body.ids] if are_ids(body.ids) else body.ids
    if not isinstance(ids, list) or not all(item == [] or are_ids(item) for item in ids):
        raise InvalidRequest("ids must be a list of token ids, or a list of such lists", "invalid_value", "ids")
    skip, wait_seconds = body.skip_special_tokens is not False, call.settings.overload_wait_seconds
    texts = await call.while_connected(call.embedder.decode(ids, skip, wait_seconds=wait_seconds))
    return json_answer(texts, call.headers)


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
