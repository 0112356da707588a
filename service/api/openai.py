"""OpenAI's dialect: `/v1/embeddings` and `/v1/models`, with our own further fields. Translation only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from model_store.manifest import ROLES
from model_store.text.openai_tokens import missing_id
from service.batching.scheduling import Lane
from service.embedding.choices import EmbedDtype, Overflow
from service.embedding.instructions import Chosen
from service.embedding.requests import EmbedInput, EmbedRequest, EmbedResult, TokenIds
from service.errors import InvalidRequest
from service.http.answers import EncodingFormat, encode_vectors, json_answer
from service.http.call import Call
from service.http.common import Dimensions, ModelName, Name, RequestBody, Text, are_ids, split_text, truncation
from service.http.openapi import TEXT_SCHEMA, TOKEN_IDS_SCHEMA, described, documented
from service.http.parts import Parts, parts_of
from service.http.requests import missing
from service.logs import log

_TEXT_OR_NULL = {"anyOf": [TEXT_SCHEMA, {"type": "null"}]}
_INPUT_SCHEMA = {
    "description": "a text or a list of texts; or token ids, one text's or a list of such; or pairs "
    "[instruction, text]; or objects of a text and how it is meant",
    "anyOf": [
        TEXT_SCHEMA,
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    TEXT_SCHEMA,
                    {
                        "type": "object",
                        "required": ["text"],
                        "properties": {"text": TEXT_SCHEMA, "instruction": _TEXT_OR_NULL, "input_type": _TEXT_OR_NULL},
                        "additionalProperties": False,
                    },
                    {"type": "array", "prefixItems": [TEXT_SCHEMA, TEXT_SCHEMA], "minItems": 2},
                    TOKEN_IDS_SCHEMA,
                ]
            },
        },
        TOKEN_IDS_SCHEMA,
    ],
}


class EmbedFields(RequestBody):
    """The fields that our own endpoints share; null means absent."""

    model: ModelName = None
    dimensions: Dimensions = None
    encoding_format: EncodingFormat | None = None
    """base64 is of little-endian numbers; float is the default"""
    embed_dtype: EmbedDtype | None = None
    """float32 by default; int8 is scaled by each vector's largest number, uint8 is that and 128; ubinary and binary are
    signs, eight to a number"""
    normalize: bool | None = None
    """vectors of length 1, the default, or as the model gives them"""
    input_type: Name | None = Field(None, description=f"one of {', '.join(ROLES)}, or a prompt's name")
    prompt_name: Name | None = None
    """as input_type; beside one, it says which of its sides counts"""
    task: Name | None = None
    """as prompt_name"""
    priority: Lane | None = None
    """by default by the number of inputs and tokens; interactive with half a batch of tokens at most"""
    timeout_ms: float | None = Field(None, gt=0, strict=True, allow_inf_nan=False)
    """a request still queued after this is dropped"""
    user: Any = None
    """accepted and not used"""

    def names(self) -> Mapping[str, str | None]:
        return {"input_type": self.input_type, "prompt_name": self.prompt_name, "task": self.task}

    def timeout_seconds(self) -> float | None:
        return None if self.timeout_ms is None else self.timeout_ms / 1000


class EmbeddingsBody(EmbedFields):
    """The body of `POST /v1/embeddings`; null means absent."""

    model_config = ConfigDict(json_schema_extra={"required": ["input"]})

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = None
    instruction: Text | list[Text | None] | None = None
    """LLM2Vec instruction, put before the text and not pooled; or one for each input"""
    truncate: bool | str | None = None
    """cut what is too long: true or END, START; false or NONE"""
    overflow: Overflow | None = None
    """for an input that is too long: error refuses it, truncate cuts it, mean averages its chunks"""
    token_ids: Literal["auto", "model", "cl100k_base", "o200k_base", "reject"] | None = None
    """whose ids an input of token ids holds; by default the server's setting decides"""


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class _Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    truncated_inputs: int


class EmbeddingsAnswer(BaseModel):
    """The answer's shape, for the documentation; answers are written straight to bytes."""

    object: Literal["list"]
    data: Sequence[Embedding]
    model: str
    usage: _Usage


