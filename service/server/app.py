"""Wiring and lifespan only: which parts there are, and when each of them lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from model_store.manifest import Manifest
from service.api import chunks, cohere, ollama, openai, operations, playground, prompts, reference, tei
from service.batching.limits import Limits
from service.device.backend import Backend
from service.embedding.embedder import Embedder, Tokenizes
from service.embedding.in_flight import InFlight
from service.embedding.instructions import load_instructions
from service.http import cors
from service.http.access import Access
from service.http.answers import AnswerWriter
from service.http.error_responses import Dialect, ErrorResponses
from service.http.requests import RequestContext
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import Traces
from service.version import VERSION

# Makes the application, given what it calls when it can't go on.
MakeApp = Callable[[Callable[[BaseException], None]], FastAPI]


# Dialects beside OpenAI's own: the words for errors by path, and what is called without FastAPI in between.
_DIALECTS: dict[str, Dialect] = {**tei.DIALECTS, **cohere.DIALECTS, **ollama.DIALECTS}
_ROUTERS = [dialect.router for dialect in (openai, chunks, prompts, tei, cohere, ollama, operations, reference)]
_PATHS = [path for router in _ROUTERS for route in router.routes if (path := getattr(route, "path", "/")) != "/"]
_DIRECT = {**openai.DIRECT, **tei.DIRECT, **cohere.DIRECT, **ollama.DIRECT}


def create_app(
    settings: Settings,
    manifest: Manifest,
    tokenizer: Tokenizes,
    limits: Limits,
    backend: Backend,
    metrics: Metrics,
    on_fatal: Callable[[BaseException], None],
    on_ready: Callable[[dict[str, object]], None] = lambda facts: None,
    traces: Traces | None = None,
) -> FastAPI:
    """The application for one encoder. It answers `/livez` at once and requests when the backend has started.

    `on_fatal` is called when the backend can't start or ends: the process should then end too. `on_ready` is called
    once everything that stays is in memory, with facts for the log. `traces` are closed when the application ends.
    """
    served_name = settings.served_name or manifest.name

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.embedder = embedder = Embedder(manifest, tokenizer, backend.batcher, settings, limits, metrics)

        async def start_and_run() -> None:
            began = time.perf_counter()
            app.state.facts = facts = await backend.start()
            on_ready({"model": served_name, **facts, "seconds": round(time.perf_counter() - began, 2)})
            if app.state.phase == "loading":  # and not told to stop meanwhile
                app.state.phase = "ready"
                metrics.ready.set(1)
            await backend.run()

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                app.state.phase = "failed"
                metrics.ready.set(0)
                on_fatal(error)

        task = asyncio.create_task(start_and_run())
        task.add_done_callback(ended)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            embedder.close()
            backend.stop()
            app.state.access.close()
            if traces:
                traces.close()

    app = _Application(
        title="llm2vec-service",
        version=VERSION,
        description="LLM2Vec text embeddings behind an OpenAI-compatible API",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # both load scripts from elsewhere: see reference.py
        redoc_url=None,
    )
    state = app.state
    state.version = app.version
    state.phase = "loading"
    state.manifest, state.limits, state.metrics, state.served_name = manifest, limits, metrics, served_name
    state.writer = AnswerWriter(metrics)
    state.backend, state.settings = backend, settings
    state.started_at = int(time.time())
    metrics.ready.set(0)
    state.instructions = load_instructions(settings, manifest)
    errors = ErrorResponses(_DIALECTS, metrics, _PATHS)
    errors.install(app)
    pages = playground.load_pages() if settings.playground else {}
    state.access = access = Access(settings, pages)
    state.in_flight = in_flight = InFlight(settings.max_bytes_in_flight)
    metrics.bytes_in_flight.set_function(lambda: in_flight.bytes)
    context = RequestContext(app.entry, metrics, errors, _DIRECT, access, in_flight, traces)
    app.entry = cors.allow(context, settings.cors_origins)
    for router in _ROUTERS:
        app.include_router(router)
    app.include_router(playground.router_of(pages))
    return app


class _Application(FastAPI):
    """FastAPI behind an `entry` that may answer a request without it."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self.entry: ASGIApp = super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by the server."""
        scope["app"] = self
        await self.entry(scope, receive, send)


def drain(app: FastAPI) -> None:
    """Take no more requests; those in flight go on."""
    app.state.phase = "draining"
    app.state.metrics.ready.set(0)
