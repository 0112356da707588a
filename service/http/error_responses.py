"""Errors → HTTP answers: one table of status codes, and a shape of the body for each dialect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from service import errors
from service.http.parts import outcome_of
from service.metrics import Metrics

# The most specific class that fits decides.
STATUS: dict[type[errors.ServiceError], int] = {
    errors.Unauthorized: 401,
    errors.RequestTimeout: 408,
    errors.RequestTooLarge: 413,
    errors.UnsupportedEncoding: 415,
    errors.ModelNotFound: 404,
    errors.InvalidRequest: 400,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.ClientGone: 499,
    errors.OutOfMemory: 503,
    errors.EncodingError: 500,
    errors.ServiceError: 500,
}

# Characters of an error's message, and of the name of the field that is to blame.
_MOST_CHARACTERS = 2000

# These codes of refused requests are counted one by one.
_KNOWN_REFUSALS = ("context_length_exceeded", "request_too_large", "request_timeout")


@dataclass(frozen=True)
class Dialect:
    """How one API words an error: the body, and the status of the cases in which the API differs."""

    body: Callable[[str, int, str, str | None], dict[str, Any]]
    status: Mapping[type[errors.ServiceError], int] = field(default_factory=dict)
    status_of_code: Mapping[str, int] = field(default_factory=dict)

    def status_for(self, error: errors.ServiceError) -> int:
        table = {**STATUS, **self.status}
        by_class = next(table[kind] for kind in type(error).__mro__ if kind in table)
        return self.status_of_code.get(error.code, by_class)


def openai_error_body(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The body that OpenAI's clients read: `{"error": {message, type, param, code}}`."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


OPENAI = Dialect(openai_error_body)


@dataclass(frozen=True)
class ErrorResponses:
    """Errors → answers, in the words of the API that the path belongs to, or in OpenAI's.

    The error for a path that does not exist names the known path that it ends with.
    """

    dialects: Mapping[str, Dialect]
    metrics: Metrics
    known_paths: Sequence[str]

    def install(self, app: FastAPI) -> None:
        """Answer every failure of a route so; FastAPI's `{"detail": …}` never leaves the server."""

        async def service_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, errors.ServiceError)
            return self.of(request, error)

        async def http_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
            outcome_of(request.scope).code = code
            path = request.scope["path"]
            message = f"{request.method} {path[:200]}: {error.detail}{_way_out(path, error, self.known_paths)}"
            return self._answer(path, message, error.status_code, code, None, dict(error.headers or {}))

        async def bug(request: Request, error: Exception) -> Response:
            return self.unexpected(request.scope["path"])

        app.add_exception_handler(Exception, bug)
        app.add_exception_handler(errors.ServiceError, service_error)
        app.add_exception_handler(HTTPException, http_error)

    def of(self, request: Request, error: errors.ServiceError) -> Response:
        """The answer to one of our own errors. It is counted, and its code and reason go into the outcome."""
        path = request.scope["path"]
        status = self._dialect(path).status_for(error)
        outcome = outcome_of(request.scope)
        outcome.code = error.code
        self._count_rejection(error)
        message = str(error)
        if isinstance(error, errors.EncodingError) and error.index is not None:
            message += f" (input index {error.index})"
        outcome.reason = message[:_MOST_CHARACTERS]
        return self._answer(path, message, status, error.code, error.param, _headers(error))

    def unexpected(self, path: str) -> Response:
        """The answer to a bug. It says nothing about the cause."""
        return self._answer(path, "the server failed on this request", 500, "internal_error", None, {})

    def _dialect(self, path: str) -> Dialect:
        return self.dialects.get(path, OPENAI)

    def _answer(
        self, path: str, message: str, status: int, code: str, param: str | None, headers: dict[str, str]
    ) -> Response:
        # These may hold a client's own words.
        message, param = message[:_MOST_CHARACTERS], param and param[:_MOST_CHARACTERS]
        body = orjson.dumps(self._dialect(path).body(message, status, code, param))
        return Response(body, status, headers, "application/json")

    def _count_rejection(self, error: errors.ServiceError) -> None:
        rejected = self.metrics.rejected
        if isinstance(error, errors.ClientGone):
            self.metrics.cancelled.labels("request").inc()
        elif isinstance(error, errors.InvalidRequest):
            rejected.labels(error.code if error.code in _KNOWN_REFUSALS else "invalid").inc()
        elif isinstance(error, (errors.Overloaded, errors.DeadlineExceeded, errors.Unauthorized)):
            rejected.labels(error.code).inc()


def _way_out(path: str, error: HTTPException, known_paths: Sequence[str]) -> str:
    """The advice for a path that was joined wrongly to the server's address, or asked with another method."""
    if error.status_code == 405 and error.headers:
        return f": use {error.headers['Allow']}"
    if error.status_code != 404:
        return ""
    meant = max((known for known in known_paths if path.endswith(known)), key=len, default="")
    return f": did you mean {meant}?" if meant else ": texts are embedded at /v1/embeddings, /docs shows all paths"


def _headers(error: errors.ServiceError) -> dict[str, str]:
    if isinstance(error, errors.Unauthorized):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, errors.RequestTimeout):
        return {"connection": "close"}  # the rest of it may still come
    if isinstance(error, errors.NonFiniteEmbedding):
        return {"x-should-retry": "false"}
    if isinstance(error, errors.OutOfMemory):
        return {"x-should-retry": "true", "retry-after": "1"}
    if isinstance(error, (errors.Overloaded, errors.Unavailable)):
        seconds = error.retry_after_seconds
        return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(round(seconds * 1000))}
    return {}
