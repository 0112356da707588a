"""For those who run the server: is it alive, is it ready, what is it, and its metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from service.api.openai import ERRORS
from service.errors import ServiceError, Unavailable
from service.http.answers import json_answer
from service.http.parts import parts_of
from service.metrics import with_tei_names
from service.version import VERSION

router = APIRouter(tags=["operations"])

# A probe shares the queue with requests; on a busy CPU a batch can take many seconds.
_PROBE_SECONDS = 30.0


@router.get("/livez")
async def livez() -> Response:
    """The process runs and its event loop turns."""
    return json_answer({"status": "alive"})


@router.get("/readyz", responses={503: ERRORS[503]})
@router.get("/health", responses={503: ERRORS[503]})
@router.get("/ping", include_in_schema=False)
async def readyz(request: Request) -> Response:
    """The server takes requests. If the last batch failed, the server encodes one token to find out."""
    if parts_of(request).life.phase != "ready":
        raise Unavailable(f"the server is {parts_of(request).life.phase}")
    if parts_of(request).backend.batcher.last_batch_failed:
        try:
            await asyncio.wait_for(parts_of(request).embedder.probe(), _PROBE_SECONDS)
        except (ServiceError, TimeoutError) as error:
            raise Unavailable("the device fails on every input") from error
    return json_answer({"status": "ready"})


@router.get("/metrics", response_class=PlainTextResponse, responses={401: ERRORS[401]})
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    state = parts_of(request)
    page = await state.backend.metrics_page()
    if state.settings.tei_metrics:
        page = with_tei_names(page)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/version", responses={401: ERRORS[401]})
async def version(request: Request) -> Response:
    """The server's version and the model that it serves."""
    state = parts_of(request)
    return json_answer(
        {
            "version": VERSION,
            "model": state.served_name,
            "embedding_space": state.manifest.embedding_space,
            "phase": state.life.phase,
        }
    )
