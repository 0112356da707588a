"""Spans of one text, for late chunking: from ranges of characters to ranges of tokens, and back. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from service.errors import InvalidRequest

Span = tuple[int, int]


def runs_of_tokens(own: range, tokens: int) -> list[Span]:
    """Consecutive spans of so many of the text's own tokens; the last may have fewer."""
    return [(start, min(start + tokens, own.stop)) for start in range(own.start, own.stop, tokens)]


def tokens_of_spans(spans: Sequence[Span], own: range, characters: Sequence[Span]) -> list[Span]:
    """For each span of characters the range of the text's own tokens that stand for any of them, by binary search."""
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


def characters_of_span(span: Span, characters: Sequence[Span]) -> Span:
    """The characters that a range of tokens stands for."""
    some = [bounds for bounds in characters[slice(*span)] if bounds[0] < bounds[1]]
    return (some[0][0], some[-1][1]) if some else (0, 0)
