"""Errors → HTTP answers: one table of status codes, and one shape for the body."""

from __future__ import annotations

import math
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from service import errors
from service.logs import log

# The most specific class that fits decides.
STATUS: dict[type[errors.ServiceError], int] = {
    errors.RequestTooLarge: 413,
    errors.ModelNotFound: 404,
    errors.InvalidRequest: 400,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.ClientGone: 499,
    errors.OutOfMemory: 503,
    errors.EncodingError: 500,
    errors.ServiceError: 500,
}


def status_of(error: errors.ServiceError) -> int:
    """The HTTP status of an error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def openai_error_body(message: str, status: int, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The body that OpenAI's clients read: `{"error": {message, type, param, code}}`."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every failure of a route in the API's own shape; FastAPI's `{"detail": …}` never leaves the server."""

    async def service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, errors.ServiceError)
        return service_error_response(request, error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        request.state.code = code
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _answer(message, error.status_code, code, None, dict(error.headers or {}))

    app.add_exception_handler(errors.ServiceError, service_error)
    app.add_exception_handler(HTTPException, http_error)


def service_error_response(request: Request, error: errors.ServiceError) -> Response:
    """The answer to one of our own errors, counted and, if the device is to blame, logged."""
    status = status_of(error)
    request.state.code = error.code
    _count_rejection(request, error)
    message = str(error)
    if isinstance(error, errors.EncodingError) and error.index is not None:
        message += f" (input index {error.index})"
    if isinstance(error, errors.EncodingError):
        log.error("answered %d: %s", status, message)
    return _answer(message, status, error.code, error.param, _retry_headers(error))


def unexpected_error_response() -> Response:
    """The answer to a bug: says nothing of its inside."""
    return _answer("the server failed on this request", 500, "internal_error", None, {})


def _answer(message: str, status: int, code: str, param: str | None, headers: dict[str, str]) -> Response:
    body = orjson.dumps(openai_error_body(message, status, code, param))
    return Response(body, status, headers, "application/json")


def _retry_headers(error: errors.ServiceError) -> dict[str, str]:
    if isinstance(error, errors.NonFiniteEmbedding):
        return {"x-should-retry": "false"}
    if isinstance(error, errors.OutOfMemory):
        return {"x-should-retry": "true", "retry-after": "1"}
    if isinstance(error, (errors.Overloaded, errors.Unavailable)):
        seconds = error.retry_after_seconds
        return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(round(seconds * 1000))}
    return {}


def _count_rejection(request: Request, error: errors.ServiceError) -> None:
    rejected = request.app.state.metrics.rejected
    if isinstance(error, errors.ClientGone):
        request.app.state.metrics.cancelled.labels("request").inc()
    elif isinstance(error, errors.Overloaded):
        rejected.labels("overloaded").inc()
    elif isinstance(error, errors.InvalidRequest):
        known = error.code if error.code in ("context_length_exceeded", "request_too_large") else "invalid"
        rejected.labels(known).inc()
