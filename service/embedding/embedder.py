"""The one use case: admit → tokenize → submit → a result that carries its own measurements.

Knows nothing of HTTP, and nothing of devices: a dialect translates to and from it.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from model_store.manifest import Manifest
from model_store.text.openai_tokens import OpenAIEncoding, UnknownTokenId, decode
from model_store.text.tokenizer import Part, TokenizationError, TokenizedText
from service.batching.contract import Batcher, Computed
from service.batching.limits import Limits
from service.batching.room import Line
from service.batching.scheduling import LANES, Lane
from service.embedding.callers import caller_of_request
from service.embedding.choices import Overflow
from service.embedding.in_flight import hold_tokens, hold_vectors
from service.embedding.instructions import NONE, Chosen, Source
from service.embedding.rows import EmbedRow, Vector
from service.embedding.tokenizer_pool import TokenizerPool
from service.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EncodingError,
    InvalidRequest,
    NonFiniteEmbedding,
    Overloaded,
    TooManyInputs,
)
from service.metrics import Metrics, lane_of_request
from service.settings import Settings

T = TypeVar("T")

# Texts tokenized by one call, and their characters: enough to be worth a thread's while, and few enough that threads
# share a request and that little is done for nothing where it is refused.
_TOKENIZE_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 18

# Tokens of rows that are made on the event loop: a millisecond.
_TOKENS_HERE = 8192

# Characters tokenized on the event loop: a tenth of a millisecond, where another thread's answer takes twice that.
_TOKENIZE_HERE = 512

# Share of the newest request in the running average of tokens a character.
_NEWEST = 0.02

# How many queues full of tokens may wait for room.
_WAITING_QUEUES = 8

# Numbers in the answer to one request that asks for a vector of each token: 256 MB of them.
_MOST_NUMBERS = 1 << 26

# Times that the spans of a text may cover its tokens, in the mean.
_MOST_COVERAGE = 16

# The ids that texts are given in: this model's own, or OpenAI's.
TokenIds = Literal["model"] | OpenAIEncoding


class Tokenizes(Protocol):
    """What `model_store.text.tokenizer.TextTokenizer` does."""

    @property
    def characters_per_token(self) -> int | None:
        """How many characters a token stands for at most, white space at a text's end left out; None if unknown."""

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        """Rows for texts, or their token ids, and their instructions, in order."""

    def encode_nothing(self) -> TokenizedText:
        """The row of an empty text."""

    def locate(self, text: str, instruction: str) -> tuple[TokenizedText, list[tuple[int, int]]]:
        """A row, and the characters of the text that each token stands for."""

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them."""

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""

    def parts(self, row: TokenizedText, instruction: str) -> list[Part]:
        """What each token of a row with this instruction is of."""

    def special_tokens(self) -> frozenset[int]:
        """The ids of the tokens that stand for no text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""


class EmbedInput(NamedTuple):
    """A text, or the ids of its tokens, and its instruction."""

    text: str | Sequence[int]
    instruction: Chosen = NONE


@dataclass(frozen=True)
class EmbedRequest:
    """What to embed, and how. `param` is what the caller's dialect calls the inputs, for messages; so is the other."""

    inputs: Sequence[EmbedInput]
    dimensions: int | None = None
    overflow: Overflow = "error"
    keep: Literal["start", "end"] = "start"  # of a text that is cut
    normalize: bool = True
    each_token: bool = False  # a vector for each token of the row, instead of one
    token_ids: TokenIds = "model"
    lane: Lane | None = None  # by default by the request's size
    timeout_seconds: float | None = None
    wait_seconds: float = 0.0  # how long to wait for room in the queue before it is an overload
    param: str = "input"
    dimensions_param: str = "dimensions"
    beside: int = 0  # of the inputs, those that the caller did not count: the query beside its texts

    @cached_property
    def characters(self) -> int:
        """Of all texts and of all instructions."""
        texts = sum(len(item.text) for item in self.inputs if isinstance(item.text, str))
        return texts + sum(len(item.instruction.text) for item in self.inputs)

    @cached_property
    def ids(self) -> int:
        """Token ids that were given in the place of texts."""
        return sum(len(item.text) for item in self.inputs if not isinstance(item.text, str))


