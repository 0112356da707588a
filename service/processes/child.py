"""A child process's connection to its supervisor, which gives it its work and which it does not outlive.

The supervisor sends one line that says what to serve, and the child sends one line when it is ready. The child ends
when the connection closes, which also happens when the supervisor is killed.
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

# The time for an orderly end.
_END_SECONDS = 5.0


class Assignment(BaseModel):
    """The work of a child. Sockets are file descriptors that the child has inherited."""

    name: str
    settings: Settings
    folder: Path
    manifest: Manifest
    device_type: str
    listener: int | None = None
    engines: list[int] = []
    front_ends: list[int] = []

    @property
    def sockets(self) -> list[int]:
        own = [] if self.listener is None else [self.listener]
        return [*own, *self.engines, *self.front_ends]

    @property
    def limits(self) -> Limits:
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
        """Call `act`, on another thread, when the supervisor says to end or is gone.

        The process ends a few seconds later, even if `act` has not finished. Without an `act` it ends at once.
        """
        self._on_end = act
        if self._ended.is_set():
            act()

    def say_ready(self) -> None:
        self._supervisor.sendall(READY)

    def _watch(self) -> None:
        self._supervisor.recv(1)
        self._ended.set()
        if self._on_end is not None:
            self._on_end()
            threading.Event().wait(_END_SECONDS)
        os._exit(0)  # status 0, as the end was asked for; _exit, as threads that load a model can't be interrupted


def inherited(descriptors: list[int]) -> list[socket.socket]:
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]
