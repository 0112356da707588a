"""TEI's `/info`, and the root path, at which clients ask for vectors. Translation only."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from service.api.tei.bodies import EmbedBody, SimilarityBody, TEIInfo
from service.api.tei.dialect import ERRORS
from service.api.tei.embed import embed, embed_texts
from service.api.tei.rank import compare
from service.http.answers import json_answer
from service.http.call import Call
from service.http.parts import parts_of
from service.http.requests import parse, read_document, require_ready
from service.version import VERSION

router = APIRouter(tags=["text-embeddings-inference"], responses={401: ERRORS[401]})


@router.post("/", include_in_schema=False)
async def embed_at_root(request: Request) -> Response:
    """huggingface_hub asks a bare URL for vectors, or for how close sentences are."""
    began = time.perf_counter()
    require_ready(request)
    document = await read_document(request)
    if isinstance(document.get("inputs"), dict):
        return await compare(Call(request, parse(SimilarityBody, document), began))
    return await embed_texts(Call(request, parse(EmbedBody, document), began))


# The middleware calls these functions itself, without FastAPI's routing.
DIRECT = {("POST", "/embed"): embed, ("POST", "/"): embed_at_root}


@router.get("/info", responses={200: {"model": TEIInfo}, 503: ERRORS[503]})
async def info(request: Request) -> Response:
    """The model that is served, and the server's limits."""
    require_ready(request)
    parts = parts_of(request)
    settings = parts.settings
    return json_answer(
        {
            "model_id": parts.served_name,
            "model_sha": parts.manifest.embedding_space,
            "model_dtype": parts.life.facts.get("dtype", parts.manifest.dtype),
            "served_model_name": parts.served_name,
            "model_type": {"embedding": {"pooling": parts.manifest.pooling}},
            # Tokens are limited, not requests; each has at least one.
            "max_concurrent_requests": settings.max_queued_tokens,
            "max_input_length": parts.limits.max_input_tokens,
            "max_batch_tokens": parts.limits.token_budget,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_inputs_per_request,
            "auto_truncate": settings.truncation == "reference",
            "tokenization_workers": settings.tokenizer_threads,
            "version": VERSION,
            "sha": None,
            "docker_label": None,
        }
    )
