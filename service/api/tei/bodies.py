"""The requests, answers and errors of text-embeddings-inference (TEI): their shapes, and its words for errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from service.errors import EncodingError, InvalidRequest, OutOfMemory
from service.http.common import Dimensions, Name, RequestBody, Text
from service.http.error_responses import Dialect
from service.http.openapi import MEANINGS, TEXT_SCHEMA, TOKEN_IDS_SCHEMA, described

_INPUTS_SCHEMA = {
    "description": "a text or a list of texts; or token ids of this model, one text's or a list of such",
    "anyOf": [
        TEXT_SCHEMA,
        {"type": "array", "minItems": 1, "items": {"anyOf": [TEXT_SCHEMA, TOKEN_IDS_SCHEMA]}},
        TOKEN_IDS_SCHEMA,
    ],
}
_IDS_SCHEMA = {
    "description": "token ids of this model, one text's or a list of such",
    "anyOf": [
        TOKEN_IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": "integer"}}},
    ],
}


Inputs = Annotated[Any, WithJsonSchema(_INPUTS_SCHEMA)]
Direction = Annotated[
    Literal["left", "right"] | None, BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
]
Flag = Annotated[bool | None, Field(strict=True)]


class TruncateFields(RequestBody):
    """The fields for texts that are too long; null means absent."""

    truncate: Flag = None
    """cut a text that is too long; by default it is an error"""
    truncation_direction: Direction = None
    """the side that is cut, right by default; capitals do not matter"""


class EmbedAllBody(TruncateFields):
    """The body of `POST /embed_all`; null means absent."""

    inputs: Inputs
    prompt_name: Name | None = None
    """a prompt's name, or query or document"""


class EmbedBody(EmbedAllBody):
    """The body of `POST /embed`; null means absent."""

    normalize: Flag = None
    """vectors of length 1, the default, or as the model gives them"""
    dimensions: Dimensions = None


class _Sentences(BaseModel):
    source_sentence: Text
    sentences: list[Text]


class SimilarityParameters(TruncateFields):
    prompt_name: Name | None = None
    """a prompt's name, or query or document, for all sentences"""


class SimilarityBody(RequestBody):
    """The body of `POST /similarity`; null means absent."""

    inputs: Annotated[_Sentences, WithJsonSchema(_Sentences.model_json_schema())]
    parameters: Annotated[
        SimilarityParameters | None,
        WithJsonSchema({"anyOf": [SimilarityParameters.model_json_schema(), {"type": "null"}]}),
    ] = None


class RerankBody(TruncateFields):
    """The body of `POST /rerank`; null means absent."""

    query: Text
    texts: list[Text]
    raw_scores: Flag = None
    """the cosine, -1 to 1; by default it is moved to 0 to 1: (1 + cosine) / 2"""
    return_text: Flag = None
    """give each text again beside its score"""


class TokenizeBody(RequestBody):
    """The body of `POST /tokenize`; null means absent."""

    inputs: Text | list[Text]
    add_special_tokens: Flag = None
    """with the special tokens around each text, the default, or without them"""
    prompt_name: Name | None = None
    """a prompt's name, or query or document"""


class DecodeBody(RequestBody):
    """The body of `POST /decode`; null means absent."""

    ids: Annotated[Any, WithJsonSchema(_IDS_SCHEMA)]
    skip_special_tokens: Flag = None
    """leave special tokens out, the default"""


class TEIRank(BaseModel):
    """How close the text at `index` is to the query."""

    index: int
    score: float
    text: str | None = None


@dataclass(frozen=True)
class TEIToken:
    """One of a text's tokens: the bytes [start, stop) of prompt and text that it stands for."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TEIInfo(BaseModel):
    """The model that is served, and the server's limits."""

    class _ModelType(BaseModel):
        class _Embedding(BaseModel):
            pooling: str

        embedding: _Embedding

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: _ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


UNSUPPORTED = "unsupported_by_model"

ErrorType = Literal["Validation", "Tokenizer", "Empty", "Overloaded", "Backend", "Unhealthy"]


class TEIErrorAnswer(BaseModel):
    """An error's shape."""

    error: str
    error_type: ErrorType


_TYPE_OF_CODE: dict[str, ErrorType] = {
    "empty_input": "Empty",
    "invalid_token_ids": "Tokenizer",
    "invalid_input": "Tokenizer",
}
_TYPE_OF_STATUS: dict[int, ErrorType] = {
    424: "Backend",
    429: "Overloaded",
    500: "Backend",
    503: "Unhealthy",
    504: "Overloaded",
}


def _error_body(message: str, status: int, code: str, param: str | None) -> dict[str, Any]:
    kind = _TYPE_OF_CODE.get(code) or _TYPE_OF_STATUS.get(status, "Validation")
    return {"error": message, "error_type": kind}


TEI = Dialect(
    _error_body, {InvalidRequest: 422, EncodingError: 424, OutOfMemory: 424}, {"empty_input": 400, UNSUPPORTED: 424}
)

# The paths whose errors have this shape.
DIALECTS = {
    f"/{name}": TEI
    for name in (
        *("", "embed", "embed_all", "embed_sparse", "similarity", "rerank", "predict"),
        *("tokenize", "decode", "info"),
    )
}

ERRORS = described(
    TEIErrorAnswer,
    {
        **{status: about for status, about in MEANINGS.items() if status not in (404, 500)},
        400: "there is nothing to work on",
        422: "the request can't be served as it is",
        424: "the model gave no finite vector or ran out of memory, or it is not one that can do this",
        429: "overloaded, and still so after a wait: come again after `Retry-After` seconds",
        503: "loading or draining",
    },
)
