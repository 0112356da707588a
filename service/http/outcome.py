"""What is known of a request after its answer. The metrics, the log and the traces are written from it."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from service.embedding.requests import Timings


@dataclass
class Outcome:
    """`code` and `reason` describe an error; `lane` is "" if nothing was queued."""

    route: str = ""
    lane: str = ""
    code: str = ""
    reason: str = ""
    timings: Timings | None = None


def outcome_of(scope: MutableMapping[str, Any]) -> Outcome:
    """The outcome of the request with this ASGI scope."""
    outcome: Outcome = scope.setdefault("state", {}).setdefault("outcome", Outcome())
    return outcome