@dataclass(frozen=True)
class EmbedResult:
    """Float32 vectors in the order of the inputs, each of the width asked for, and what they cost.

    One (width,) vector for each input, or (tokens, width) where each token was asked for.
    """

    vectors: Sequence[Vector]
    prompt_tokens: int
    truncated_inputs: int
    tokenize_seconds: float
    queue_seconds: float  # of the input that waited longest
    inference_seconds: float  # of the slowest batch an input was in


@dataclass(frozen=True)
class ChunkRequest:
    """One text, embedded once with all of its context; a vector for each chunk of it.

    The chunks are character ranges [start, end) that are given, or consecutive runs of so many tokens.
    """

    text: str
    instruction: Chosen = NONE
    chunk_tokens: int = 0
    spans: Sequence[tuple[int, int]] = ()
    dimensions: int | None = None
    normalize: bool = True
    lane: Lane | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True)
class ChunkResult:
    """A vector, the characters and the number of tokens for each chunk, and what all of them cost together."""

    spans: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    embedded: EmbedResult


class PreviewToken(NamedTuple):
    """A token as the vocabulary spells it and as text, where it came from, and whether it is pooled, or cut."""

    id: int
    token: str
    text: str
    part: Part
    pooled: bool
    cut: bool


@dataclass(frozen=True)
class Preview:
    """The tokens of an input: those that the model would read, and in their place those that are cut."""

    tokens: Sequence[PreviewToken]


@dataclass(frozen=True)
class LocatedTokens:
    """A row before anything is cut, and the characters [start, end) of `text` that each of its tokens stands for.

    `text` has the instruction in front. `own` are its tokens; what else there is stands around every text, and for no
    characters.
    """

    text: str
    token_ids: Sequence[int]
    characters: Sequence[tuple[int, int]]
    own: range


