"""A server of several processes: front ends that speak HTTP, and an engine for each device.

The supervisor prepares the encoder, opens the port, starts the other processes and waits. Each front end has its own
socket on the one port, and the kernel spreads connections over them. A Unix socket pair joins each front end to each
engine and to each other front end. Nothing is restarted: when one process ends by itself, all end and the status is not
0, so that the server's manager can start it again. Torch is loaded here only for a build.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations

from service.batching.limits import Limits
from service.device.torch_environment import set_torch_defaults
from service.embedding.instructions import load_instructions
from service.logs import configure_logs, log
from service.processes.child import READY, Assignment
from service.processes.devices import device_type, find_devices
from service.server.process import listen, serve
from service.server.startup import Progress, as_served, prepare_store
from service.settings import Settings

_TICK_SECONDS = 0.05

# Time for a front end to end after the grace period, and for an engine, which has no work left by then.
_FRONT_END_SECONDS = 10.0
_ENGINE_SECONDS = 10.0

FRONT_END = "service.processes.frontend"
ENGINE = "service.processes.engine"


def supervise(settings: Settings, progress: Progress, engine: str = ENGINE) -> int:
    """Serve with as many processes as the settings ask for. Returns the exit status: 0 after a clean end.

    `engine` is the module that is run for each device. One front end and one device run in this process alone.

    Raises:
        StartupError, UserError: with a sentence that says what to change.
    """
    # Until there are children, SIGTERM ends a build through its clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    configure_logs(settings.log_level)
    devices = find_devices(settings.device)
    if len(devices) == 1 and settings.frontends == 1:
        return serve(settings.model_copy(update={"device": devices[0]}), progress)
    set_torch_defaults(settings.models_dir, len(devices))
    folder, manifest = prepare_store(settings, progress)
    manifest = as_served(manifest, settings)
    kind = device_type(devices[0])
    Limits(settings, manifest, kind)
    load_instructions(settings, manifest)

    def assignment(name: str, device: str, listener: int | None = None) -> Assignment:
        own = settings.model_copy(update={"device": device})
        return Assignment(
            name=name, settings=own, folder=folder, manifest=manifest, device_type=kind, listener=listener
        )

    with ExitStack() as ours:  # these sockets are for the children; they are closed here once every child has its own
        listeners = [ours.enter_context(one) for one in listen_together(settings)]
        host, port = listeners[0].getsockname()[:2]
        log.info("listening", extra={"fields": {"host": host, "port": port, "model": manifest.name}})
        front_ends = [
            assignment(f"front end {n}", settings.device, listener.fileno()) for n, listener in enumerate(listeners)
        ]
        engines = [assignment(f"engine {n}", device) for n, device in enumerate(devices)]
        for left, right in combinations([*front_ends, *engines], 2):
            if left.listener is not None:  # engines have nothing to say to each other
                near, far = map(ours.enter_context, socket.socketpair())
                (left.front_ends if right.listener is not None else left.engines).append(near.fileno())
                right.front_ends.append(far.fileno())
        threads = _threads(kind, len(devices))
        family = Family(
            [_start(FRONT_END, one, {}) for one in front_ends], [_start(engine, one, threads) for one in engines]
        )
    return family.run(settings.shutdown_grace_seconds)


def listen_together(settings: Settings) -> list[socket.socket]:
    """A socket for each front end, all on the one address."""
    if settings.frontends == 1:
        return [listen(settings.host, settings.port)]
    # Shared sockets would also share the address with another server, so this one checks that it is free.
    with listen(settings.host, settings.port) as alone:
        port = alone.getsockname()[1]
    return [listen(settings.host, port, shared=True) for _ in range(settings.frontends)]


def _threads(kind: str, engines: int) -> dict[str, str]:
    """The variable that gives each of several engines on one CPU its share of the cores, unless the user has set it."""
    if kind != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // engines, 1))}


def _start(module: str, assignment: Assignment, environment: dict[str, str]) -> Process:
    """Start a child, in a session of its own: the supervisor passes on an interrupt from the terminal."""
    near, far = socket.socketpair()
    with far:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(far.fileno())],
            pass_fds=[far.fileno(), *assignment.sockets],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    near.sendall(assignment.model_dump_json().encode() + b"\n")
    return Process(assignment.name, process, near)


@dataclass(eq=False)
class Process:
    """A child that was started, and the connection that ends it when it is closed."""

    name: str
    process: subprocess.Popen[bytes]
    connection: socket.socket

    @property
    def status(self) -> int | None:
        """Its exit status; negative for a signal, None while it runs."""
        return self.process.poll()


class Family:
    """The children, from their start to the end of the last one."""

    def __init__(self, front_ends: Sequence[Process], engines: Sequence[Process]) -> None:
        self._front_ends = front_ends
        self._engines = engines
        self._signals: list[int] = []
        self._began = time.monotonic()

    def run(self, grace_seconds: float) -> int:
        """Wait until a signal says to stop or a child has ended, then end all. Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self._signals.append(number))
        try:
            failed = self._watch()
            failed |= self._end_front_ends(grace_seconds)
            return int(self._end_engines() or failed)
        finally:
            for child in (*self._front_ends, *self._engines):
                child.process.kill()
                child.process.wait()
                child.connection.close()

    def _watch(self) -> bool:
        """Wait for a signal or the end of a child. Returns whether a child ended."""
        with selectors.DefaultSelector() as waiting:
            for child in self._front_ends:
                waiting.register(child.connection, selectors.EVENT_READ, child)
            not_ready = len(self._front_ends)
            while not self._signals:
                for key, _ in waiting.select(_TICK_SECONDS):
                    waiting.unregister(key.fileobj)
                    not_ready -= key.data.connection.recv(len(READY)) == READY
                    if not not_ready:
                        seconds = round(time.monotonic() - self._began, 2)
                        counts = {"front_ends": len(self._front_ends), "engines": len(self._engines)}
                        log.info("ready", extra={"fields": {**counts, "seconds": seconds}})
                if ended := [child for child in (*self._front_ends, *self._engines) if child.status is not None]:
                    for child in ended:
                        log.critical("%s ended by itself with status %d: the server ends", child.name, child.status)
                    return True
        return False

    def _end_front_ends(self, grace_seconds: float) -> bool:
        """End the front ends once they have answered. Returns whether one failed, or an engine ended before them."""
        running = [child for child in self._front_ends if child.status is None]
        for child in running:
            child.process.send_signal(signal.SIGTERM)
        self._wait(running, grace_seconds + _FRONT_END_SECONDS, self._pass_on)
        broken = [child for child in self._engines if child.status is not None]
        for child in broken:
            log.critical("%s ended with status %d before its last answer", child.name, child.status)
        # A front end that has not started up yet dies of the signal.
        return bool(broken) or any(child.status not in (0, -signal.SIGTERM) for child in running)

    def _pass_on(self) -> None:
        """Pass a second interrupt to the front ends, which then wait no longer."""
        if signal.SIGINT in self._signals[1:]:
            del self._signals[1:]
            for child in self._front_ends:
                child.process.send_signal(signal.SIGINT)

    def _end_engines(self) -> bool:
        """End the engines. Returns whether one of them did not end in time with status 0."""
        running = [child for child in self._engines if child.status is None]
        for child in running:
            child.connection.shutdown(socket.SHUT_RDWR)
        self._wait(running, _ENGINE_SECONDS)
        return any(child.status != 0 for child in running)

    def _wait(self, children: Iterable[Process], seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        end = time.monotonic() + seconds
        while any(child.status is None for child in children) and time.monotonic() < end:
            meanwhile()
            time.sleep(_TICK_SECONDS)
