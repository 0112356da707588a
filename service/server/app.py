"""Wiring and lifespan only: the parts of the application, and when each of them starts and ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import chunks, cohere, ollama, openai, operations, playground, prompts, reference
from service.api.tei import bodies as tei_bodies
from service.api.tei import handlers as tei
from service.embedding.backend import Served
from service.embedding.embedder import Embedder
from service.embedding.in_flight import InFlight
from service.embedding.instructions import load_instructions
from service.http import cors
from service.http.access import Access
from service.http.answers import AnswerWriter
from service.http.error_responses import Dialect, ErrorResponses
from service.http.parts import Parts
from service.http.requests import RequestContext
from service.tracing import Traces
from service.version import VERSION

# Called when the application can't go on; and once it is ready, with facts for the log.
OnFatal = Callable[[BaseException], None]
OnReady = Callable[[dict[str, object]], None]

MakeApp = Callable[[OnFatal], FastAPI]

# The dialects' form of errors by path, beside OpenAI's own; then the routers, their paths, and the handlers that are
# called without FastAPI.
_DIALECTS: dict[str, Dialect] = {**tei_bodies.DIALECTS, **cohere.DIALECTS, **ollama.DIALECTS}
_ROUTERS = [api.router for api in (openai, chunks, prompts, tei, cohere, ollama, operations, reference)]
_PATHS = [path for router in _ROUTERS for route in router.routes if (path := getattr(route, "path", "/")) != "/"]
_DIRECT = {**openai.DIRECT, **tei.DIRECT, **cohere.DIRECT, **ollama.DIRECT}


def create_app(
    served: Served, on_fatal: OnFatal, on_ready: OnReady = lambda facts: None, traces: Traces | None = None
) -> FastAPI:
    """The application for one encoder. It answers `/livez` at once, and requests once the backend has started.

    `on_fatal` is called when the backend can't start or ends: the process should then end too. `on_ready` is called
    with facts for the log once everything that stays in memory is loaded. `traces` are closed when the application
    ends.
    """
    settings, metrics = served.settings, served.metrics
    pages = playground.load_pages() if settings.playground else {}
    parts = _parts(served, Access(settings, pages))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_run(parts, on_fatal, on_ready))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            parts.embedder.close()
            parts.backend.stop()
            parts.access.close()
            if traces:
                traces.close()

    app = _Application(
        title="llm2vec-service",
        version=VERSION,
        description="LLM2Vec text embeddings behind an OpenAI-compatible API",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's two pages load scripts from other hosts: see reference.py
        redoc_url=None,
    )
    app.state.parts = parts
    errors = ErrorResponses(_DIALECTS, metrics, _PATHS)
    errors.install(app)
    context = RequestContext(app.entry, parts, errors, _DIRECT, traces)
    app.entry = cors.allow(context, settings.cors_origins)
    for router in _ROUTERS:
        app.include_router(router)
    app.include_router(playground.router_of(pages))
    return app


def _parts(served: Served, access: Access) -> Parts:
    """The parts of the application, and the gauges that read them."""
    settings, manifest, metrics = served.settings, served.manifest, served.metrics
    in_flight = InFlight(settings.max_bytes_in_flight)
    metrics.bytes_in_flight.set_function(lambda: in_flight.bytes)
    metrics.ready.set(0)
    return Parts(
        **vars(served),
        served_name=settings.served_name or manifest.name,
        instructions=load_instructions(settings, manifest),
        embedder=Embedder(manifest, served.tokenizer, served.backend.batcher, settings, served.limits, metrics),
        access=access,
        writer=AnswerWriter(metrics),
        in_flight=in_flight,
        started_at=int(time.time()),
    )


async def _run(parts: Parts, on_fatal: OnFatal, on_ready: OnReady) -> None:
    """Start the backend and let it compute for ever."""
    life, ready = parts.life, parts.metrics.ready
    began = time.perf_counter()
    try:
        life.facts = await parts.backend.start()
        on_ready({"model": parts.served_name, **life.facts, "seconds": round(time.perf_counter() - began, 2)})
        if life.phase == "loading":  # it is "draining" if it was told to stop meanwhile
            life.phase = "ready"
            ready.set(1)
        await parts.backend.run()
    except Exception as error:
        life.phase = "failed"
        ready.set(0)
        on_fatal(error)


class _Application(FastAPI):
    """FastAPI behind an `entry`, which may answer a request without FastAPI."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self.entry: ASGIApp = super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.entry(scope, receive, send)


def drain(app: FastAPI) -> None:
    """Take no more requests; the requests in flight go on."""
    parts: Parts = app.state.parts
    parts.life.phase = "draining"
    parts.metrics.ready.set(0)
