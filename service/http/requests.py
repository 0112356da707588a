"""The steps that requests of all dialects share: a key, an id, measurements, a bounded body, a client that hangs up."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
import traceback
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.embedding.admission import caller_of_request
from service.embedding.in_flight import hold
from service.errors import (
    ClientGone,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    ServiceError,
    TooManyInputs,
    Unavailable,
    UnsupportedEncoding,
)
from service.http.access import METRICS_PATH, OPEN_PATHS
from service.http.error_responses import ErrorResponses
from service.http.json_size import JSONSize, json_size
from service.http.parts import Outcome, Parts, outcome_of, parts_of
from service.logs import log, log_request, request_id
from service.settings import Settings
from service.tracing import Traces

Body = TypeVar("Body", bound=BaseModel)
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]
Direct = Mapping[tuple[str, str], Endpoint]

# The status of text-embeddings-inference for errors that are 500 elsewhere.
_DEVICE_FAILED = 424

_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

# The dialects' names for the texts.
TEXT_FIELDS = frozenset({"input", "inputs", "texts", "text", "prompt"})

# The values of larger bodies are counted before the bodies are parsed; smaller bodies can't hold many.
_COUNTED_BYTES = 1 << 18

# The longest form of an input has fewer: an object with a key for each field.
_CONTAINERS_AN_INPUT = 8

# The fields that may hold token ids.
_ID_FIELDS = frozenset({"input", "inputs", "ids"})

# What a connection's protocol leaves in the state of a request that has not arrived in time.
LATE = "late"


@dataclass(frozen=True)
class RequestContext:
    """ASGI middleware around all of FastAPI. It gives each request an id and asks for its key. After the answer it
    measures, counts, logs and traces the request.

    It calls the functions in `direct` itself, by method and path: FastAPI's routing costs as much as all the rest of a
    short request.
    """

    app: ASGIApp
    parts: Parts
    errors: ErrorResponses
    direct: Direct
    traces: Traces | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with self.parts.in_flight.request():
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        method = scope["method"]
        # HEAD is GET without the body, and a slash at the end or twice in a row means nothing: never a redirect, as one
        # sends the texts again, and behind a proxy that ends TLS in the clear.
        scope = {**scope, "method": "GET" if method == "HEAD" else method, "path": _single_slashes(scope["path"])}
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        own_id = asked if _SANE_ID.fullmatch(asked) else f"{random.getrandbits(128):032x}"
        token = request_id.set(own_id)
        caller_of_request.set(self.parts.access.caller(headers, scope.get("client")))
        outcome = outcome_of(scope)
        status, started, whole = 0, 0.0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, started, whole
            if message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
                if method == "HEAD":
                    message = {**message, "body": b""}
            elif message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", own_id.encode()))
                started = time.perf_counter()
            await send(message)

        self.parts.metrics.inflight.inc()
        try:
            endpoint = self.direct.get((scope["method"], scope["path"]))
            if (refusal := self.parts.access.refusal(scope["method"], scope["path"], headers)) is not None:
                outcome.route = scope["path"] if endpoint else ""
                await self.errors.of(Request(scope), refusal)(scope, receive, send_with_id)
            elif endpoint is None:
                await self.app(scope, receive, send_with_id)
            else:
                await self._call(endpoint, Request(scope, receive), send_with_id)
        except asyncio.CancelledError:
            if status or self.parts.life.phase != "draining":
                raise
            # The server has waited for the grace period, which is over.
            stopped = Unavailable("the server stopped before it could answer: try again later")
            await self.errors.of(Request(scope), stopped)(scope, receive, send_with_id)
        except Exception as error:
            # The place and the kind of the error, without its message, which may hold a piece of the input.
            outcome.code, outcome.reason = "internal_error", f"unexpected {type(error).__name__}"
            log.error("unexpected error", extra={"fields": {"exception": _places(error)}})
            if status and not whole:
                raise RuntimeError("an answer broke off: see the line before") from None
            if not status:
                await self.errors.unexpected(scope["path"])(scope, receive, send_with_id)
        finally:
            self.parts.metrics.inflight.dec()
            ended = time.perf_counter()
            outcome.route = outcome.route or getattr(scope.get("route"), "path", "unmatched")
            self._finish(outcome, method, status, ended - began)
            if self.traces:
                steps = outcome.timings.steps() if outcome.timings else ()
                moments = began, started or ended, ended
                self.traces.record(headers, method, outcome.route, status, outcome.code, steps, *moments)
            request_id.reset(token)

    async def _call(self, endpoint: Endpoint, request: Request, send: Send) -> None:
        outcome_of(request.scope).route = request.scope["path"]
        try:
            response = await endpoint(request)
        except ServiceError as error:
            response = self.errors.of(request, error)
        await response(request.scope, request.receive, send)

    def _finish(self, outcome: Outcome, method: str, status: int, seconds: float) -> None:
        route, code = outcome.route, outcome.code
        count, duration = self.parts.metrics.of_request(route, str(status), code, outcome.lane)
        count.inc()
        duration.observe(seconds)
        fields = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
        if status >= 500 or status == _DEVICE_FAILED:
            level = logging.WARNING if status in (503, 504) else logging.ERROR
            log_request(level, {**fields, "code": code, "reason": outcome.reason})
        else:
            # Machines ask for these every few seconds.
            quiet = status < 400 and (route in OPEN_PATHS or route == METRICS_PATH)
            log_request(logging.DEBUG if quiet else logging.INFO, {**fields, **({"code": code} if code else {})})


def _single_slashes(path: str) -> str:
    if path[-1:] != "/" and "//" not in path:
        return path
    return "/" + "/".join(filter(None, path.split("/")))


def _places(error: BaseException) -> str:
    """The kinds of an exception and its causes and the lines of code that they passed, without their messages."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 8:
        parts.append(f"{''.join(traceback.format_tb(cause.__traceback__))}{type(cause).__name__}")
        cause = cause.__cause__ or cause.__context__
    return "\nafter:\n".join(parts)


