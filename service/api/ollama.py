"""Ollama's dialect: embeddings, and what its clients ask about a model. Translation only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, WithJsonSchema

from service.embedding.instructions import Chosen
from service.embedding.requests import EmbedInput, EmbedRequest, EmbedResult, Timings
from service.errors import InvalidRequest
from service.http.answers import encode_vectors, json_answer, json_array
from service.http.call import Call
from service.http.common import Dimensions, ModelName, RequestBody, Text
from service.http.error_responses import Dialect
from service.http.openapi import TEXT_SCHEMA, described, documented, with_example
from service.http.parts import Parts, parts_of
from service.http.requests import TEXT_FIELDS, missing, parse, read_document
from service.settings import Settings

# The release of Ollama that these endpoints follow, by which its clients know what exists. Ours is at /version.
_API_VERSION = "0.33.0"

# The tag of models without one.
_LATEST = ":latest"

_NOTHING = EmbedResult((), 0, 0, Timings())

_INPUT_SCHEMA = {
    "description": "a text or a list of texts; none, or an empty one alone, gives no vectors",
    "anyOf": [TEXT_SCHEMA, {"type": "array", "items": TEXT_SCHEMA}, {"type": "null"}],
}


class _Body(RequestBody):
    """The fields that the embedding endpoints share."""

    model: ModelName = None
    options: dict[str, Any] | None = None
    """accepted and not used: those with a value are named"""
    keep_alive: Any = None
    """accepted and not used: the model stays loaded"""


class OllamaEmbedBody(_Body):
    """The body of `POST /api/embed`; null means absent."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = None
    truncate: bool | None = Field(None, strict=True)
    """cut the end of a text that is too long, the default; or refuse the text"""
    dimensions: Dimensions = None


class OllamaEmbeddingsBody(_Body):
    """The body of `POST /api/embeddings`; null means absent."""

    prompt: Text | None = None
    """the text; none gives no vector"""


class OllamaShowBody(BaseModel):
    """The body of `POST /api/show`; null means absent."""

    model: str | None = Field(None, description="the model's name")
    name: str | None = Field(None, description="the same, as older clients say it")


class OllamaEmbedAnswer(BaseModel):
    """The answer's shape, for the documentation; answers are written straight to bytes."""

    model_config = with_example(
        model="demo",
        embeddings=[[0.0213, -0.0071, 0.0149]],
        total_duration=14143917,
        load_duration=0,
        prompt_eval_count=7,
    )

    model: str
    embeddings: list[list[float]]
    total_duration: int = Field(description="nanoseconds")
    load_duration: int = Field(description="0: the model is loaded before requests are taken")
    prompt_eval_count: int


class OllamaEmbeddingsAnswer(BaseModel):
    """The answer's shape."""

    model_config = with_example(embedding=[0.0213, -0.0071, 0.0149])

    embedding: list[float]


