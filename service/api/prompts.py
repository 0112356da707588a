"""The named instructions, and the effect of an instruction on a text, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from model_store.manifest import ROLES
from model_store.text.prompts import Prompt
from service.api.openai import ERRORS, EmbeddingsBody, to_embed_request
from service.embedding.requests import EmbedInput, PreviewToken
from service.http.answers import json_answer
from service.http.call import Call
from service.http.openapi import documented
from service.http.parts import parts_of

router = APIRouter(tags=["prompts"], responses={401: ERRORS[401]})


class PromptsAnswer(BaseModel):
    """The roles and the named prompts; `lead` is what stands between template and text if there is an instruction."""

    roles: dict[str, str]
    prompts: dict[str, Prompt]
    default: str
    lead: str


class PreviewAnswer(BaseModel):
    """The tokens of each input: those that the model would read, and those that are cut."""

    class _Row(BaseModel):
        index: int
        instruction: str
        source: str
        tokens: list[PreviewToken]
        token_count: int
        pooled_count: int
        cut_count: int
        over_limit: int

    data: list[_Row]
    max_input_tokens: int


@router.get("/v1/prompts", responses={200: {"model": PromptsAnswer}})
async def list_prompts(request: Request) -> Response:
    """The values of input_type, prompt_name and task, and the instruction behind each."""
    known = parts_of(request).instructions
    answer = {
        "roles": {name: known.of(role) for name, role in ROLES.items()},
        "prompts": known.prompts,
        "default": known.default_name,
        "lead": known.lead,
    }
    return json_answer(answer)


@router.post(
    "/v1/prompts/preview",
    **documented(ERRORS, EmbeddingsBody, PreviewAnswer, {"input": "how much protein a day", "input_type": "query"}),
)
async def preview(request: Request) -> Response:
    """The tokens of each input of an embeddings request: where each came from, which are pooled and which are cut.

    Nothing is computed. An input that such a request would have refused for its length has an `over_limit`.
    """
    call = await Call.read(request, EmbeddingsBody)
    alias = call.alias(call.body.model)
    call.ignore(call.body.model_extra)
    asked = to_embed_request(call, alias)
    previews = await call.while_connected(call.embedder.preview(asked))
    # In a thread, as there can be hundreds of thousands of tokens.
    content = await asyncio.to_thread(_write_previews, asked.inputs, previews, call.parts.limits.max_input_tokens)
    return Response(content, 200, call.headers, "application/json")


def _write_previews(inputs: Sequence[EmbedInput], previews: Sequence[Sequence[PreviewToken]], limit: int) -> bytes:
    rows: list[dict[str, Any]] = []
    for index, (item, tokens) in enumerate(zip(inputs, previews, strict=True)):
        cut_count = sum(token.cut for token in tokens)
        token_count = len(tokens) - cut_count
        rows.append(
            {
                "index": index,
                "instruction": item.instruction.text,
                "source": item.instruction.source,
                "tokens": tokens,
                "token_count": token_count,
                "pooled_count": sum(token.pooled for token in tokens),
                "cut_count": cut_count,
                "over_limit": max(token_count - limit, 0),
            }
        )
    return orjson.dumps({"data": rows, "max_input_tokens": limit})
