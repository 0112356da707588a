"""The one use case: check → admit → tokenize → fit → submit → a result that carries its own measurements.

Knows nothing of HTTP and nothing of devices: dialects translate to and from it, the batcher computes for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from model_store.manifest import Manifest
from model_store.text.tokenizer import TokenizationError, TokenizedText
from service.batching.contract import Batcher, Computed
from service.batching.limits import Limits
from service.batching.scheduling import Lane
from service.embedding import bounds, long_texts, spans, token_views, tokenizing
from service.embedding.admission import Admission, Patience, Size
from service.embedding.in_flight import hold_tokens, hold_vectors
from service.embedding.instructions import Source
from service.embedding.requests import (
    ChunkResult,
    EmbedInput,
    EmbedRequest,
    EmbedResult,
    LocatedTokens,
    PreviewToken,
)
from service.embedding.rows import EmbedRow, Vector
from service.embedding.tokenizer_pool import TokenizerPool
from service.embedding.tokenizing import Tokenizes
from service.errors import EncodingError, InvalidRequest, NonFiniteEmbedding
from service.metrics import Metrics
from service.settings import Settings

T = TypeVar("T")

OnLane = Callable[[Lane], None]


@dataclass
class Embedder:
    """Checks, tokenizes and submits. Every method refuses requests as `embed` does.

    `running` counts the requests for vectors that are not answered yet.
    """

    manifest: Manifest
    tokenizer: Tokenizes
    batcher: Batcher[EmbedRow, Vector]
    settings: Settings
    limits: Limits
    metrics: Metrics
    running: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._pool = TokenizerPool(self.settings.tokenizer_threads)
        self._admission = Admission(self.batcher, self.settings)

    async def embed(self, request: EmbedRequest, on_lane: OnLane = lambda lane: None) -> EmbedResult:
        """Vectors for a request's inputs. `on_lane` is told the lane that the request is queued in.

        Raises:
            InvalidRequest: for an input, a count or a dimension that can't be served, naming it.
            Overloaded: if too much is queued already; nothing was computed.
            DeadlineExceeded: if the request still waited when its time was over; nothing was computed.
            EncodingError: if the device failed on one of the inputs.
        """
        with self._counted_as_running():
            patience = Patience(time.perf_counter(), request.timeout_seconds, request.wait_seconds)
            self._check(request)
            if request.overflow == "error":
                self._check_context(request)
            guess = self._admission.guess(request)
            async with self._admission.tokenizing(guess, patience):
                fitted = await self._tokenize(request, guess.lane, fit=True)
                make_rows = partial(long_texts.embed_rows, fitted, request, self.manifest.width)
                rows = await tokenizing.run_aside(self._pool, guess.lane, fitted, make_rows)
            self._admission.learn(request, sum(map(len, rows)))
            tokenized = time.perf_counter()
            try:
                computed = await self._compute(rows, request.lane, patience, on_lane)
            except EncodingError as error:
                raise error.at(long_texts.input_of(error.index, fitted)) from error
            cut = sum(parts[0].cut for parts in fitted)
            result = EmbedResult.of(rows, computed, cut, tokenized - patience.began)
            if len(rows) > len(fitted):
                result = replace(result, vectors=self._means(fitted, result.vectors, request))
            sources = [item.instruction.source for item in request.inputs]
            record = partial(self._record, sources, rows, result)
            await tokenizing.run_aside(self._pool, guess.lane, fitted, record)
            return result

    async def embed_chunks(
        self,
        request: EmbedRequest,
        chunk_tokens: int = 0,
        chunk_spans: Sequence[spans.Span] = (),
        on_lane: OnLane = lambda lane: None,
    ) -> ChunkResult:
        """Late chunking (Günther et al. 2024): each chunk's vector is pooled from token vectors that saw all the text.

        The request has one text. Its chunks are `chunk_spans`, ranges of characters [start, end), or else consecutive
        runs of `chunk_tokens` tokens.
        """
        with self._counted_as_running():
            patience = Patience(time.perf_counter(), request.timeout_seconds)
            self._check(request)
            self._check_context(request)
            guess = self._admission.guess(request)
            ((given, instruction),) = request.inputs
            async with self._admission.tokenizing(guess, patience):
                read = partial(self.tokenizer.locate, str(given), instruction.text)
                try:
                    text, characters = await self._pool.run(guess.lane, read)
                except TokenizationError as error:
                    raise InvalidRequest(str(error), "invalid_input", "input") from error
            bounds.check_length(len(text), self.limits.max_input_tokens, 0)
            own = range(text.head, len(text) - text.tail)
            if chunk_spans:
                chunks = spans.tokens_of_spans(chunk_spans, own, characters)
                bounds.check_coverage(chunks, len(text))
            else:
                chunks = spans.runs_of_tokens(own, chunk_tokens)
            width = request.dimensions or self.manifest.width
            bounds.check_numbers(len(chunks) * width)
            rows = [EmbedRow(replace(text, spans=tuple(chunks)), width, request.normalize)]
            tokenized = time.perf_counter()
            computed = await self._compute(rows, request.lane, patience, on_lane)
            result = EmbedResult.of(rows, computed, 0, tokenized - patience.began)
            self._record([instruction.source], rows, result)
            return ChunkResult(
                list(result.vectors[0]),
                result.prompt_tokens,
                0,
                result.timings,
                chunk_spans or [spans.characters_of_span(chunk, characters) for chunk in chunks],
                [end - start for start, end in chunks],
            )

    async def preview(self, request: EmbedRequest) -> list[list[PreviewToken]]:
        """The tokens of each input; nothing is computed, and an input that is too long for `embed` is shown whole."""
        most, pooling = self.limits.max_input_tokens, self.manifest.pooling
        return await self._view(
            request, lambda item, row: token_views.preview(self.tokenizer, item, row, request, most, pooling)
        )

    async def locate(self, request: EmbedRequest) -> list[LocatedTokens]:
        """The place of each token in its input or instruction; all inputs are texts, and nothing is computed."""
        allow_empty = self._allow_empty
        return await self._view(request, lambda item, _: token_views.locate(self.tokenizer, item, allow_empty))

    async def decode(
        self,
        token_ids: Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        wait_seconds: float = 0.0,
    ) -> list[str]:
        """The texts of this model's own token ids."""
        patience = Patience(time.perf_counter(), wait_seconds=wait_seconds)
        bounds.check_count(len(token_ids), self.settings.max_inputs_per_request, "ids")
        tokens = sum(map(len, token_ids))
        bounds.check_tokens(tokens, self.settings.max_tokens_per_request)
        hold_tokens(tokens)
        lane = self._admission.size(len(token_ids), tokens).lane
        async with self._admission.tokenizing(Size(max(tokens, len(token_ids)), lane), patience):
            return await self._pool.run(
                lane,
                lambda: [
                    token_views.decode(self.tokenizer, ids, skip_special_tokens, index)
                    for index, ids in enumerate(token_ids)
                ],
            )

    async def probe(self) -> None:
        """Encode one token, to see that the device still does."""
        await self.batcher.probe(EmbedRow(TokenizedText([0], 0), self.manifest.width))

    def close(self) -> None:
        self._pool.close()

    @property
    def _allow_empty(self) -> bool:
        return self.settings.empty_text == "bos"

    @contextmanager
    def _counted_as_running(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def _check(self, request: EmbedRequest) -> None:
        inputs, param = request.inputs, request.param
        bounds.check_count(len(inputs) - request.beside, self.settings.max_inputs_per_request, param)
        if not self._allow_empty:
            bounds.check_not_empty(inputs, param)
        bounds.check_characters(inputs, self.settings.max_input_characters, param)
        widths = self.manifest.widths if self.settings.other_widths == "refuse" else ()
        bounds.check_dimensions(request.dimensions, self.manifest.width, request.dimensions_param, widths)

    def _check_context(self, request: EmbedRequest) -> None:
        ids_per_token = 1 if request.token_ids == "model" else None
        most, per_token = self.limits.max_input_tokens, self.tokenizer.characters_per_token
        bounds.check_context(request.inputs, most, per_token, ids_per_token, request.param)

    async def _tokenize(self, request: EmbedRequest, lane: Lane, fit: bool) -> list[list[TokenizedText]]:
        """The rows of each input: its whole row, or to `fit` the rows that the request's overflow leaves of it."""
        settings, most = self.settings, self.limits.max_input_tokens

        def rows_of(start: int, stop: int) -> list[list[TokenizedText]]:
            rows = tokenizing.encode(self.tokenizer, request, start, stop, self._allow_empty)
            if not fit:
                return [[row] for row in rows]
            return long_texts.fit(rows, request, start, most, settings.max_tokens_per_request)

        return await tokenizing.tokenize(request, lane, self._pool, rows_of, settings.max_tokens_per_request)

    async def _compute(
        self, rows: list[EmbedRow], asked: Lane | None, patience: Patience, on_lane: OnLane
    ) -> list[Computed[Vector]]:
        """The rows' vectors, once they are admitted."""
        tokens = sum(map(len, rows))
        bounds.check_tokens(tokens, self.settings.max_tokens_per_request)
        hold_vectors(sum(row.width * row.text.vectors for row in rows))
        if asked == "interactive":
            bounds.check_interactive(tokens, self._admission.interactive_tokens)
        size = self._admission.size(len(rows), tokens, asked)
        on_lane(size.lane)
        return await self._admission.submit(rows, size, patience)

    def _means(
        self, fitted: list[list[TokenizedText]], vectors: Sequence[Vector], request: EmbedRequest
    ) -> list[Vector]:
        width = request.dimensions or self.manifest.width
        try:
            return long_texts.means(fitted, vectors, width, request.normalize)
        except NonFiniteEmbedding:
            self.metrics.nonfinite.inc()
            raise

    def _record(self, sources: Sequence[Source], rows: Sequence[EmbedRow], result: EmbedResult) -> None:
        """Count a request's inputs, the sources of their instructions, and the tokens of its rows."""
        metrics = self.metrics
        pooled = sum(len(row) - row.text.span_start for row in rows)
        metrics.inputs.inc(len(sources))
        if result.truncated_inputs:
            metrics.truncated_inputs.inc(result.truncated_inputs)
        metrics.text_tokens.inc(pooled)
        metrics.instruction_tokens.inc(result.prompt_tokens - pooled)
        for source in set(sources):
            metrics.instruction_inputs.labels(source).inc(sources.count(source))
        metrics.request_inputs.observe(len(sources))
        metrics.tokenize_seconds.observe(result.timings.tokenize_seconds)
        for row in rows:
            metrics.input_tokens.observe(len(row))

    async def _view(self, request: EmbedRequest, view: Callable[[EmbedInput, TokenizedText], T]) -> list[T]:
        """A view of each input and its row, admitted like a request for vectors."""
        patience = Patience(time.perf_counter(), request.timeout_seconds, request.wait_seconds)
        self._check(request)
        guess = self._admission.guess(request)
        async with self._admission.tokenizing(guess, patience):
            rows = [row for (row,) in await self._tokenize(request, guess.lane, fit=False)]
            hold_tokens(sum(map(len, rows)))
            return await self._pool.run(guess.lane, lambda: list(map(view, request.inputs, rows)))
