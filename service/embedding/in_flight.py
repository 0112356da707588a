"""The bound on the memory that all requests of a process and their answers hold together.

Other bounds hold for each request by itself. Memory is counted when it is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from service.errors import TooMuchInFlight

# An answer's vectors are float32. It is written in slices of so many numbers, of which one at a time is in memory.
_BYTES_A_NUMBER = 4
NUMBERS_IN_A_SLICE = 1 << 16
_BYTES_A_NUMBER_WRITTEN = 20

# Memory for each token that an answer shows: its objects and its JSON.
_BYTES_A_TOKEN_SHOWN = 512


class InFlight:
    """The bound, and the bytes held now. `unsent_bytes` are ready for clients that have not read them yet."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.unsent_bytes = 0
        self._held_bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._held_bytes + self.unsent_bytes

    @contextmanager
    def request(self) -> Iterator[None]:
        """A context for one request: all that `hold` counts in it is given back at its end."""
        share = _Share(self)
        token = _share.set(share)
        try:
            yield
        finally:
            _share.reset(token)
            self._held_bytes -= share.bytes

    def add(self, share: _Share, more: int) -> None:
        """As `hold`, for the request that has this share. A request that is alone may hold any number of bytes."""
        if self.bytes > share.bytes and self.bytes + more > self.most_bytes:
            raise TooMuchInFlight(self.bytes, self.most_bytes)
        self._held_bytes += more
        share.bytes += more


@dataclass
class _Share:
    """The bytes that one request holds."""

    in_flight: InFlight
    bytes: int = 0


_share: ContextVar[_Share | None] = ContextVar("share", default=None)


def hold(more: int) -> None:
    """Count bytes of the request whose context this is. Outside of one nothing is counted: jobs bound themselves.

    Raises:
        TooMuchInFlight: if all requests together would hold too many.
    """
    if (share := _share.get()) is not None:
        share.in_flight.add(share, more)


def hold_vectors(numbers: int) -> None:
    """As `hold`, for an answer of so many numbers."""
    hold(_BYTES_A_NUMBER * numbers + _BYTES_A_NUMBER_WRITTEN * min(numbers, NUMBERS_IN_A_SLICE))


def hold_tokens(tokens: int) -> None:
    """As `hold`, for an answer that shows so many tokens."""
    hold(_BYTES_A_TOKEN_SHOWN * tokens)
