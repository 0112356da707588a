"""Instructions to look at: those that have names, and what one does to a text, token by token."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.answers import json_answer
from service.api.common import alias_of, instructions_of
from service.api.openai import ERRORS, EmbeddingsBody, documented, to_embed_request
from service.api.requests import read, while_connected
from service.embedder import Embedder
from service.instructions import ROLES

router = APIRouter(tags=["prompts"], responses={401: ERRORS[401]})


class PromptsAnswer(BaseModel):
    """The roles and the named prompts."""

    class _Sides(BaseModel):
        query: str
        document: str

    roles: dict[str, str]
    prompts: dict[str, _Sides]
    default: str


class PreviewAnswer(BaseModel):
    """Each input as the model would read it, in tokens."""

    class _Row(BaseModel):
        class _Token(BaseModel):
            id: int
            token: str
            part: Literal["before", "text", "after"]
            pooled: bool

        index: int
        instruction: str
        source: str
        tokens: list[_Token]
        token_count: int
        pooled_count: int
        over_limit: int

    data: list[_Row]
    max_input_tokens: int


@router.get("/v1/prompts", responses={200: {"model": PromptsAnswer}})
async def list_prompts(request: Request) -> Response:
    """What input_type, prompt_name and task may say, and the instruction that each stands for."""
    known = instructions_of(request)
    answer = {
        "roles": {name: known.query if role == "query" else "" for name, role in ROLES.items()},
        "prompts": {
            name: {"query": prompt.query, "document": prompt.document} for name, prompt in known.prompts.items()
        },
        "default": known.default_name,
    }
    return json_answer(answer)


@router.post(
    "/v1/prompts/preview",
    **documented(EmbeddingsBody, PreviewAnswer, {"input": "how much protein a day", "input_type": "query"}),
)
async def preview(request: Request) -> Response:
    """The tokens of each input of an embeddings request, and which of them are pooled. Nothing is computed."""
    body = await read(request, EmbeddingsBody)
    embedder: Embedder = request.app.state.embedder
    alias = alias_of(request, body.model)
    asked = to_embed_request(request, body, alias)
    previews = await while_connected(request, embedder.preview(asked))
    rows: list[dict[str, Any]] = []
    for index, (item, one) in enumerate(zip(asked.inputs, previews, strict=True)):
        rows.append(
            {
                "index": index,
                "instruction": item.instruction.text,
                "source": item.instruction.source,
                "tokens": [
                    {"id": token.token_id, "token": token.token, "part": token.part, "pooled": token.pooled}
                    for token in one.tokens
                ],
                "token_count": len(one.tokens),
                "pooled_count": sum(token.pooled for token in one.tokens),
                "over_limit": max(len(one.tokens) - one.limit, 0),
            }
        )
    answer = {"data": rows, "max_input_tokens": embedder.limits.max_input_tokens}
    return json_answer(answer)