async def read_body(request: Request, limit_bytes: int) -> bytearray:
    """The request's body. A body that is too large is refused while it streams in, and no body is unpacked.

    Raises:
        RequestTooLarge: past `limit_bytes`.
        UnsupportedEncoding: if it is compressed.
        RequestTimeout: if it has not arrived in time.
        TooMuchInFlight: if all requests together would hold too many bytes with it.
        ClientGone: if the client hangs up before it is whole.
    """
    encoding = request.headers.get("content-encoding", "")
    if encoding and encoding.strip().lower() != "identity":
        raise UnsupportedEncoding(
            f"bodies are not taken in the content-encoding {encoding[:40]!r}: send the JSON as it is",
            "unsupported_content_encoding",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise RequestTooLarge(limit_bytes)
    body, more = bytearray(), True  # grown piece by piece: joining the pieces at the end would take long at once
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection")
        piece = message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) + len(piece) > limit_bytes:
            raise RequestTooLarge(limit_bytes)
        hold(len(piece))
        body += piece
        if more and LATE in request.scope["state"]:
            raise RequestTimeout("the request did not arrive in time", "request_timeout")
    return body


async def read_document(request: Request) -> dict[str, Any]:
    """The request's body, a JSON object.

    Raises:
        RequestTooLarge: past the settings' limit.
        InvalidRequest: if it is not JSON, no object, or has too many values.
    """
    parts = parts_of(request)
    settings = parts.settings
    body = await read_body(request, settings.max_body_bytes)
    if len(body) <= _COUNTED_BYTES:
        document = _parsed(body)
    else:
        _check_size(await asyncio.to_thread(json_size, body), settings)
        async with parts.parsing:
            document = _parsed(body)
            await asyncio.sleep(0)  # everybody else has a turn before the next large body, and before what follows
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object", "invalid_json")
    _check_lists(document, settings.max_inputs_per_request)
    return document


def _parsed(body: bytearray) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = _not_utf8(body) if "UTF-8" in str(error) else f"valid JSON: {error}"
        raise InvalidRequest(f"the body is not {reason}", "invalid_json") from error


def _check_size(size: JSONSize, settings: Settings) -> None:
    """Refuse a body with more values than the most token ids and inputs have: everybody waits while it is parsed."""
    containers = _CONTAINERS_AN_INPUT * settings.max_inputs_per_request
    values = settings.max_tokens_per_request + containers
    for found, most, what in (
        (size.containers, containers, "arrays, objects and their keys"),
        (size.commas, values, "values"),
    ):
        if found > most:
            message = f"the body holds {found} {what}: at most {most} are taken, send fewer inputs at once"
            raise InvalidRequest(message, "request_too_large")


def _check_lists(document: dict[str, Any], most: int) -> None:
    """Refuse a list that is longer than a list of inputs may be, in any field or in an object in a field.

    A list of one text's token ids may be longer.
    """
    for name, given in document.items():
        for value in (given, *given.values()) if isinstance(given, dict) else (given,):
            if not isinstance(value, list) or len(value) <= most:
                continue
            if name not in _ID_FIELDS or not isinstance(value[0], int):
                if name in TEXT_FIELDS:
                    raise TooManyInputs(len(value), most, name)
                raise InvalidRequest(f"{len(value)} {name}: at most {most} are taken", "too_many_inputs", name)


def _not_utf8(body: bytearray) -> str:
    """The place at which a body is not UTF-8: the JSON parser's own words are not clear."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"UTF-8, as JSON has to be: the byte at {error.start} is {body[error.start]:#04x}"
    return "UTF-8, as JSON has to be"


def parse(model: type[Body], document: dict[str, Any]) -> Body:
    """The document as a dialect's body.

    Raises:
        InvalidRequest: saying which field is wrong and what it takes.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        issue = error.errors()[0]
        field = str(issue["loc"][0]) if issue["loc"] else None
        if issue["type"] == "missing" and len(issue["loc"]) == 1:
            raise missing(str(field), document) from error
        where = ".".join(map(str, issue["loc"]))
        raise InvalidRequest(f"{where}: {issue['msg']}", "invalid_value", field) from error


def missing(field: str, given: Collection[str]) -> InvalidRequest:
    """The refusal of a request without its texts. The message names another API's field if that was sent instead."""
    other = sorted(TEXT_FIELDS.intersection(given))
    hint = f": this path reads {field}, not {other[0]}" if other else ""
    return InvalidRequest(f"{field} is missing{hint}", "invalid_value", field)


def require_ready(request: Request) -> None:
    parts = parts_of(request)
    if parts.life.phase != "ready":
        parts.metrics.rejected.labels(parts.life.phase).inc()
        raise Unavailable(f"the server is {parts.life.phase}: try again later")
