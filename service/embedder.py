"""The one use case: texts and their instructions in, vectors with their own measurements out.

Knows nothing of HTTP and nothing of tensors; every dialect of the API is a translation to and from this.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

from model_store.manifest import Manifest
from model_store.tokenizer import TokenizationError, TokenizedText
from service.batcher import MicroBatcher
from service.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from service.metrics import Metrics
from service.rows import EmbedRow, Vector
from service.scheduling import Lane
from service.settings import Limits, Settings

# Texts tokenized by one call: enough to be worth a thread's while, few enough that several threads share a request.
_TOKENIZE_AT_ONCE = 64


class Tokenizes(Protocol):
    """What `model_store.tokenizer.TextTokenizer` does."""

    def encode_batch(self, texts: Sequence[str], instructions: Sequence[str]) -> list[TokenizedText]:
        """Rows for texts and their instructions, in order."""


@dataclass(frozen=True)
class EmbedRequest:
    """Texts to embed, an instruction for each ("" for none) and where it came from, for the metrics."""

    texts: Sequence[str]
    instructions: Sequence[str]
    instruction_source: Literal["request", "input_type", "none"] = "none"
    dimensions: int | None = None


@dataclass(frozen=True)
class EmbedResult:
    """L2-normalised float32 vectors in the order of the texts, each of the width asked for, and what they cost."""

    vectors: Sequence[Vector]
    prompt_tokens: int
    truncated_inputs: int
    tokenize_seconds: float
    queue_seconds: float  # of the input that waited longest
    inference_seconds: float  # of the slowest batch an input was in


@dataclass
class Embedder:
    """Admits, tokenizes and submits."""

    manifest: Manifest
    tokenizer: Tokenizes
    batcher: MicroBatcher[EmbedRow, Vector]
    settings: Settings
    limits: Limits
    metrics: Metrics
    running: int = field(default=0, init=False)  # requests admitted or about to be, and not answered yet
    _threads: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.settings.tokenizer_threads, "tokenizer")

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Vectors for a request's texts.

        Raises:
            InvalidRequest: for a text, a count or a dimension that can't be served, naming it.
            Overloaded: if too much is queued already; nothing was computed.
            EncodingError: if the device failed on one of the texts.
        """
        self.running += 1
        try:
            return await self._embed(request)
        finally:
            self.running -= 1

    async def _embed(self, request: EmbedRequest) -> EmbedResult:
        self._check(request)
        began = time.perf_counter()
        rows = await self._tokenize(request)
        tokenized = time.perf_counter()
        tokens = self._count(rows)
        lane = self._lane(rows, tokens)
        self._admit(tokens, lane)
        computed = await self.batcher.submit(rows, lane)
        result = EmbedResult(
            vectors=[item.vector for item in computed],
            prompt_tokens=tokens,
            truncated_inputs=sum(row.text.cut for row in rows),
            tokenize_seconds=tokenized - began,
            queue_seconds=max(item.queue_seconds for item in computed),
            inference_seconds=max(item.inference_seconds for item in computed),
        )
        self._measure(request, rows, result)
        return result

    async def probe(self) -> None:
        """Encode one token, to see that the device still does.

        Raises:
            EncodingError, Unavailable: if it does not.
        """
        await self.batcher.submit([EmbedRow(TokenizedText([0], 0), self.manifest.width)])

    def close(self) -> None:
        """End the tokenizer threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, request: EmbedRequest) -> None:
        if not request.texts:
            raise InvalidRequest("input is empty: send at least one text", "empty_input", "input")
        if len(request.texts) > self.settings.max_inputs_per_request:
            raise InvalidRequest(
                f"{len(request.texts)} inputs in one request: at most {self.settings.max_inputs_per_request} are taken",
                "too_many_inputs",
                "input",
            )
        for index, text in enumerate(request.texts):
            if not text or text.isspace():
                raise InvalidRequest(
                    f"the input at index {index} is empty: leave it out, an empty text has no vector",
                    "empty_input",
                    "input",
                )
        width = self.manifest.width
        if request.dimensions is not None and not 1 <= request.dimensions <= width:
            raise InvalidRequest(
                f"dimensions is {request.dimensions}: this model has 1 to {width}",
                "invalid_dimensions",
                "dimensions",
            )

    async def _tokenize(self, request: EmbedRequest) -> list[EmbedRow]:
        width = request.dimensions or self.manifest.width

        def encode(part: slice) -> list[EmbedRow]:
            texts = self.tokenizer.encode_batch(request.texts[part], request.instructions[part])
            return [EmbedRow(text, width) for text in texts]

        loop = asyncio.get_running_loop()
        starts = range(0, len(request.texts), _TOKENIZE_AT_ONCE)
        slices = [slice(start, start + _TOKENIZE_AT_ONCE) for start in starts]
        parts = await asyncio.gather(
            *(loop.run_in_executor(self._threads, encode, part) for part in slices), return_exceptions=True
        )
        rows: list[EmbedRow] = []
        for part, outcome in zip(slices, parts, strict=True):
            if isinstance(outcome, TokenizationError):
                raise InvalidRequest(
                    f"input index {part.start + outcome.index}: {outcome}", "invalid_input", "input"
                ) from outcome
            if isinstance(outcome, BaseException):
                raise outcome
            rows += outcome
        return rows

    def _lane(self, rows: list[EmbedRow], tokens: int) -> Lane:
        small = len(rows) <= self.settings.interactive_inputs and tokens <= self.batcher.batch_tokens // 2
        return "interactive" if small else "bulk"

    def _count(self, rows: list[EmbedRow]) -> int:
        """The request's tokens, if each text and all together are short enough."""
        tokens = 0
        for index, row in enumerate(rows):
            tokens += len(row)
            if len(row) > self.limits.max_input_tokens:
                raise ContextLengthExceeded(self.limits.max_input_tokens, len(row), index)
        if tokens > self.settings.max_tokens_per_request:
            raise InvalidRequest(
                f"{tokens} tokens in one request: at most {self.settings.max_tokens_per_request} are taken, "
                "send fewer inputs at once",
                "request_too_large",
                "input",
            )
        return tokens

    def _admit(self, tokens: int, lane: Lane) -> None:
        """Each lane has a queue of its own, so that bulk can't keep queries out."""
        queued = self.batcher.queued_in(lane)
        if queued and queued + tokens > self.settings.max_queued_tokens:
            raise Overloaded(queued, min(max(self.batcher.backlog_seconds(), 1.0), 60.0))

    def _measure(self, request: EmbedRequest, rows: list[EmbedRow], result: EmbedResult) -> None:
        metrics = self.metrics
        pooled = sum(len(row) - row.text.span_start for row in rows)
        metrics.inputs.inc(len(rows))
        if result.truncated_inputs:
            metrics.truncated_inputs.inc(result.truncated_inputs)
        metrics.text_tokens.inc(pooled)
        metrics.instruction_tokens.inc(result.prompt_tokens - pooled)
        metrics.instruction_inputs.labels(request.instruction_source).inc(len(rows))
        metrics.request_inputs.observe(len(rows))
        metrics.tokenize_seconds.observe(result.tokenize_seconds)
        for row in rows:
            metrics.input_tokens.observe(len(row))
