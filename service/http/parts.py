"""The application's parts, as handlers find them: `parts_of(request)`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import HTTPConnection

from model_store.manifest import Manifest
from service.batching.limits import Limits
from service.embedding.backend import Backend
from service.embedding.embedder import Embedder
from service.embedding.in_flight import InFlight
from service.embedding.instructions import Instructions
from service.http.access import Access
from service.http.answers import AnswerWriter
from service.metrics import Metrics
from service.settings import Settings


@dataclass
class Life:
    """The server's present phase, and the facts that its start found out."""

    phase: Literal["loading", "ready", "draining", "failed"] = "loading"
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """Everything in one application that requests need. `started_at` is in seconds since 1970."""

    settings: Settings
    manifest: Manifest
    limits: Limits
    backend: Backend
    metrics: Metrics
    served_name: str
    instructions: Instructions
    embedder: Embedder
    access: Access
    writer: AnswerWriter
    in_flight: InFlight
    started_at: int
    parsing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a large body is parsed
    life: Life = field(default_factory=Life)


def parts_of(connection: HTTPConnection) -> Parts:
    """The parts of the application that answers this request."""
    parts: Parts = connection.app.state.parts
    return parts
