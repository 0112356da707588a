"""What every request goes through, whatever its dialect: an id, its measurements, a bounded body, a client that
may hang up."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.error_responses import unexpected_error_response
from service.errors import ClientGone, RequestTooLarge, Unavailable
from service.logs import log, request_id
from service.metrics import Metrics

T = TypeVar("T")

_SANE_ID = re.compile(r"[\w.:-]{1,128}")


class RequestContext:
    """ASGI middleware: gives each request an id, and measures, counts and logs it when it has been answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        asked = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        own_id = asked if _SANE_ID.fullmatch(asked) else uuid.uuid4().hex
        token = request_id.set(own_id)
        state = scope.setdefault("state", {})
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = own_id
            await send(message)

        self._metrics.inflight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("unexpected error")
            state["code"] = "internal_error"
            if status:
                raise
            await unexpected_error_response()(scope, receive, send_with_id)
        finally:
            self._metrics.inflight.dec()
            self._finish(scope, status, state.get("code", ""), time.perf_counter() - began)
            request_id.reset(token)

    def _finish(self, scope: Scope, status: int, code: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(route, str(status), code).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        level = log.debug if route in QUIET_ROUTES and status < 400 else log.info
        fields = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4)}
        level("request", extra={"fields": {**fields, **({"code": code} if code else {})}})


# Asked for every few seconds by machines: logged at debug level while all is well.
QUIET_ROUTES = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics"})


class DirectRoute(APIRoute):
    """A route whose function takes the request and gives the response: FastAPI's machinery for anything else is not
    run for it, and documents it only."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself."""
        function: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return function


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The request's body, refused while it streams in if it is too large.

    Raises:
        RequestTooLarge: past `limit_bytes`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise RequestTooLarge(limit_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise RequestTooLarge(limit_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client hangs up first.

    Raises:
        ClientGone: if it did.
    """
    working = asyncio.current_task()
    assert working is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:
            raise
        working.uncancel()
        raise ClientGone("the client closed the connection") from None
    finally:
        watching.cancel()


def require_ready(request: Request) -> None:
    """Let work in only while the server is ready.

    Raises:
        Unavailable: while it loads or drains.
    """
    state = request.app.state
    if state.phase != "ready":
        state.metrics.rejected.labels(state.phase).inc()
        raise Unavailable(f"the server is {state.phase}: try again later")
