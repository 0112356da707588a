"""The playground: one page at `/` on which people try the encoder. Its files are read once and answered from memory.

The page itself is public. Everything that it shows comes from the API, with the key that its reader types if the server
has keys. It loads nothing from elsewhere and has no inline script or style; the Content-Security-Policy enforces that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Request, Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Browsers keep the files but ask each time whether they changed, so no page is of another version.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Page:
    """A file and its headers."""

    content: bytes
    headers: Mapping[str, str]

    def answer(self, request: Request) -> Response:
        """The file, or headers alone if the browser has it already."""
        known = request.headers.get("if-none-match", "").split(",")
        if self.headers["etag"] in [tag.strip().removeprefix("W/") for tag in known]:
            return Response(None, 304, self.headers)
        return Response(self.content, 200, self.headers)


def load_pages() -> dict[str, Page]:
    """The page at `/` and its files below `/playground/`, by path."""
    pages = {}
    for entry in files("service").joinpath("playground").iterdir():
        if media_type := _TYPES.get(PurePath(entry.name).suffix):
            path = "/" if entry.name == "index.html" else f"/playground/{entry.name}"
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            pages[path] = Page(content, {**HEADERS, "content-type": media_type, "etag": tag})
    return pages


def router_of(pages: Mapping[str, Page]) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def page(request: Request) -> Response:
        return pages[request.scope["path"]].answer(request)

    for path in pages:
        router.add_api_route(path, page, methods=["GET"])
    return router