class _Details(BaseModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    context_length: int
    embedding_length: int


class _Description(BaseModel):
    modified_at: datetime
    details: _Details
    capabilities: list[str]


class OllamaTagsAnswer(BaseModel):
    """The one model that is served, under each of its names."""

    class _Model(_Description):
        name: str
        model: str
        size: int
        digest: str

    models: list[_Model]


class OllamaShowAnswer(_Description):
    """The facts about a model."""

    model_info: dict[str, Any]


class OllamaVersionAnswer(BaseModel):
    """The release of Ollama that these endpoints follow."""

    version: str


class OllamaErrorAnswer(BaseModel):
    """An error's shape."""

    error: str


_DIALECT = Dialect(lambda message, status, code, param: {"error": message})
_ERRORS = described(OllamaErrorAnswer)
router = APIRouter(tags=["Ollama"], responses={401: _ERRORS[401]})


@router.post(
    "/api/embed",
    **documented(
        _ERRORS,
        OllamaEmbedBody,
        OllamaEmbedAnswer,
        {"model": "demo", "input": ["A plane is taking off.", "A man is playing a flute."]},
        {"model": "demo:query", "input": "how much protein a day", "truncate": False, "dimensions": 256},
    ),
)
async def embed(request: Request) -> Response:
    """Embed texts."""
    call = await Call.read(request, OllamaEmbedBody)
    body = call.body
    texts = _texts(body.input, call.settings)
    inputs, chosen = _begin(call, "input", texts)
    asked = EmbedRequest(
        inputs,
        body.dimensions,
        overflow="error" if body.truncate is False else "truncate",
        wait_seconds=call.settings.overload_wait_seconds,
    )
    result = await call.embed(asked) if texts else _NOTHING
    slices = _write_answer(result, body.model or call.parts.served_name, call.seconds)
    return call.answer(slices, inputs or [EmbedInput("", chosen)], result)


@router.post(
    "/api/embeddings",
    **documented(
        _ERRORS, OllamaEmbeddingsBody, OllamaEmbeddingsAnswer, {"model": "demo", "prompt": "A plane is taking off."}
    ),
)
async def embeddings(request: Request) -> Response:
    """Embed one text. Superseded by `/api/embed`."""
    call = await Call.read(request, OllamaEmbeddingsBody)
    # A request without a prompt asks to load the model. An empty prompt is an error: a client that meant a text would
    # store a vector without numbers.
    texts = [] if call.body.prompt is None else [call.body.prompt]
    inputs, chosen = _begin(call, "prompt", texts)
    # Early releases of Ollama answered with the model's own vectors. Present ones give vectors of length 1 here too,
    # except for a few BERT models, and refuse a text that is too long.
    asked = EmbedRequest(inputs, wait_seconds=call.settings.overload_wait_seconds, param="prompt")
    result = await call.embed(asked) if texts else _NOTHING
    vectors = [vector for part in encode_vectors(result.vectors, "float") for vector in part]
    slices = iter([b'{"embedding":%b}' % (vectors[0] if vectors else b"[]")])
    return call.answer(slices, inputs or [EmbedInput("", chosen)], result)


@router.get("/api/tags", responses={200: {"model": OllamaTagsAnswer}})
async def list_models(request: Request) -> Response:
    """The one model that is served, under each of its names."""
    parts = parts_of(request)
    about = {
        "size": sum(file.size for file in parts.manifest.files.values()),
        "digest": parts.manifest.embedding_space,
        **_description(parts),
    }
    names = [name if ":" in name else name + _LATEST for name in parts.model_names()]
    return json_answer({"models": [{"name": name, "model": name, **about} for name in names]})


@router.post("/api/show", **documented(_ERRORS, OllamaShowBody, OllamaShowAnswer, {"model": "demo"}))
async def show_model(request: Request) -> Response:
    """The facts about the served model, by one of its names."""
    parts = parts_of(request)
    body = parse(OllamaShowBody, await read_document(request))
    name = body.model or body.name
    parts.check_model(name or "", _alias_of(parts, name))
    manifest = parts.manifest
    family = manifest.model_type
    about = {
        "general.architecture": family,
        "general.parameter_count": manifest.parameters,
        f"{family}.context_length": parts.limits.max_input_tokens,
        f"{family}.embedding_length": manifest.width,
        f"{family}.vocab_size": manifest.vocabulary,
    }
    return json_answer({**_description(parts), "model_info": about})


@router.get("/api/version", responses={200: {"model": OllamaVersionAnswer}})
async def version() -> Response:
    """The release of Ollama that these endpoints follow."""
    return json_answer({"version": _API_VERSION})


DIRECT = {("POST", "/api/embed"): embed, ("POST", "/api/embeddings"): embeddings}

# Clients also try paths that do not exist here; they read the reason in the same shape.
DIALECTS = {
    f"/api/{name}": _DIALECT
    for name in (
        *("embed", "embeddings", "tags", "show", "version"),
        *("chat", "copy", "create", "delete", "generate", "ps", "pull", "push"),
    )
}


def _write_answer(result: EmbedResult, model: str, seconds: float) -> Iterator[bytes]:
    """The answer to `/api/embed` as JSON bytes, in slices of some milliseconds' work each."""
    yield b'{"model":%b,"embeddings":' % orjson.dumps(model)
    yield from json_array(encode_vectors(result.vectors, "float"))
    yield b',"total_duration":%d,"load_duration":0,"prompt_eval_count":%d}' % (seconds * 1e9, result.prompt_tokens)


def _texts(given: Any, settings: Settings) -> Sequence[str]:
    if given is None or (given == "" and settings.empty_text == "error"):
        # Clients ask so to load a model: ollama-python sends an empty text if it is given none.
        return []
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("input must be a text or a list of texts", "invalid_input", "input")
    return texts


def _begin(call: Call[Any], text_field: str, texts: Sequence[str]) -> tuple[list[EmbedInput], Chosen]:
    """The inputs and their instruction, once the names and fields of the body are known to be right."""
    body: _Body = call.body
    extra = body.model_extra or {}
    if getattr(body, text_field) is None and not TEXT_FIELDS.isdisjoint(extra):
        # A request without texts asks to load the model. But this one's client would take the empty answer for vectors.
        raise missing(text_field, extra)
    alias = _alias_of(call.parts, body.model)
    options = [f"options.{name}" for name, value in (body.options or {}).items() if value is not None]
    call.ignore([*extra, *options])
    chosen = call.choose(alias=alias)
    return call.inputs(texts, chosen), chosen


def _alias_of(parts: Parts, model: str | None) -> str:
    """The role or prompt that a model's name asks for. `:latest` is the tag of models without one, and no role."""
    if model is not None and model != parts.served_name and model not in parts.instructions.aliases:
        model = model.removesuffix(_LATEST)
    return parts.instructions.alias_of(model, parts.served_name)


def _description(parts: Parts) -> dict[str, Any]:
    manifest = parts.manifest
    millions = manifest.parameters / 1e6
    details = {
        "parent_model": "",
        "format": "safetensors",
        "family": manifest.model_type,
        "families": [manifest.model_type],
        "parameter_size": f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.0f}M",
        "quantization_level": {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(manifest.dtype, ""),
        "context_length": parts.limits.max_input_tokens,
        "embedding_length": manifest.width,
    }
    started_at = datetime.fromtimestamp(parts.started_at, UTC).isoformat()
    return {"modified_at": started_at, "details": details, "capabilities": ["embedding"]}
