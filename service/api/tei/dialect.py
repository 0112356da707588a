"""How text-embeddings-inference (TEI) words its errors, and on which paths."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel

from service.errors import EncodingError, InvalidRequest, OutOfMemory
from service.http.error_responses import MEANINGS, Dialect, described
from service.http.openapi import documented

UNSUPPORTED = "unsupported_by_model"

ErrorType = Literal["Validation", "Tokenizer", "Empty", "Overloaded", "Backend", "Unhealthy"]


class TEIErrorAnswer(BaseModel):
    """An error's shape."""

    error: str
    error_type: ErrorType


def error_body(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The body that TEI's clients read."""
    return {"error": message, "error_type": _error_type(status, code)}


def _error_type(status: int, code: str) -> ErrorType:
    by_code: dict[str, ErrorType] = {
        "empty_input": "Empty",
        "invalid_token_ids": "Tokenizer",
        "invalid_input": "Tokenizer",
    }
    by_status: dict[int, ErrorType] = {
        424: "Backend",
        429: "Overloaded",
        500: "Backend",
        503: "Unhealthy",
        504: "Overloaded",
    }
    return by_code.get(code) or by_status.get(status, "Validation")


TEI = Dialect(
    error_body,
    {InvalidRequest: 422, EncodingError: 424, OutOfMemory: 424},
    {"empty_input": 400, UNSUPPORTED: 424},
)

_PATHS = (
    "/",
    "/embed",
    "/embed_all",
    "/embed_sparse",
    "/similarity",
    "/rerank",
    "/predict",
    "/tokenize",
    "/decode",
    "/info",
)
DIALECTS = dict.fromkeys(_PATHS, TEI)

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
tei_documented = partial(documented, errors=ERRORS)
