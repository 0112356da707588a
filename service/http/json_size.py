"""How many values a JSON document holds, before an object is made for each: a pure function of its bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Bytes looked at together: they stay in a core's cache.
_AT_ONCE = 1 << 18

_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_OPENING = b"[{"


class JSONSize(NamedTuple):
    """Commas outside strings, one fewer than values at least; and what costs more: arrays, objects and their keys."""

    commas: int
    containers: int


def json_size(body: bytes | bytearray, at_once: int = _AT_ONCE) -> JSONSize:
    """The size of a JSON document; of what is no JSON any numbers, none too small for the values before the fault.

    Other threads run meanwhile: numpy lets go of the interpreter.
    """
    text = np.frombuffer(body, np.uint8)
    commas = containers = 0
    in_string = escaped = False  # at the piece's beginning
    for start in range(0, len(text), at_once):
        piece = text[start : start + at_once]
        quotes = piece == _QUOTE
        escaped = _unescape(piece, quotes, escaped)
        inside = np.bitwise_xor.accumulate(quotes)
        if in_string:
            np.logical_not(inside, out=inside)
        in_string = bool(inside[-1])
        outside = ~inside
        commas += int(np.count_nonzero((piece == _COMMA) & outside))
        opens = (piece == _COLON) | (piece == _OPENING[0]) | (piece == _OPENING[1])
        containers += int(np.count_nonzero(opens & outside))
    return JSONSize(commas, containers)


def _unescape(piece: NDArray[np.uint8], quotes: NDArray[np.bool_], escaped: bool) -> bool:
    """Take out quotes that backslashes escape; `escaped` is whether the first byte is, the answer whether the next is.

    In a run of backslashes each second one is escaped itself, so only a run of odd length escapes what comes after it.
    """
    places = np.flatnonzero(piece == _BACKSLASH)
    if escaped:
        quotes[0] = False
        if len(places) and places[0] == 0:  # it is escaped, and escapes nothing
            places = places[1:]
    if not len(places):
        return False
    last_of_run = np.append(np.diff(places) > 1, True)
    ends = places[last_of_run]
    lengths = np.diff(np.flatnonzero(last_of_run), prepend=-1)
    after = ends[lengths % 2 == 1] + 1
    quotes[after[after < len(piece)]] = False
    return bool(len(after)) and bool(after[-1] == len(piece))