@dataclass
class Embedder:
    """Checks, tokenizes and submits."""

    manifest: Manifest
    tokenizer: Tokenizes
    batcher: Batcher[EmbedRow, Vector]
    settings: Settings
    limits: Limits
    metrics: Metrics
    running: int = field(default=0, init=False)  # requests not answered yet
    _tokenizing: dict[Lane, int] = field(init=False)  # tokens, as guessed
    _waiting: int = field(default=0, init=False)  # tokens of requests that wait for room
    _tokens_per_character: float = field(default=0.25, init=False)
    _pool: TokenizerPool = field(init=False)
    _lines: dict[Lane, Line] = field(init=False)  # of those that wait for room

    def __post_init__(self) -> None:
        self._pool = TokenizerPool(self.settings.tokenizer_threads)
        self._tokenizing = dict.fromkeys(LANES, 0)
        self._lines = {lane: Line() for lane in LANES}
        self.batcher.on_room = self._call_lines

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Vectors for a request's inputs.

        Raises:
            InvalidRequest: for an input, a count or a dimension that can't be served, naming it.
            Overloaded: if too much is queued already; nothing was computed.
            DeadlineExceeded: if it still waited when its time was over; nothing was computed.
            EncodingError: if the device failed on one of the inputs.
        """
        self.running += 1
        try:
            return await self._embed(request)
        finally:
            self.running -= 1

    async def embed_chunks(self, request: ChunkRequest) -> ChunkResult:
        """Late chunking (Günther et al. 2024): each chunk's vector is pooled from token vectors that saw all the text.

        Raises:
            InvalidRequest: for a text that is too long or empty, or a chunk that holds no token of it.
            Overloaded, DeadlineExceeded, EncodingError: as `embed`.
        """
        self.running += 1
        try:
            return await self._embed_chunks(request)
        finally:
            self.running -= 1

    async def preview(self, request: EmbedRequest) -> list[Preview]:
        """What each input becomes, token by token; nothing is computed, and what `embed` would refuse is shown whole.

        Raises:
            InvalidRequest: for inputs that can't be tokenized, or that have too many tokens.
            Overloaded, DeadlineExceeded: as `embed`.
        """
        began = time.perf_counter()
        self._check(request)
        tokens, lane = self._likely(request)
        with await self._admitted(tokens, lane, began, request.timeout_seconds, request.wait_seconds):
            rows = [row for (row,) in await self._tokenize(request)]
            hold_tokens(sum(map(len, rows)))
            return await self._pool.run(
                lane,
                lambda: [self._explain(item, row, request) for item, row in zip(request.inputs, rows, strict=True)],
            )

    async def locate(self, request: EmbedRequest) -> list[LocatedTokens]:
        """Where in each input, all of them texts, or in its instruction its tokens are; nothing is computed.

        Raises:
            InvalidRequest: for inputs that can't be tokenized, or that have too many tokens.
            Overloaded, DeadlineExceeded: as `embed`.
        """
        began = time.perf_counter()
        self._check(request)
        tokens, lane = self._likely(request)
        with await self._admitted(tokens, lane, began, request.timeout_seconds, request.wait_seconds):
            hold_tokens(sum(len(row) for (row,) in await self._tokenize(request)))
            return await self._pool.run(
                lane, lambda: [self._locate(str(item.text), item.instruction.text) for item in request.inputs]
            )

    async def decode(
        self,
        token_ids: Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        param: str = "ids",
        wait_seconds: float = 0.0,
    ) -> list[str]:
        """The texts of this model's own token ids. `param` is what the caller's dialect calls these, for messages.

        Raises:
            InvalidRequest: for ids that the model does not have, or too many lists of them.
            Overloaded: as `embed`.
        """
        began = time.perf_counter()
        self._check_count(len(token_ids), param)
        self._check_tokens(tokens := sum(map(len, token_ids)))
        hold_tokens(tokens)

        def decode_one(index: int) -> str:
            try:
                return self.tokenizer.decode(token_ids[index], skip_special_tokens)
            except TokenizationError as error:
                raise InvalidRequest(f"{param} index {index}: {error}", "invalid_token_ids", param) from error

        lane = self._lane(len(token_ids), tokens)
        with await self._admitted(max(tokens, len(token_ids)), lane, began, wait_seconds=wait_seconds):
            return await self._pool.run(lane, lambda: list(map(decode_one, range(len(token_ids)))))

    async def probe(self) -> None:
        """Encode one token, to see that the device still does.

        Raises:
            EncodingError, Unavailable: if it does not.
        """
        await self.batcher.probe(EmbedRow(TokenizedText([0], 0), self.manifest.width))

    def close(self) -> None:
        """End the tokenizer threads."""
        self._pool.close()

    async def _embed(self, request: EmbedRequest) -> EmbedResult:
        began = time.perf_counter()
        self._check(request)
        if request.overflow == "error":
            self._check_context(request)
        tokens, guessed_lane = self._likely(request)
        with await self._admitted(tokens, guessed_lane, began, request.timeout_seconds, request.wait_seconds):
            fitted = await self._tokenize(request, fit=True)
            rows = await self._aside(guessed_lane, fitted, lambda: self._rows(fitted, request))
        self._note_lengths(request, rows)
        tokenized = time.perf_counter()
        lane, timeout = request.lane, request.timeout_seconds
        try:
            computed = await self._compute(rows, lane, timeout, began, request.wait_seconds)
            result = _result(rows, computed, sum(parts[0].cut for parts in fitted), tokenized - began)
        except EncodingError as error:
            raise error.at(_input_of(error.index, fitted)) from error
        if len(rows) > len(fitted):
            width = request.dimensions or self.manifest.width
            try:
                result = replace(result, vectors=_means(fitted, result.vectors, width, request.normalize))
            except NonFiniteEmbedding:
                self.metrics.nonfinite.inc()
                raise
        sources = [item.instruction.source for item in request.inputs]
        await self._aside(guessed_lane, fitted, lambda: self._measure(sources, rows, result))
        return result

    async def _admitted(
        self,
        tokens: int,
        lane: Lane,
        began: float,
        timeout_seconds: float | None = None,
        wait_seconds: float = 0.0,
    ) -> AbstractContextManager[None]:
        """A context to tokenize a request in, once there seems to be room: nothing is spent on what is refused.

        Its tokens are a guess, and it counts as queued while it is tokenized. Where so much waits for room that it
        would fill the queue several times, a request does not wait.

        Raises:
            Overloaded: if there is no room.
            DeadlineExceeded: if its time ran out first.
            Unavailable: if the batcher has ended.
        """

        def admit() -> AbstractContextManager[None]:
            self.batcher.admit(tokens, lane, self._tokenizing[lane])
            return self._counted(tokens, lane)

        crowded = self._waiting and self._waiting + tokens > _WAITING_QUEUES * self.settings.max_queued_tokens
        self._waiting += tokens
        try:
            return await self._in_turn(lane, admit, began, timeout_seconds, 0.0 if crowded else wait_seconds)
        finally:
            self._waiting -= tokens

    def _likely(self, request: EmbedRequest) -> tuple[int, Lane]:
        """A guess of a request's tokens, and the lane that it is of by them."""
        guessed = round(request.characters * self._tokens_per_character) + request.ids
        tokens = max(guessed, len(request.inputs))
        return tokens, self._lane(len(request.inputs), tokens, request.lane)

    async def _in_turn(
        self,
        lane: Lane,
        attempt: Callable[[], T],
        began: float,
        timeout_seconds: float | None,
        wait_seconds: float,
        refused: bool = False,
    ) -> T:
        """The result of an attempt that finds room in the lane, once all who came earlier have found theirs.

        `refused` is who has tried already: it waits for more room.

        Raises:
            Overloaded: if there is none in time.
            DeadlineExceeded: if the time of `began` and `timeout_seconds` ran out first.
        """
        now = time.perf_counter()
        deadline = math.inf if timeout_seconds is None else began + timeout_seconds
        until = min(deadline, began + wait_seconds)
        if now >= deadline:
            raise DeadlineExceeded
        line = self._lines[lane]
        if not refused and not line.is_before(began):
            try:
                return attempt()
            except Overloaded:
                if now >= until:
                    raise
        elif now >= until:
            raise self.batcher.overloaded(lane)
        try:
            return await line.wait(began, attempt, until - now)
        except TimeoutError:
            raise (DeadlineExceeded() if until == deadline else self.batcher.overloaded(lane)) from None

    def _call_lines(self) -> None:
        for line in self._lines.values():
            line.call()

    @contextmanager
    def _counted(self, tokens: int, lane: Lane) -> Iterator[None]:
        self._tokenizing[lane] += tokens
        try:
            yield
        finally:
            self._tokenizing[lane] -= tokens
            self._lines[lane].call()

    def _note_lengths(self, request: EmbedRequest, rows: Sequence[EmbedRow]) -> None:
        """Keep the guess near to what texts here come to. Token ids say nothing of it."""
        if request.characters and not request.ids:
            seen = sum(map(len, rows)) / request.characters
            self._tokens_per_character += _NEWEST * (min(seen, 1.0) - self._tokens_per_character)

    def _rows(self, fitted: list[list[TokenizedText]], request: EmbedRequest) -> list[EmbedRow]:
        """The rows of all inputs, as they are queued."""
        # The mean of chunks is taken of whole vectors: cutting one afterwards is the same as asking for it shorter.
        whole = self.manifest.width
        width = request.dimensions or whole
        if request.each_token:
            self._check_numbers(_tokens(fitted) * width)
            fitted = [[replace(part, spans=_each_token(part)) for part in parts] for parts in fitted]
        return [
            EmbedRow(part, whole if len(parts) > 1 else width, request.normalize) for parts in fitted for part in parts
        ]

    async def _aside(self, lane: Lane, fitted: list[list[TokenizedText]], work: Callable[[], T]) -> T:
        """Done at once for few tokens; for many in a tokenizer's thread, so that the event loop is never long at it."""
        if len(fitted) <= _TOKENIZE_AT_ONCE and _tokens(fitted) <= _TOKENS_HERE:
            return work()
        return await self._pool.run(lane, work)

    async def _embed_chunks(self, request: ChunkRequest) -> ChunkResult:
        began = time.perf_counter()
        whole = EmbedRequest([EmbedInput(request.text, request.instruction)], request.dimensions, lane=request.lane)
        self._check(whole)
        self._check_context(whole)
        tokens, lane = self._likely(whole)
        with await self._admitted(tokens, lane, began, request.timeout_seconds):
            try:
                text, characters = await self._pool.run(
                    lane, lambda: self.tokenizer.locate(request.text, request.instruction.text)
                )
            except TokenizationError as error:
                raise InvalidRequest(str(error), "invalid_input", "input") from error
        if len(text) > self.limits.max_input_tokens:
            raise ContextLengthExceeded(self.limits.max_input_tokens, len(text), 0)
        own = range(text.head, len(text) - text.tail)
        if request.spans:
            spans = _tokens_of(request.spans, own, characters)
            self._check_coverage(spans, len(text))
        else:
            at_once = request.chunk_tokens
            spans = [(start, min(start + at_once, own.stop)) for start in range(own.start, own.stop, at_once)]
        width = request.dimensions or self.manifest.width
        self._check_numbers(len(spans) * width)
        rows = [EmbedRow(replace(text, spans=tuple(spans)), width, request.normalize)]
        tokenized = time.perf_counter()
        computed = await self._compute(rows, request.lane, request.timeout_seconds, began)
        result = _result(rows, computed, 0, tokenized - began)
        self._measure([request.instruction.source], rows, result)
        return ChunkResult(
            request.spans or [_characters_of(span, characters) for span in spans],
            [end - start for start, end in spans],
            replace(result, vectors=list(result.vectors[0])),
        )

    def _check(self, request: EmbedRequest) -> None:
        inputs, param = request.inputs, request.param
        self._check_count(len(inputs) - request.beside, param)
        if self.settings.empty_text == "error":
            for index, item in enumerate(inputs):
                if _is_empty(item.text):
                    raise InvalidRequest(
                        f"the input at index {index} is empty: leave it out, an empty text has no vector "
                        "(the setting LLM2VEC_EMPTY_TEXT=bos embeds it as the special tokens alone)",
                        "empty_input",
                        param,
                    )
        self._check_characters(inputs, param)
        width = self.manifest.width
        if request.dimensions is not None and not 1 <= request.dimensions <= width:
            raise InvalidRequest(
                f"{request.dimensions_param} is {request.dimensions}: this model has 1 to {width}",
                "invalid_dimensions",
                request.dimensions_param,
            )

    def _check_count(self, inputs: int, param: str) -> None:
        if not inputs:
            raise InvalidRequest(f"{param} is empty: send at least one", "empty_input", param)
        if inputs > self.settings.max_inputs_per_request:
            raise TooManyInputs(inputs, self.settings.max_inputs_per_request, param)

    def _check_characters(self, inputs: Sequence[EmbedInput], param: str) -> None:
        most = self.settings.max_input_characters
        for index, item in enumerate(inputs):
            for text, where in ((item.text, param), (item.instruction.text, "instruction")):
                if isinstance(text, str) and len(text) > most:
                    raise InvalidRequest(
                        f"the {where} of index {index} has {len(text)} characters: at most {most} are taken "
                        "(the setting LLM2VEC_MAX_INPUT_CHARACTERS)",
                        "request_too_large",
                        where,
                    )

    def _check_context(self, request: EmbedRequest) -> None:
        """Refuse an input of which it is certain that it has too many tokens, before time is spent on counting them."""
        most = self.limits.max_input_tokens
        for_texts, for_ids = self.tokenizer.characters_per_token, 1 if request.token_ids == "model" else None
        for index, (text, _) in enumerate(request.inputs):
            per_token = for_texts if isinstance(text, str) else for_ids
            if per_token and len(text) > most * per_token:
                length = len(text.rstrip()) if isinstance(text, str) else len(text)
                tokens = -(-length // per_token)
                if tokens > most:
                    raise ContextLengthExceeded(most, tokens, index, request.param, at_least=True)

    def _check_tokens(self, tokens: int) -> None:
        if tokens > self.settings.max_tokens_per_request:
            raise InvalidRequest(
                f"{tokens} tokens in one request: at most {self.settings.max_tokens_per_request} are taken, "
                "send fewer inputs at once",
                "request_too_large",
                "input",
            )

    def _check_numbers(self, numbers: int) -> None:
        if numbers > _MOST_NUMBERS:
            raise InvalidRequest(
                f"the answer would have {numbers} numbers, of at most {_MOST_NUMBERS}: send less text at once, or ask "
                "for fewer dimensions",
                "request_too_large",
                "input",
            )

    def _check_coverage(self, spans: Sequence[tuple[int, int]], tokens: int) -> None:
        """Spans that overlap are pooled from the same tokens again, each time in memory of the device."""
        pooled = sum(end - start for start, end in spans)
        if pooled > _MOST_COVERAGE * tokens:
            raise InvalidRequest(
                f"the spans hold {pooled} tokens together, of a text of {tokens}: at most {_MOST_COVERAGE} times as "
                "many are taken, send fewer of the spans that overlap at once",
                "request_too_large",
                "spans",
            )

    async def _tokenize(self, request: EmbedRequest, fit: bool = False) -> list[list[TokenizedText]]:
        """The rows of each input: one, or where it is to `fit` what is left of it once the request's overflow is done.

        Slices of the request are tokenized by several threads. What is too long is found in them, so that no more than
        a slice is tokenized for nothing and nothing is kept of what is cut.

        Raises:
            InvalidRequest: naming the first that can't be, or for too many tokens together.
        """
        inputs, lane = request.inputs, self._likely(request)[1]

        def encode(start: int, stop: int) -> list[list[TokenizedText]]:
            some = inputs[start:stop]
            try:
                rows = self._encode([item.text for item in some], [item.instruction.text for item in some], request)
            except TokenizationError as error:
                index = start + error.index
                raise InvalidRequest(
                    f"input index {index}: {error}",
                    "invalid_input" if isinstance(inputs[index].text, str) else "invalid_token_ids",
                    request.param,
                ) from error
            return self._fit(rows, request, start) if fit else [[row] for row in rows]

        if request.characters + request.ids <= _TOKENIZE_HERE and len(inputs) <= _TOKENIZE_AT_ONCE:
            found = encode(0, len(inputs))
            self._check_tokens(_tokens(found))
            return found
        work = [asyncio.ensure_future(self._pool.run(lane, partial(encode, *slice_))) for slice_ in _slices(inputs)]
        found, tokens = [], 0
        try:
            for slice_rows in work:
                some = await slice_rows
                self._check_tokens(tokens := tokens + _tokens(some))
                found += some
        finally:
            for slice_rows in work:
                slice_rows.cancel()
            await asyncio.gather(*work, return_exceptions=True)
        return found

    def _encode(
        self, given: Sequence[str | Sequence[int]], instructions: Sequence[str], request: EmbedRequest
    ) -> list[TokenizedText]:
        texts = [self._text(text, request.token_ids, index) for index, text in enumerate(given)]
        if self.settings.empty_text == "error" or not any(map(_is_empty, texts)):
            rows = self.tokenizer.encode_batch(texts, instructions)
            if self.settings.empty_text == "error":
                _refuse_emptied(rows)
            return rows
        one = self.tokenizer.encode_batch
        return [
            self.tokenizer.encode_nothing() if _is_empty(text) else one([text], [instruction])[0]
            for text, instruction in zip(texts, instructions, strict=True)
        ]

    @staticmethod
    def _text(text: str | Sequence[int], token_ids: TokenIds, index: int) -> str | Sequence[int]:
        """What the tokenizer is to be given: another encoding's ids become text again."""
        if isinstance(text, str) or token_ids == "model":
            return text
        try:
            return decode(token_ids, text)
        except UnknownTokenId as error:
            raise TokenizationError(str(error), index) from error

    def _fit(self, texts: list[TokenizedText], request: EmbedRequest, first: int) -> list[list[TokenizedText]]:
        """The rows of each input, of which the first has this index, none longer than the server reads."""
        most = self.limits.max_input_tokens
        mean = request.overflow == "mean"
        fitted, tokens = [], 0
        for index, text in enumerate(texts, first):
            if len(text) <= most:
                fitted.append([text])
                tokens += len(text)
                continue
            if request.overflow == "error":
                raise ContextLengthExceeded(most, len(text), index, request.param)
            if text.room(most) < 1:
                raise InvalidRequest(
                    f"the instruction of input index {index} leaves no room for a text: its {text.head} tokens and "
                    f"the model's own are more than the {most} that it reads",
                    "context_length_exceeded",
                    "instruction",
                )
            # Each chunk has the instruction again: together they can be many times what was sent.
            tokens += text.chunk_tokens(most) if mean else most
            self._check_tokens(tokens)
            fitted.append(text.chunks(most) if mean else [text.shortened(most, request.keep)])
        return fitted

    async def _compute(
        self,
        rows: list[EmbedRow],
        lane: Lane | None,
        timeout_seconds: float | None,
        began: float,
        wait_seconds: float = 0.0,
    ) -> list[Computed[Vector]]:
        """The rows' vectors, once they are admitted."""
        tokens = sum(map(len, rows))
        self._check_tokens(tokens)
        hold_vectors(sum(row.width * max(len(row.text.spans), 1) for row in rows))
        lane = self._checked_lane(len(rows), tokens, lane)
        lane_of_request.set(lane)
        refused = False
        while True:
            admit = partial(self.batcher.admit, tokens, lane)
            await self._in_turn(lane, admit, began, timeout_seconds, wait_seconds, refused)
            left = None if timeout_seconds is None else began + timeout_seconds - time.perf_counter()
            try:
                return await self.batcher.submit(rows, lane, left, caller_of_request.get())
            except Overloaded:
                if not wait_seconds:
                    raise
                refused = True  # by an engine that another front end was faster to fill

    def _lane(self, inputs: int, tokens: int, asked: Lane | None = None) -> Lane:
        few = asked == "interactive" or inputs <= self.settings.interactive_inputs
        small = few and tokens <= self._interactive_tokens
        return "interactive" if small and asked != "bulk" else "bulk"

    @property
    def _interactive_tokens(self) -> int:
        """Tokens of a request that may go before bulk: with more, one caller's requests would keep others waiting."""
        return self.batcher.batch_tokens // 2

    def _checked_lane(self, inputs: int, tokens: int, asked: Lane | None) -> Lane:
        """The lane of a request of so many tokens.

        Raises:
            InvalidRequest: if it asks for the interactive lane and is too large for it.
        """
        lane = self._lane(inputs, tokens, asked)
        if lane == "bulk" and asked == "interactive":
            raise InvalidRequest(
                f"{tokens} tokens in a request with priority interactive: at most {self._interactive_tokens}, half a "
                "batch, are taken so; send fewer inputs at once, or leave priority out",
                "request_too_large",
                "priority",
            )
        return lane

    def _locate(self, text: str, instruction: str) -> LocatedTokens:
        """What `encode_batch` makes of them: it puts an instruction before a text in just this way."""
        if self.settings.empty_text == "bos" and _is_empty(text):
            nothing = self.tokenizer.encode_nothing()
            return LocatedTokens(text, nothing.token_ids, [(0, 0)] * len(nothing), range(0))
        whole = f"{instruction.strip()} {text}" if instruction.strip() else text
        row, characters = self.tokenizer.locate(whole, "")
        first = next((place for place, (start, end) in enumerate(characters) if start < end), row.head)
        own = range(min(row.head, first), len(row) - row.tail)
        return LocatedTokens(whole, row.token_ids, characters, own)

    def _explain(self, item: EmbedInput, row: TokenizedText, request: EmbedRequest) -> Preview:
        """The tokens of a row as it would be read: cut as the request says, or by the tokenizer already."""
        most, whole, keep = self.limits.max_input_tokens, row, request.keep
        if row.cut and isinstance(item.text, str):
            whole, _ = self.tokenizer.locate(item.text, item.instruction.text)
            keep = "start"
        if request.overflow == "truncate" and row.room(most) >= 1:
            row = row.shortened(most, request.keep)
        instruction = "" if _is_empty(item.text) else item.instruction.text

        def told(ids: Sequence[int], parts: Sequence[Part], pooled: Iterable[bool], cut: bool) -> list[PreviewToken]:
            spelled, texts = self.tokenizer.tokens(ids), self.tokenizer.token_texts(ids)
            return [PreviewToken(*one, cut) for one in zip(ids, spelled, texts, parts, pooled, strict=True)]

        pooled = [self._pools(row, place) for place in range(len(row))]
        tokens = told(row.token_ids, self.tokenizer.parts(row, instruction), pooled, False)
        place = row.head if keep == "end" else len(row) - row.tail
        lost = slice(place, place + max(len(whole) - len(row), 0))
        lost_ids, lost_parts = whole.token_ids[lost], self.tokenizer.parts(whole, instruction)[lost]
        tokens[place:place] = told(lost_ids, lost_parts, [False] * len(lost_ids), True)
        return Preview(tokens)

    def _pools(self, text: TokenizedText, place: int) -> bool:
        match self.manifest.pooling:
            case "bos_token":
                return place == 0
            case "last_token" | "eos_token":
                return place == len(text) - 1
        return place >= text.span_start

    def _measure(self, sources: Sequence[Source], rows: list[EmbedRow], result: EmbedResult) -> None:
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
        metrics.tokenize_seconds.observe(result.tokenize_seconds)
        for row in rows:
            metrics.input_tokens.observe(len(row))


def _tokens(fitted: Iterable[Iterable[TokenizedText]]) -> int:
    return sum(len(row) for rows in fitted for row in rows)


def _slices(inputs: Sequence[EmbedInput]) -> Iterator[tuple[int, int]]:
    """Ranges of inputs that are tokenized by one call each; a long text is one by itself."""
    start = characters = 0
    for place, (text, instruction) in enumerate(inputs):
        length = len(text) + len(instruction.text)
        if place - start == _TOKENIZE_AT_ONCE or (place > start and characters + length > _CHARACTERS_AT_ONCE):
            yield start, place
            start, characters = place, 0
        characters += length
    yield start, len(inputs)


def _is_empty(text: str | Sequence[int]) -> bool:
    return not text or (isinstance(text, str) and text.isspace())


def _refuse_emptied(rows: Sequence[TokenizedText]) -> None:
    """Refuse rows that reference truncation left nothing of the text in: all of them would get one vector."""
    for index, row in enumerate(rows):
        if row.emptied:
            raise TokenizationError(
                "reference truncation leaves no token of this text: it drops whole words from a text that is too long, "
                "so that nothing stays of one without spaces, and cuts what stands behind a long instruction. Send it "
                "in parts, or set LLM2VEC_TRUNCATION=token. LLM2VEC_EMPTY_TEXT=bos gives such texts the official "
                "library's vector, which is the same for all of them",
                index,
            )


def _each_token(row: TokenizedText) -> tuple[tuple[int, int], ...]:
    return tuple((place, place + 1) for place in range(len(row)))


def _result(rows: list[EmbedRow], computed: list[Computed[Vector]], cut: int, tokenize_seconds: float) -> EmbedResult:
    return EmbedResult(
        vectors=[item.vector for item in computed],
        prompt_tokens=sum(map(len, rows)),
        truncated_inputs=cut,
        tokenize_seconds=tokenize_seconds,
        queue_seconds=max(item.queue_seconds for item in computed),
        inference_seconds=max(item.inference_seconds for item in computed),
    )


def _means(
    fitted: Sequence[Sequence[TokenizedText]], vectors: Sequence[Vector], width: int, normalize: bool
) -> list[Vector]:
    """One vector an input: the mean of its chunks' vectors, each weighed by the tokens it pooled.

    Raises:
        NonFiniteEmbedding: where the chunks of an input cancel each other out, so that their mean has no direction.
    """
    remaining = iter(vectors)
    means: list[Vector] = []
    for parts in fitted:
        own = [next(remaining) for _ in parts]
        if len(parts) == 1:
            means += own
            continue
        pooled = np.array([len(part) - part.span_start for part in parts], dtype=np.float32)
        mean: Vector = ((pooled / pooled.sum()) @ np.stack(own))[:width]
        length = np.linalg.norm(mean) if normalize else np.float32(1)
        if not (length > 0 and np.isfinite(mean.sum() / length)):
            raise NonFiniteEmbedding("the chunks of this input have no finite mean of length 1").at(len(means))
        means.append(mean / length)
    return means


def _input_of(row: int | None, fitted: Sequence[Sequence[TokenizedText]]) -> int | None:
    """The place of the input that a row is a part of."""
    return None if row is None else bisect_right(list(accumulate(map(len, fitted))), row)


def _tokens_of(
    spans: Sequence[tuple[int, int]], own: range, characters: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """For each span [start, end) of characters the text's tokens that stand for any of them: a range, by halving."""
    starts, ends = ([bounds[side] for bounds in characters[own.start : own.stop]] for side in (0, 1))
    found = []
    for number, (start, end) in enumerate(spans):
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if first >= last:
            raise InvalidRequest(
                f"the span at index {number}, characters {start} to {end}, holds no token of the text",
                "invalid_span",
                "spans",
            )
        found.append((own.start + first, own.start + last))
    return found


def _characters_of(span: tuple[int, int], characters: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The characters that a range of tokens stands for."""
    some = [bounds for bounds in characters[slice(*span)] if bounds[0] < bounds[1]]
    return (some[0][0], some[-1][1]) if some else (0, 0)
