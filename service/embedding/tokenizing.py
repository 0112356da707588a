"""Inputs → rows: a small request at once on the event loop, a large one in slices in several threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

from model_store.text.openai_tokens import UnknownTokenId, decode
from model_store.text.tokenizer import Part, TokenizationError, TokenizedText
from service.batching.scheduling import Lane
from service.embedding.bounds import check_tokens
from service.embedding.long_texts import count_tokens
from service.embedding.requests import EmbedInput, EmbedRequest, TextOrIds, TokenIds, is_empty
from service.embedding.tokenizer_pool import TokenizerPool
from service.errors import InvalidRequest

T = TypeVar("T")

# The most texts and characters of a slice: enough to be worth a thread's while, but few enough that several threads
# share a request, and that little work is lost where it is refused.
_TEXTS_IN_A_SLICE = 64
_CHARACTERS_IN_A_SLICE = 1 << 18

# The most characters that are tokenized on the event loop: a tenth of a millisecond, half of a thread's round trip.
_CHARACTERS_ON_THE_LOOP = 512

# The most tokens of rows that are worked on on the event loop: a millisecond.
_TOKENS_ON_THE_LOOP = 8192


class Tokenizes(Protocol):
    """The methods of `model_store.text.tokenizer.TextTokenizer`, which documents them."""

    @property
    def characters_per_token(self) -> int | None:
        """The most characters that a token stands for, white space at a text's end left out; None if unknown."""

    def encode_batch(self, texts: Sequence[TextOrIds], instructions: Sequence[str]) -> list[TokenizedText]: ...
    def encode_nothing(self) -> TokenizedText: ...
    def locate(self, text: str, instruction: str) -> tuple[TokenizedText, list[tuple[int, int]]]: ...
    def tokens(self, token_ids: Sequence[int]) -> list[str]: ...
    def token_texts(self, token_ids: Sequence[int]) -> list[str]: ...
    def parts(self, row: TokenizedText, instruction: str) -> list[Part]: ...
    def special_tokens(self) -> frozenset[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def encode(
    tokenizer: Tokenizes, request: EmbedRequest, start: int, stop: int, allow_empty: bool
) -> list[TokenizedText]:
    """A row for each input of a slice of the request; if they are allowed, empty texts get the special tokens alone."""
    inputs = request.inputs[start:stop]
    try:
        texts = [_as_this_model_reads(text, request.token_ids, index) for index, (text, _) in enumerate(inputs)]
        instructions = [item.instruction.text for item in inputs]
        if not (allow_empty and any(map(is_empty, texts))):
            rows = tokenizer.encode_batch(texts, instructions)
            if not allow_empty:
                _refuse_emptied(rows)
            return rows
        filled = [(index, text) for index, text in enumerate(texts) if not is_empty(text)]
        try:
            encoded = iter(
                tokenizer.encode_batch([text for _, text in filled], [instructions[index] for index, _ in filled])
                if filled
                else ()
            )
        except TokenizationError as error:
            raise TokenizationError(str(error), filled[error.index][0]) from error
        return [tokenizer.encode_nothing() if is_empty(text) else next(encoded) for text in texts]
    except TokenizationError as error:
        code = "invalid_input" if isinstance(inputs[error.index].text, str) else "invalid_token_ids"
        raise InvalidRequest(f"input index {start + error.index}: {error}", code, request.param) from error


async def tokenize(
    request: EmbedRequest,
    lane: Lane,
    pool: TokenizerPool,
    rows_of: Callable[[int, int], list[list[TokenizedText]]],
    max_request_tokens: int,
) -> list[list[TokenizedText]]:
    """The rows of each input, made by `rows_of(start, stop)` for slices of the request.

    `rows_of` also fits the rows, so that at most a slice for each thread is tokenized for nothing where an input is too
    long, and nothing is kept of text that is cut.

    Raises:
        InvalidRequest: the first error of `rows_of` in the order of the inputs, or for too many tokens together.
    """
    inputs = request.inputs
    if request.characters + request.ids <= _CHARACTERS_ON_THE_LOOP and len(inputs) <= _TEXTS_IN_A_SLICE:
        found = rows_of(0, len(inputs))
        check_tokens(count_tokens(found), max_request_tokens)
        return found
    work = [asyncio.ensure_future(pool.run(lane, partial(rows_of, *ends))) for ends in slice_ends(inputs)]
    found, tokens = [], 0
    try:
        for slice_rows in work:
            some = await slice_rows
            check_tokens(tokens := tokens + count_tokens(some), max_request_tokens)
            found += some
    finally:
        for slice_rows in work:
            slice_rows.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    return found


async def run_aside(
    pool: TokenizerPool, lane: Lane, fitted: Sequence[Sequence[TokenizedText]], work: Callable[[], T]
) -> T:
    """Do work whose time grows with the rows: at once for few tokens, in a tokenizer's thread for many.

    The event loop is never busy with it for long.
    """
    if len(fitted) <= _TEXTS_IN_A_SLICE and count_tokens(fitted) <= _TOKENS_ON_THE_LOOP:
        return work()
    return await pool.run(lane, work)


def slice_ends(inputs: Sequence[EmbedInput]) -> Iterator[tuple[int, int]]:
    """Ranges of inputs, each tokenized by one call; a long text is a slice by itself."""
    start = characters = 0
    for place, (text, instruction) in enumerate(inputs):
        length = len(text) + len(instruction.text)
        if place - start == _TEXTS_IN_A_SLICE or (place > start and characters + length > _CHARACTERS_IN_A_SLICE):
            yield start, place
            start, characters = place, 0
        characters += length
    yield start, len(inputs)


def _as_this_model_reads(text: TextOrIds, token_ids: TokenIds, index: int) -> TextOrIds:
    """A text or this model's own ids as they are; another encoding's ids become text again."""
    if isinstance(text, str) or token_ids == "model":
        return text
    try:
        return decode(token_ids, text)
    except UnknownTokenId as error:
        raise TokenizationError(str(error), index) from error


def _refuse_emptied(rows: Sequence[TokenizedText]) -> None:
    """Refuse texts of which reference truncation has left nothing: all of them would get the same vector."""
    for index, row in enumerate(rows):
        if row.emptied:
            raise TokenizationError(
                "reference truncation leaves no token of this text: it drops whole words from a text that is too long, "
                "so that nothing stays of one without spaces, and cuts what stands behind a long instruction. Send it "
                "in parts, or set LLM2VEC_TRUNCATION=token. LLM2VEC_EMPTY_TEXT=bos gives such texts the official "
                "library's vector, which is the same for all of them",
                index,
            )
