"""Tells errors that the user can correct from faults of this program, which need their traceback."""

from __future__ import annotations

import errno

# The system's errors for a full disk; they name no file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Something that the user gave can't be used; the message names it and the way out."""


class CheckpointError(UserError):
    """A base or adapter whose files are incomplete, unreadable or of a kind that can't be merged."""


def explains_itself(error: BaseException) -> bool:
    """Whether the message alone tells the user what to correct: a `UserError`, or a file that the system refuses."""
    if isinstance(error, OSError):
        return error.filename is not None or error.errno in _NO_ROOM
    return isinstance(error, UserError)
