"""The web pages whose scripts may read answers (CORS). This module knows origins only: keys decide who may ask."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.headers import ANSWER_HEADERS

_ERROR_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry", "www-authenticate")

_ASKS_FOR_PRIVATE = b"access-control-request-private-network"


def allow(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """An application whose answers and errors pages of these origins may read; all pages if one is `*`.

    Cookies and the like are never asked for: a page sends its key itself, in a header.
    """
    if not origins:
        return app
    allowing = CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),  # OpenAI's SDK sends a dozen of its own
        allow_credentials=False,
        expose_headers=(*ANSWER_HEADERS, *_ERROR_HEADERS),
    )
    return _CrossOrigin(allowing, every_origin="*" in origins)


class _CrossOrigin:
    """Adds to Starlette's middleware what it does not do.

    Pages of allowed origins reach a server in a private network, for which browsers ask beforehand. Unless every origin
    is allowed, caches learn that every answer depends on the origin, also the answers that no page asked for.
    """

    def __init__(self, app: ASGIApp, every_origin: bool) -> None:
        self._app = app
        self._every_origin = every_origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks_for_private = (_ASKS_FOR_PRIVATE, b"true") in scope.get("headers", ())
        if asks_for_private:  # Starlette's middleware refuses a header that it does not know, by version
            scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != _ASKS_FOR_PRIVATE]}

        async def send_with_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if not self._every_origin and "origin" not in headers.get("vary", "").lower():
                    headers.add_vary_header("Origin")
                if asks_for_private and message["status"] == 200 and "access-control-allow-origin" in headers:
                    headers["access-control-allow-private-network"] = "true"
            await send(message)

        await self._app(scope, receive, send_with_more)
