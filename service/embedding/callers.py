"""Callers as numbers, which take turns in the queue. A number tells nothing about the caller's key."""

from __future__ import annotations

from contextvars import ContextVar
from hashlib import blake2b

# The number of the caller whose request is served.
caller_of_request: ContextVar[int] = ContextVar("caller_of_request", default=0)


def caller_number(name: bytes) -> int:
    """A number of 64 bits, the same for a name in every process."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
