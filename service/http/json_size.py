"""The number of values in a JSON document, counted in its bytes before a parser makes an object for each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Bytes looked at together: they stay in a core's cache.
_AT_ONCE = 1 << 18

_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_OPENING = b"[{"


class JSONSize(NamedTuple):
    """The commas outside strings; and the arrays, objects and keys together, which cost a parser more."""

    commas: int
    containers: int


def json_size(body: bytes | bytearray, at_once: int = _AT_ONCE) -> JSONSize:
    """The size of a JSON document. If the document is broken, the values before the fault are still counted.

    Other threads run meanwhile, because numpy releases the interpreter.
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
    """Take out the quotes that backslashes escape.

    `escaped` says whether the first byte is escaped; the result says the same of the byte after the piece. In a run of
    backslashes each second one is itself escaped, so only a run of odd length escapes the byte after it.
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
