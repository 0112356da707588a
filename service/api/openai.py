"""OpenAI's dialect: `/v1/embeddings` and `/v1/models`. Translation only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from service.api.answers import AnswerWriter, EncodingFormat, encode_vectors
from service.api.requests import read_body, require_ready, while_connected
from service.embedder import Embedder, EmbedRequest, EmbedResult
from service.errors import InvalidRequest, ModelNotFound

router = APIRouter(tags=["OpenAI"])

# What clients call the two roles. Queries get the server's query instruction, documents none.
INPUT_TYPES: dict[str, Literal["query", "document"]] = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
    "retrieval.passage": "document",
}

Text = Annotated[str, StringConstraints(strict=True)]


class EmbeddingsBody(BaseModel):
    """The body of `POST /v1/embeddings`; null means absent."""

    model_config = ConfigDict(extra="allow")

    input: Text | list[Text] = Field(description="a text, or a list of texts")
    model: str | None = Field(None, description="the served model's name")
    encoding_format: EncodingFormat | None = Field(
        None, description="base64 is little-endian float32; float is the default"
    )
    dimensions: int | None = Field(None, strict=True, description="cut vectors to this many dimensions")
    instruction: Text | None = Field(None, description="LLM2Vec instruction, put before each text and not pooled")
    input_type: str | None = Field(None, description=f"one of {', '.join(INPUT_TYPES)}")
    user: Any = Field(None, description="accepted and not used")


class _Embedding(BaseModel):
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
    data: list[_Embedding]
    model: str
    usage: _Usage


_DOCUMENTED: dict[str, Any] = {
    "responses": {200: {"model": EmbeddingsAnswer}},
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": EmbeddingsBody.model_json_schema(),
                    "example": {"input": ["A plane is taking off."], "model": "demo"},
                }
            },
        }
    },
}


@router.post("/v1/embeddings", **_DOCUMENTED)
@router.post("/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Embed texts."""
    require_ready(request)
    embedder: Embedder = request.app.state.embedder
    settings = embedder.settings
    body = parse_body(await read_body(request, settings.max_body_bytes))
    served = request.app.state.served_name
    if body.model is not None and body.model != served:
        raise ModelNotFound(body.model, served)
    ignored = sorted(body.model_extra or {})
    if ignored and settings.reject_unknown_fields:
        raise InvalidRequest(f"unknown fields: {', '.join(ignored)}", "unknown_field", ignored[0])
    if ignored:
        embedder.metrics.ignored_fields.inc(len(ignored))

    result = await while_connected(request, embedder.embed(to_embed_request(body, embedder)))

    headers = {
        "x-embedding-space": embedder.manifest.embedding_space,
        "x-compute-tokens": str(result.prompt_tokens),
        "x-truncated-inputs": str(result.truncated_inputs),
        "x-tokenization-time": _milliseconds(result.tokenize_seconds),
        "x-queue-time": _milliseconds(result.queue_seconds),
        "x-inference-time": _milliseconds(result.inference_seconds),
    }
    if ignored:
        # The names are the client's: nothing in them may end the header or begin another.
        headers["x-ignored-fields"] = ", ".join(re.sub(r"[^\x21-\x7e]", "?", name) for name in ignored)[:1024]
    slices = write_answer(result, served, body.encoding_format or "float")
    writer: AnswerWriter = request.app.state.writer
    return writer.answer(slices, result.vectors, headers)


# Called for these without FastAPI in between.
DIRECT = {("POST", path): create_embeddings for path in ("/v1/embeddings", "/embeddings")}


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The one model that is served."""
    return _json({"object": "list", "data": [_model(request)]})


@router.get("/v1/models/{name:path}")
async def get_model(request: Request) -> Response:
    """The served model by its name."""
    name = request.path_params["name"]
    if name != request.app.state.served_name:
        raise ModelNotFound(name, request.app.state.served_name)
    return _json(_model(request))


def parse_body(content: bytes) -> EmbeddingsBody:
    """A request's body.

    Raises:
        InvalidRequest: saying which field is wrong and what it takes.
    """
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", "invalid_json") from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object", "invalid_json")
    try:
        return EmbeddingsBody.model_validate(document)
    except ValidationError as error:
        issue = error.errors()[0]
        field = str(issue["loc"][0])
        if field == "input":
            message = "input must be a text or a list of texts"
            if _are_token_ids(document.get("input")):
                message += "; token ids are not taken (in LangChain: check_embedding_ctx_length=False)"
            raise InvalidRequest(message, "invalid_input", "input") from error
        raise InvalidRequest(f"{field}: {issue['msg']}", "invalid_value", field) from error


def to_embed_request(body: EmbeddingsBody, embedder: Embedder) -> EmbedRequest:
    """The request in the service's own terms; an explicit instruction wins over an input type.

    Raises:
        InvalidRequest: for an input type that does not exist.
    """
    texts = [body.input] if isinstance(body.input, str) else body.input
    if body.input_type is not None and body.input_type not in INPUT_TYPES:
        raise InvalidRequest(
            f"there is no input_type {body.input_type!r}: use one of {', '.join(INPUT_TYPES)}",
            "invalid_input_type",
            "input_type",
        )
    source: Literal["request", "input_type", "none"] = "none"
    instruction = ""
    if body.instruction is not None:
        source, instruction = "request", body.instruction
    elif body.input_type is not None:
        source = "input_type"
        if INPUT_TYPES[body.input_type] == "query":
            own = embedder.settings.query_instruction
            instruction = embedder.manifest.query_instruction if own is None else own
    return EmbedRequest(texts, [instruction] * len(texts), source, body.dimensions)


def write_answer(result: EmbedResult, model: str, encoding_format: EncodingFormat) -> Iterator[bytes]:
    """The answer as JSON bytes, in slices of some milliseconds' work each."""
    before = b'{"object":"list","data":['
    index = 0
    for part in encode_vectors(result.vectors, encoding_format):
        items = [
            b'{"object":"embedding","index":%d,"embedding":%b}' % (place, vector)
            for place, vector in enumerate(part, index)
        ]
        yield before + b",".join(items)
        before = b","
        index += len(part)
    tokens = result.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "truncated_inputs": result.truncated_inputs}
    yield b'],"model":%b,"usage":%b}' % (orjson.dumps(model), orjson.dumps(usage))


def _are_token_ids(given: Any) -> bool:
    first = given[0] if isinstance(given, list) and given else None
    return isinstance(first[0] if isinstance(first, list) and first else first, int)


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {
        "id": state.served_name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "llm2vec-service",
        "dimensions": state.manifest.width,
        "max_input_tokens": state.limits.max_input_tokens,
        "embedding_space": state.manifest.embedding_space,
    }


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"
