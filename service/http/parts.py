"""What is known beside a request: the application's parts, and the request's outcome."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import HTTPConnection

from service.embedding.backend import Served
from service.embedding.embedder import Embedder
from service.embedding.in_flight import InFlight
from service.embedding.instructions import Instructions
from service.embedding.requests import Timings
from service.errors import InvalidRequest, ModelNotFound
from service.http.access import Access
from service.http.answers import AnswerWriter


@dataclass
class Life:
    """The server's present phase, and the facts that its start found out."""

    phase: Literal["loading", "ready", "draining", "failed"] = "loading"
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts(Served):
    """Everything in one application that requests need. `started_at` is in seconds since 1970."""

    served_name: str
    instructions: Instructions
    embedder: Embedder
    access: Access
    writer: AnswerWriter
    in_flight: InFlight
    started_at: int
    parsing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a large body is parsed
    life: Life = field(default_factory=Life)

    def model_names(self) -> list[str]:
        served = self.served_name
        return [served, f"{served}:query", f"{served}:document", *self.instructions.aliases]

    def check_model(self, model: str, alias: str) -> None:
        """Check a model's name where no instruction is asked for."""
        try:
            self.instructions.named({"name": alias} if alias else {})
        except InvalidRequest as error:
            raise ModelNotFound(model, self.served_name) from error


def parts_of(connection: HTTPConnection) -> Parts:
    parts: Parts = connection.app.state.parts
    return parts


@dataclass
class Outcome:
    """What the metrics, the log and the traces tell of a request after its answer.

    `code` and `reason` describe an error; `lane` is "" if nothing was queued.
    """

    route: str = ""
    lane: str = ""
    code: str = ""
    reason: str = ""
    timings: Timings | None = None


def outcome_of(scope: MutableMapping[str, Any]) -> Outcome:
    outcome: Outcome = scope.setdefault("state", {}).setdefault("outcome", Outcome())
    return outcome
