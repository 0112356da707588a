"""Runs a job in a fork of this process, and kills it before one of its changes to files.

Python tells audit hooks of every file that is opened, renamed, cut or removed, which is where the kill comes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

_EVENTS = frozenset({"open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir"})


def dies(job: Callable[[], object], concerned: Callable[[str], bool], point: int | None) -> bool:
    """Whether the job was killed before its change number `point`, or came to its end, as it does without a point.

    Only changes to paths that are `concerned` count. An error of the job is an AssertionError, and is printed.
    """
    child = os.fork()
    if not child:
        if point is not None:
            _kill_at(point, concerned)
        try:
            job()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _kill_at(point: int, concerned: Callable[[str], bool]) -> None:
    left = point

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _EVENTS and concerned(str(arguments[0])):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)
