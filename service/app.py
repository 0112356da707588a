"""Wiring and lifespan only: which parts there are, and when each of them lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Protocol

from fastapi import FastAPI

from model_store.manifest import Manifest
from model_store.prompts import load_prompts, read_prompts
from service.api import chunks, cohere, ollama, openai, operations, prompts, tei
from service.api.answers import AnswerWriter
from service.api.error_responses import Dialect, ErrorResponses
from service.api.requests import RequestContext
from service.batcher import DevicePlan, MicroBatcher
from service.embedder import Embedder, Tokenizes
from service.errors import EncodingError, InvalidRequest, StartupError
from service.instructions import Instructions
from service.logs import log
from service.metrics import Metrics
from service.rows import EmbedRow, Vector
from service.settings import Limits, Settings
from service.vector_cache import VectorCache


class Worker(Protocol):
    """What `service.worker.EncoderWorker` does; another one can stand in where no model is needed."""

    @property
    def device(self) -> str:
        """The device in use, once started."""

    @property
    def dtype(self) -> str:
        """The arithmetic in use, once started."""

    @property
    def kernel(self) -> str:
        """The attention kernel in use, once started."""

    async def start(self, limits: Limits) -> DevicePlan:
        """Load and warm up; what batches are to be like."""

    async def run_batch(self, rows: list[EmbedRow]) -> Sequence[Vector | EncodingError]:
        """A vector or an error for each row."""

    def stop(self) -> None:
        """End the device thread."""


# Dialects beside OpenAI's own: the words for errors by path, and what is called without FastAPI in between.
_DIALECTS: dict[str, Dialect] = {**tei.DIALECTS, **cohere.DIALECTS, **ollama.DIALECTS}
_DIRECT = {**openai.DIRECT, **tei.DIRECT, **cohere.DIRECT, **ollama.DIRECT}


def create_app(
    settings: Settings,
    manifest: Manifest,
    tokenizer: Tokenizes,
    limits: Limits,
    worker: Worker,
    metrics: Metrics,
    on_fatal: Callable[[BaseException], None],
    on_ready: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application for one encoder. It answers `/livez` at once and requests when the worker has started.

    `on_fatal` is called when the worker can't start or the batcher ends: the process should then end too. `on_ready`
    is called once everything that stays is in memory.
    """
    served_name = settings.served_name or manifest.name

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recent = VectorCache(settings.cache_bytes) if settings.cache_bytes else None
        batcher: MicroBatcher[EmbedRow, Vector] = MicroBatcher(worker.run_batch, metrics, recent)
        app.state.embedder = embedder = Embedder(manifest, tokenizer, batcher, settings, limits, metrics)
        app.state.last_batch_failed = lambda: batcher.last_batch_failed

        async def start_and_batch() -> None:
            began = time.perf_counter()
            plan = await worker.start(limits)
            metrics.build_info.labels(
                app.state.version, served_name, worker.device, worker.dtype, manifest.pooling
            ).set(1)
            on_ready()
            if app.state.phase == "loading":  # and not told to stop meanwhile
                app.state.phase = "ready"
                metrics.ready.set(1)
            seconds = round(time.perf_counter() - began, 2)
            where = {"device": worker.device, "dtype": worker.dtype, "attention": worker.kernel}
            log.info("ready", extra={"fields": {"model": served_name, **where, "seconds": seconds}})
            await batcher.run(plan)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                app.state.phase = "failed"
                metrics.ready.set(0)
                on_fatal(error)

        task = asyncio.create_task(start_and_batch())
        task.add_done_callback(ended)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            embedder.close()
            worker.stop()

    app = FastAPI(
        title="llm2vec-service",
        version=version("llm2vec-service"),
        description="LLM2Vec text embeddings behind an OpenAI-compatible API",
        lifespan=lifespan,
    )
    state = app.state
    state.version = app.version
    state.phase = "loading"
    state.manifest, state.limits, state.metrics, state.served_name = manifest, limits, metrics, served_name
    state.writer, state.worker = AnswerWriter(metrics), worker
    state.started_at = int(time.time())
    metrics.token_budget.set(limits.token_budget)
    metrics.ready.set(0)
    state.instructions = _instructions(settings, manifest)
    errors = ErrorResponses(_DIALECTS, metrics)
    errors.install(app)
    app.add_middleware(RequestContext, metrics=metrics, errors=errors, direct=_DIRECT)
    for routes in (openai, chunks, prompts, tei, cohere, ollama, operations):
        app.include_router(routes.router)
    return app


def _instructions(settings: Settings, manifest: Manifest) -> Instructions:
    """What this server knows of instructions.

    Raises:
        StartupError: for a setting that names a prompt which there is not.
    """
    own = settings.query_instruction
    known = Instructions(
        query=manifest.query_instruction if own is None else own,
        prompts={**load_prompts(), **(read_prompts(settings.prompts_file) if settings.prompts_file else {})},
        default_name=settings.default_input_type,
        aliases=settings.model_aliases,
        any_model=settings.any_model,
    )
    for name in (settings.default_input_type, *settings.model_aliases.values()):
        try:
            known.named({"name": name} if name else {})
        except InvalidRequest as error:
            raise StartupError(f"settings name a prompt: {error}") from error
    return known


def drain(app: FastAPI) -> None:
    """Take no more requests; those in flight go on."""
    app.state.phase = "draining"
    app.state.metrics.ready.set(0)
