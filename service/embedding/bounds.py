"""The bounds on a request, as pure functions: each returns nothing, or raises the error that the caller gets.

All of them are arithmetic on lengths, so that a request is refused before time or memory is spent on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.embedding.requests import EmbedInput, is_empty
from service.errors import ContextLengthExceeded, InvalidRequest, TooManyInputs

# Numbers in the answer to one request: 256 MB as float32.
MAX_NUMBERS = 1 << 26

# Tokens of all spans of a text together, for each token of the text: the spans may overlap this many times on average.
MAX_COVERAGE = 16


def check_count(inputs: int, most: int, param: str) -> None:
    """Refuse a request without inputs, or with more than `most`."""
    if not inputs:
        raise InvalidRequest(f"{param} is empty: send at least one", "empty_input", param)
    if inputs > most:
        raise TooManyInputs(inputs, most, param)


def check_not_empty(inputs: Sequence[EmbedInput], param: str) -> None:
    for index, item in enumerate(inputs):
        if is_empty(item.text):
            raise InvalidRequest(
                f"the input at index {index} is empty: leave it out, an empty text has no vector "
                "(the setting LLM2VEC_EMPTY_TEXT=bos embeds it as the special tokens alone)",
                "empty_input",
                param,
            )


def check_characters(inputs: Sequence[EmbedInput], most: int, param: str) -> None:
    for index, item in enumerate(inputs):
        for text, where in ((item.text, param), (item.instruction.text, "instruction")):
            if isinstance(text, str) and len(text) > most:
                raise InvalidRequest(
                    f"the {where} of index {index} has {len(text)} characters: at most {most} are taken "
                    "(the setting LLM2VEC_MAX_INPUT_CHARACTERS)",
                    "request_too_large",
                    where,
                )


def check_dimensions(dimensions: int | None, width: int, param: str, widths: Sequence[int] = ()) -> None:
    """Refuse a number of dimensions that the model's vectors of this width can't be cut to.

    Where there are `widths`, every other number is refused.
    """
    if dimensions is None or dimensions in widths:
        return
    if widths:
        raise InvalidRequest(
            f"{param} is {dimensions}: this model's vectors are meant to have {', '.join(map(str, widths))} dimensions "
            "(the setting LLM2VEC_OTHER_WIDTHS)",
            "invalid_dimensions",
            param,
        )
    if not 1 <= dimensions <= width:
        raise InvalidRequest(f"{param} is {dimensions}: this model has 1 to {width}", "invalid_dimensions", param)


def check_length(tokens: int, most: int, index: int, param: str = "input") -> None:
    if tokens > most:
        raise ContextLengthExceeded(most, tokens, index, param)


def check_context(
    inputs: Sequence[EmbedInput], most: int, characters_per_token: int | None, ids_per_token: int | None, param: str
) -> None:
    """Refuse an input that certainly has more than `most` tokens, before time is spent on counting them.

    A token stands for at most `characters_per_token` characters of a text, and for at most `ids_per_token` of the ids
    that are given instead of a text. None means that this is not known, and refuses nothing.
    """
    for index, (text, _) in enumerate(inputs):
        per_token = characters_per_token if isinstance(text, str) else ids_per_token
        if per_token and len(text) > most * per_token:
            length = len(text.rstrip()) if isinstance(text, str) else len(text)
            tokens = -(-length // per_token)
            if tokens > most:
                raise ContextLengthExceeded(most, tokens, index, param, at_least=True)


def check_tokens(tokens: int, most: int) -> None:
    if tokens > most:
        raise InvalidRequest(
            f"{tokens} tokens in one request: at most {most} are taken, send fewer inputs at once",
            "request_too_large",
            "input",
        )


def check_interactive(tokens: int, most: int) -> None:
    """Refuse a request that asks for priority interactive and has more than `most` tokens, half of a batch."""
    if tokens > most:
        raise InvalidRequest(
            f"{tokens} tokens in a request with priority interactive: at most {most}, half a "
            "batch, are taken so; send fewer inputs at once, or leave priority out",
            "request_too_large",
            "priority",
        )


def check_numbers(numbers: int) -> None:
    if numbers > MAX_NUMBERS:
        raise InvalidRequest(
            f"the answer would have {numbers} numbers, of at most {MAX_NUMBERS}: send less text at once, or ask "
            "for fewer dimensions",
            "request_too_large",
            "input",
        )


def check_coverage(spans: Sequence[tuple[int, int]], tokens: int) -> None:
    """Refuse spans that together hold more than `MAX_COVERAGE` times the tokens of their text.

    The device pools each span by itself: tokens where spans overlap are in its memory once for each of them.
    """
    pooled = sum(end - start for start, end in spans)
    if pooled > MAX_COVERAGE * tokens:
        raise InvalidRequest(
            f"the spans hold {pooled} tokens together, of a text of {tokens}: at most {MAX_COVERAGE} times as "
            "many are taken, send fewer of the spans that overlap at once",
            "request_too_large",
            "spans",
        )
