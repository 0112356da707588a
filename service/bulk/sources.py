"""The sources of a job's vectors: an encoder in this process, as in `serve` but without HTTP, or a running server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from model_store.architectures import architecture_of
from service.bulk.client import PATIENCE, Patience, ServerClient
from service.bulk.job import JobError, VectorSource
from service.bulk.pipeline import Embedded
from service.device import watchdog
from service.embedding.backend import Served
from service.embedding.choices import Overflow
from service.embedding.embedder import Embedder
from service.embedding.instructions import Chosen, load_instructions
from service.embedding.requests import EmbedInput, EmbedRequest
from service.errors import DeviceLost, ServiceError
from service.logs import log
from service.server.startup import prepare, settle
from service.settings import Settings

# Requests at once: enough for this many batches, if each request has this many tokens, but at most this many.
_BATCHES_AT_ONCE = 3
_REQUEST_TOKENS = 512
_MOST_REQUESTS = 64

_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Wanted:
    """How to embed the texts; with `dimensions` 0 vectors are not cut.

    `input_type` is a role, or a prompt's name. Without one and without an instruction, texts get the default prompt.
    """

    instruction: str | None = None
    input_type: str | None = None
    dimensions: int = 0
    overflow: Overflow = "error"


def warn_of_another_width(source: VectorSource, dimensions: int) -> None:
    """Log it if the vectors are cut to a width that is none of the model's, where these are known."""
    if source.widths and dimensions not in source.widths:
        widths = ", ".join(map(str, source.widths))
        log.warning("vectors of %s are meant to have %s dimensions, not %d", source.model, widths, dimensions)


@dataclass
class LocalVectors:
    """Vectors from an encoder in this process, with the server's queue, batches, device thread and text handling."""

    prepared: Served
    dtype: str  # the arithmetic that the device will use
    wanted: Wanted
    instruction: str  # before each text
    _embedder: Embedder = field(init=False)

    @classmethod
    def prepare(cls, settings: Settings, wanted: Wanted, progress: Callable[[int, int], None]) -> LocalVectors:
        """Find or build the encoder; `running` loads it.

        Raises:
            JobError: for several devices.
            StartupError, InvalidRequest, ValueError: with a sentence that says what to change.
        """
        if settings.several_processes:
            raise JobError(
                f"a job has one device, not {settings.device}: serve them together and give --url, or give each its "
                "own inputs and --out"
            )
        # The queue needs no limit here: only this process fills it.
        settings = settings.model_copy(update={"max_queued_tokens": _NO_LIMIT})
        prepared = prepare(settings, progress)
        from model_store.encoder.devices import choose_device, choose_dtype  # torch, which `prepare` has loaded

        float16 = architecture_of(prepared.manifest.model_type).float16
        dtype = str(choose_dtype(settings.dtype, choose_device(settings.device), float16)).removeprefix("torch.")
        if settings.batch_tokens is None:
            prepared.limits.batch_tokens = prepared.limits.token_budget  # nobody waits for a single batch
        instructions = load_instructions(settings, prepared.manifest)
        chosen = instructions.choose(wanted.instruction, {"input_type": wanted.input_type})
        return cls(prepared, dtype, wanted, chosen.text)

    @property
    def source(self) -> VectorSource:
        manifest, settings = self.prepared.manifest, self.prepared.settings
        return VectorSource(
            model=manifest.name,
            embedding_space=manifest.embedding_space,
            width=manifest.width,
            max_input_tokens=self.prepared.limits.max_input_tokens,
            dtype=self.dtype,
            truncation=settings.truncation,
            empty_text=settings.empty_text,
            widths=manifest.widths,
        )

    @property
    def requests_at_once(self) -> int:
        """Enough requests that the device never waits, by the size of its batches; more would only wait."""
        batch_tokens = self.prepared.backend.batcher.batch_tokens
        return max(min(_BATCHES_AT_ONCE * batch_tokens // _REQUEST_TOKENS, _MOST_REQUESTS), _BATCHES_AT_ONCE)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and warm up the encoder, and compute within this context."""
        prepared, backend = self.prepared, self.prepared.backend
        await backend.start()
        settle()
        work = asyncio.create_task(backend.run())
        await asyncio.sleep(0)  # lets it begin, so that the size of its batches is known
        self._embedder = Embedder(
            prepared.manifest, prepared.tokenizer, backend.batcher, prepared.settings, prepared.limits, prepared.metrics
        )
        try:
            yield
        finally:
            work.cancel()
            (ended,) = await asyncio.gather(work, return_exceptions=True)
            if isinstance(ended, DeviceLost):
                watchdog.end_within(watchdog.GRACE_SECONDS)  # its thread never ends
            self._embedder.close()
            backend.stop()

    async def embed(self, texts: Sequence[str]) -> Embedded:
        wanted = self.wanted
        chosen = Chosen(self.instruction, "request")
        inputs = [EmbedInput(text, chosen) for text in texts]
        result = await self._embedder.embed(
            EmbedRequest(inputs, wanted.dimensions or None, overflow=wanted.overflow, lane="bulk", param="text")
        )
        return Embedded(np.stack(result.vectors), result.prompt_tokens)


@dataclass
class ServerVectors:
    """Vectors from a running server."""

    url: str
    wanted: Wanted
    instruction: str  # before each text
    source: VectorSource
    requests_at_once: int
    patience: Patience = PATIENCE
    _client: ServerClient = field(init=False)

    @classmethod
    async def reach(
        cls, url: str, wanted: Wanted, requests_at_once: int, patience: Patience = PATIENCE
    ) -> ServerVectors:
        """Ask the server what it serves."""
        async with ServerClient(url) as client:
            source = await client.served_model()
            instruction = await client.instruction(wanted.instruction, wanted.input_type)
            return cls(url, wanted, instruction, source, requests_at_once, patience)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold the connections to the server within this context."""
        async with ServerClient(self.url, self.patience, reached=True) as self._client:
            yield

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Embed the texts over HTTP.

        Raises:
            ServiceError: also if the server now has another encoder.
        """
        wanted = self.wanted
        answer = await self._client.embed(
            texts,
            instruction=self.instruction,
            dimensions=wanted.dimensions or None,
            overflow=wanted.overflow,
            priority="bulk",
        )
        if answer.embedding_space != self.source.embedding_space:
            raise ServiceError(
                f"{self.url} has another encoder than before: its embedding space was {self.source.embedding_space} "
                f"and is {answer.embedding_space or 'not known'}"
            )
        return answer