class ModelAnswer(BaseModel):
    """The served model, under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    dimensions: int
    widths: list[int] | None = Field(
        None, description="the dimensions that its vectors may be cut to; left out where they are not known"
    )
    max_input_tokens: int
    embedding_space: str


class ModelsAnswer(BaseModel):
    """The one model that is served, under each of its names."""

    object: Literal["list"]
    data: list[ModelAnswer]


class ErrorAnswer(BaseModel):
    """An error's shape."""

    class _Error(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    error: _Error


ERRORS = described(ErrorAnswer)
router = APIRouter(tags=["OpenAI"], responses={401: ERRORS[401]})


@router.post(
    "/v1/embeddings",
    **documented(
        ERRORS,
        EmbeddingsBody,
        EmbeddingsAnswer,
        {"input": ["A plane is taking off.", "A man is playing a flute."]},
        {"input": "how much protein a day", "input_type": "query", "dimensions": 256, "encoding_format": "base64"},
    ),
)
@router.post("/embeddings", include_in_schema=False)
@router.post("/openai/v1/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Embed texts."""
    call = await Call.read(request, EmbeddingsBody)
    return await _embed(call, call.body.model)


@router.post(
    "/openai/deployments/{deployment}/embeddings",
    **documented(
        ERRORS,
        EmbeddingsBody,
        EmbeddingsAnswer,
        {"input": ["A plane is taking off.", "A man is playing a flute."]},
    ),
)
async def create_azure_embeddings(request: Request, deployment: str) -> Response:
    """Embed texts, as Azure's clients ask: the deployment is the model's name, whatever the body says."""
    return await _embed(await Call.read(request, EmbeddingsBody), deployment)


async def _embed(call: Call[EmbeddingsBody], model: str | None) -> Response:
    body = call.body
    alias = call.alias(model)
    call.ignore(body.model_extra)
    asked = to_embed_request(call, alias)
    if asked.token_ids != "model":
        call.headers["x-token-ids-decoded"] = asked.token_ids
    result = await call.embed(asked)
    return call.answer(write_answer(result, call.parts.served_name, body), asked.inputs, result)


# The middleware calls these functions itself, without FastAPI's routing.
DIRECT = {("POST", path): create_embeddings for path in ("/v1/embeddings", "/embeddings")}


@router.get("/v1/models", responses={200: {"model": ModelsAnswer}})
@router.get("/models", include_in_schema=False)
@router.get("/openai/v1/models", include_in_schema=False)
async def list_models(request: Request) -> Response:
    """The one model that is served, under each of its names."""
    parts = parts_of(request)
    return json_answer({"object": "list", "data": [_model(parts, name) for name in parts.model_names()]})


@router.get("/v1/models/{name:path}", responses={200: {"model": ModelAnswer}, 404: ERRORS[404]})
async def get_model(request: Request, name: str) -> Response:
    """The served model by one of its names."""
    parts = parts_of(request)
    parts.check_model(name, parts.instructions.alias_of(name, parts.served_name))
    return json_answer(_model(parts, name))


def to_embed_request(call: Call[EmbeddingsBody], alias: str) -> EmbedRequest:
    """The request in the service's own terms.

    Raises:
        InvalidRequest: for inputs, instructions or names that can't be served.
    """
    body = call.body
    if body.input is None:
        raise missing("input", body.model_extra or {})
    given = [body.input] if isinstance(body.input, str) or are_ids(body.input) else body.input
    if not isinstance(given, list):
        raise InvalidRequest("input must be a text, a list of texts, or token ids", "invalid_input", "input")
    one = body.instruction if isinstance(body.instruction, str) else None
    chosen = call.choose(one, body.names(), alias)
    choices = [chosen] * len(given)
    if isinstance(body.instruction, list):
        if len(body.instruction) != len(given):
            raise InvalidRequest(
                f"{len(body.instruction)} instructions for {len(given)} inputs: send one, or one for each",
                "invalid_value",
                "instruction",
            )
        choices = [chosen if text is None else Chosen(text, "request") for text in body.instruction]
    separator = call.settings.instruction_separator
    pairs = enumerate(zip(given, choices, strict=True))
    inputs = [_input(call.parts, index, item, choice, separator) for index, (item, choice) in pairs]
    keep = truncation(body.truncate)
    return EmbedRequest(
        inputs,
        body.dimensions,
        overflow=body.overflow or ("truncate" if keep else "error"),
        keep=keep or "start",
        normalize=body.normalize is not False,
        token_ids=_token_ids(call, inputs),
        lane=body.priority,
        timeout_seconds=body.timeout_seconds(),
    )


def write_answer(
    result: EmbedResult, model: str, body: EmbedFields, more_of: Callable[[int], bytes] = lambda place: b""
) -> Iterator[bytes]:
    """The answer as JSON bytes, in slices of some milliseconds' work each. `more_of` gives a vector further fields."""
    before = b'{"object":"list","data":['
    index = 0
    for part in encode_vectors(result.vectors, body.encoding_format or "float", body.embed_dtype or "float32"):
        items = [
            b'{"object":"embedding","index":%d,%b"embedding":%b}' % (place, more_of(place), vector)
            for place, vector in enumerate(part, index)
        ]
        yield before + b",".join(items)
        before = b","
        index += len(part)
    tokens = result.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "truncated_inputs": result.truncated_inputs}
    yield b'],"model":%b,"usage":%b}' % (orjson.dumps(model), orjson.dumps(usage))


def _input(parts: Parts, index: int, item: Any, chosen: Chosen, separator: str) -> EmbedInput:
    if isinstance(item, str) or item == [] or are_ids(item):
        return split_text(item, chosen, separator)
    if isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return EmbedInput(item[1], Chosen(item[0], "item"))
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return EmbedInput(item["text"], _item_instruction(parts, index, item) or chosen)
    raise InvalidRequest(
        f"input index {index} must be a text, token ids, a pair [instruction, text], or an object with a text",
        "invalid_input",
        "input",
    )


def _item_instruction(parts: Parts, index: int, item: dict[str, Any]) -> Chosen | None:
    fields = ("input_type", "prompt_name", "task")
    unknown = item.keys() - {"text", "instruction", *fields}
    wrong = [name for name in ("instruction", *fields) if not isinstance(item.get(name), (str, type(None)))]
    if unknown or wrong:
        raise InvalidRequest(
            f"input index {index}: {', '.join(map(repr, [*sorted(unknown), *wrong]))} can't be taken; an object has "
            f"a text and may have an instruction, an input_type, a prompt_name or a task, all of them texts",
            "invalid_input",
            "input",
        )
    if item.get("instruction") is not None:
        return Chosen(item["instruction"], "item")
    names = {name: item[name] for name in fields if item.get(name)}
    return Chosen(parts.instructions.named(names), "item") if names else None


def _token_ids(call: Call[EmbeddingsBody], inputs: Sequence[EmbedInput]) -> TokenIds:
    given = {index: item.text for index, item in enumerate(inputs) if not isinstance(item.text, str)}
    if not given:
        return "model"
    policy = call.body.token_ids or call.settings.token_ids
    if policy == "reject":
        raise InvalidRequest(
            "token ids are not taken: send texts (in LangChain: check_embedding_ctx_length=False)",
            "invalid_token_ids",
            "input",
        )
    if policy == "auto":
        policy = _whose(given, call.parts.manifest.vocabulary) if _by_openai_sdk(call.request) else "model"
    call.parts.metrics.token_id_inputs.labels(policy).inc(len(given))
    return policy


def _whose(given: Mapping[int, Sequence[int]], vocabulary: int) -> TokenIds:
    """Whose ids an SDK of OpenAI sends: cl100k_base's; or the model's own, if cl100k_base lacks one of them."""
    lacks = ((index, missing_id("cl100k_base", ids)) for index, ids in given.items())
    index, lacking = next((found for found in lacks if found[1] is not None), (0, None))
    if lacking is None:
        _tell_once("cl100k_base", "set LLM2VEC_TOKEN_IDS=model if they are this model's own")
        return "cl100k_base"
    for other, ids in given.items():
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            wrong = next(one for one in ids if not 0 <= one < vocabulary)
            raise InvalidRequest(
                f"input index {other}: this model has no token {wrong}, its ids are 0 to {vocabulary - 1}; and "
                f"cl100k_base, as which ids of OpenAI's clients are read otherwise, has no token {lacking} (input "
                f"index {index}). Send texts, or say in the field token_ids whose ids they are",
                "invalid_token_ids",
                "input",
            )
    _tell_once("the model's own", "set LLM2VEC_TOKEN_IDS=model, or requests with small ids alone are decoded")
    return "model"


@cache
def _tell_once(whose: str, way_out: str) -> None:
    """Log it once in a process; the header of each answer says it too."""
    log.warning("token ids of a client built on OpenAI's SDK are taken for %s: %s", whose, way_out)


def _by_openai_sdk(request: Request) -> bool:
    """Whether the sender is one of OpenAI's clients, or built on one: these make ids with tiktoken."""
    headers = request.headers
    agent = headers.get("user-agent", "")
    return "x-stainless-lang" in headers or agent.startswith(("OpenAI/", "AsyncOpenAI/"))


def _model(parts: Parts, name: str) -> dict[str, Any]:
    manifest = parts.manifest
    return {
        "id": name,
        "object": "model",
        "created": parts.started_at,
        "owned_by": "llm2vec-service",
        "root": parts.served_name,
        "dimensions": manifest.width,
        **({"widths": manifest.widths} if manifest.widths else {}),
        "max_input_tokens": parts.limits.max_input_tokens,
        "embedding_space": manifest.embedding_space,
    }
