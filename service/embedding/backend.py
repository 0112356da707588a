"""What stands behind the HTTP side: an encoder, and something that computes rows, with a life of its own.

Two do: `service.device.backend.LocalBackend`, a worker and a batcher in this process, and
`service.processes.remote.RemoteBackend`, engine processes. The HTTP side can't tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from model_store.manifest import Manifest
from service.batching.contract import Batcher
from service.batching.limits import Limits
from service.embedding.rows import EmbedRow, Vector
from service.embedding.tokenizing import Tokenizes
from service.metrics import Metrics
from service.settings import Settings


class Backend(Protocol):
    """A batcher's life. `start` once, then `run` until it fails or is cancelled, then `stop`."""

    @property
    def busy(self) -> bool:
        """Whether, after `stop`, a thread is left that may never end."""

    @property
    def batcher(self) -> Batcher[EmbedRow, Vector]:
        """There from the beginning; computes once started."""

    async def start(self) -> dict[str, object]:
        """Get ready; facts for the log."""

    async def run(self) -> None:
        """Compute, for ever. When this ends, whatever the reason, everything that waits is told."""

    def stop(self) -> None:
        """Give everything back."""

    async def metrics_page(self) -> bytes:
        """The whole server's metrics in Prometheus' text format."""


@dataclass(frozen=True)
class Served:
    """One encoder, the settings it is served with, and the backend that computes its vectors."""

    settings: Settings
    manifest: Manifest
    tokenizer: Tokenizes
    limits: Limits
    backend: Backend
    metrics: Metrics
