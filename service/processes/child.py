"""What a child process of the server is told by its supervisor, and that it does not outlive it.

One connection leads to the supervisor: it says in one line what to serve, the child says in another that it is ready,
and when it closes, be it that the supervisor was killed, the child ends.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from model_store.manifest import Manifest
from service.batching.limits import Limits
from service.logs import configure_logs
from service.settings import Settings

READY = b"ready\n"

# How long an orderly end may take.
_END_SECONDS = 5.0


class Assignment(BaseModel):
    """What a child is to do. Sockets are file descriptors that it has inherited."""

    name: str
    settings: Settings
    folder: Path
    manifest: Manifest
    device_type: str
    listener: int | None = None
    engines: list[int] = []
    front_ends: list[int] = []

    @property
    def limits(self) -> Limits:
        """The token limits of this model on these devices."""
        return Limits(self.settings, self.manifest, self.device_type)


class Child:
    """This process, as a child."""

    def __init__(self) -> None:
        self._supervisor = socket.socket(fileno=int(sys.argv[1]))
        line = self._supervisor.makefile("rb").readline()
        if not line:
            sys.exit(0)
        self.assignment = Assignment.model_validate_json(line)
        configure_logs(self.assignment.settings.log_level)
        self._on_end: Callable[[], object] | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="supervisor", daemon=True).start()

    def on_end(self, act: Callable[[], object]) -> None:
        """Call this, on another thread, when the supervisor says to end or is gone.

        The process ends soon after, be it done or not; at once where there is nothing to call.
        """
        self._on_end = act
        if self._ended.is_set():
            act()

    def say_ready(self) -> None:
        """Tell the supervisor."""
        self._supervisor.sendall(READY)

    def _watch(self) -> None:
        self._supervisor.recv(1)
        self._ended.set()
        if self._on_end is not None:
            self._on_end()
            threading.Event().wait(_END_SECONDS)
        os._exit(0)  # as it was told to: threads that load a model can't be interrupted


def inherited(descriptors: list[int]) -> list[socket.socket]:
    """Sockets that came with the process."""
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]
