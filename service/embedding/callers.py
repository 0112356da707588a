"""Who asks, as a number that says nothing of a key: callers take turns in the queue."""

from __future__ import annotations

from contextvars import ContextVar
from hashlib import blake2b

# Of the request at hand.
caller_of_request: ContextVar[int] = ContextVar("caller_of_request", default=0)


def caller_number(name: bytes) -> int:
    """64 bits, the same for a name in every process."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
