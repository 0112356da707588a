"""Views of an input's tokens that need no device: previewed, located, or decoded to text. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model_store.pooling_modes import PoolingMode
from model_store.text.tokenizer import Part, TokenizationError, TokenizedText
from service.embedding.requests import EmbedInput, EmbedRequest, LocatedTokens, PreviewToken, is_empty
from service.embedding.tokenizing import Tokenizes
from service.errors import InvalidRequest


def preview(
    tokenizer: Tokenizes, item: EmbedInput, row: TokenizedText, request: EmbedRequest, most: int, pooling: PoolingMode
) -> list[PreviewToken]:
    """The tokens of an input's row in order, cut to `most` tokens as the request says, or by the tokenizer itself."""
    whole, keep = row, request.keep
    if row.cut and isinstance(item.text, str):
        whole, _ = tokenizer.locate(item.text, item.instruction.text)
        keep = "start"
    if request.overflow == "truncate" and row.room(most) >= 1:
        row = row.shortened(most, request.keep)
    instruction = "" if is_empty(item.text) else item.instruction.text

    def describe(ids: Sequence[int], parts: Sequence[Part], pooled: Iterable[bool], cut: bool) -> list[PreviewToken]:
        spelled, texts = tokenizer.tokens(ids), tokenizer.token_texts(ids)
        return [PreviewToken(*token, cut) for token in zip(ids, spelled, texts, parts, pooled, strict=True)]

    pooled = [_is_pooled(row, place, pooling) for place in range(len(row))]
    tokens = describe(row.token_ids, tokenizer.parts(row, instruction), pooled, False)
    place = row.head if keep == "end" else len(row) - row.tail
    lost = slice(place, place + max(len(whole) - len(row), 0))
    lost_ids, lost_parts = whole.token_ids[lost], tokenizer.parts(whole, instruction)[lost]
    tokens[place:place] = describe(lost_ids, lost_parts, [False] * len(lost_ids), True)
    return tokens


def locate(tokenizer: Tokenizes, item: EmbedInput, allow_empty: bool) -> LocatedTokens:
    """The tokens of a text with its instruction in front, joined just as `encode_batch` joins them."""
    text, instruction = str(item.text), item.instruction.text.strip()
    if allow_empty and is_empty(text):
        nothing = tokenizer.encode_nothing()
        return LocatedTokens(text, nothing.token_ids, [(0, 0)] * len(nothing), range(0))
    whole = f"{instruction} {text}" if instruction else text
    row, characters = tokenizer.locate(whole, "")
    first = next((place for place, (start, end) in enumerate(characters) if start < end), row.head)
    own = range(min(row.head, first), len(row) - row.tail)
    return LocatedTokens(whole, row.token_ids, characters, own)


def decode(tokenizer: Tokenizes, token_ids: Sequence[int], skip_special_tokens: bool, index: int) -> str:
    """The text of token ids."""
    try:
        return tokenizer.decode(token_ids, skip_special_tokens)
    except TokenizationError as error:
        raise InvalidRequest(f"ids index {index}: {error}", "invalid_token_ids", "ids") from error


def _is_pooled(row: TokenizedText, place: int, pooling: PoolingMode) -> bool:
    match pooling:
        case "bos_token":
            return place == 0
        case "last_token" | "eos_token":
            return place == len(row) - 1
    return place >= row.span_start
