"""A process around the app: store, socket, signals, exit status."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from service.device import watchdog
from service.embedding.backend import Served
from service.errors import DeviceLost, StartupError
from service.http.connections import Connection, Guard
from service.http.parts import Parts
from service.logs import log, unexplained
from service.server.app import MakeApp, OnFatal, OnReady, create_app, drain
from service.server.startup import Progress, prepare, settle
from service.settings import Settings
from service.tracing import start_traces

# Ticks (tenths of a second) without work, after which every request that was on its way has been answered.
_QUIET_TICKS = 3

# Ticks between two checks of the connections.
_LOOK_TICKS = 5

# More than the files and sockets that a process has open beside its connections.
_OTHER_FILES = 512

# Time for an orderly end after the grace period, as it waits for the batch on the device.
_STOP_SECONDS = 10.0


def serve(settings: Settings, progress: Progress) -> int:
    """Serve until a signal says to stop. Returns the process's exit status: 0 after a clean end.

    Every mistake that can be found early is found before the port is opened.

    Raises:
        StartupError, UserError: with a sentence that says what to change.
    """
    # Until the server handles the signal, SIGTERM ends a build through its clean-up, which removes half-written files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    prepared = prepare(settings, progress)
    with listen(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        log.info("listening", extra={"fields": {"host": host, "port": port, "model": prepared.manifest.name}})
        return answer(settings, listener, partial(make_app, prepared))


def make_app(served: Served, on_fatal: OnFatal, then: OnReady = lambda facts: None, message: str = "ready") -> FastAPI:
    """The application. Its lifespan begins with warming up; once it is ready, it logs the message and calls `then`."""

    def on_ready(facts: dict[str, object]) -> None:
        settle()
        log.info(message, extra={"fields": facts})
        then(facts)

    return create_app(served, on_fatal, on_ready, start_traces())


def answer(settings: Settings, listener: socket.socket, make: MakeApp) -> int:
    """Serve an app on a socket until a signal says to stop or the app can't go on. Returns the exit status."""
    failure: list[BaseException] = []

    def on_fatal(error: BaseException) -> None:
        log.critical("the server can't go on: %s", error, exc_info=unexplained(error))
        failure.append(error)
        server.should_exit = True
        if isinstance(error, DeviceLost):
            watchdog.end_within(watchdog.GRACE_SECONDS)

    app = make(on_fatal)
    parts: Parts = app.state.parts
    guard = Guard(settings, parts.metrics, parts.in_flight)
    _allow_connections(settings.max_connections)
    server = _Server(
        uvicorn.Config(
            app,
            http=cast(Any, partial(Connection, guard)),
            ws="none",
            timeout_keep_alive=settings.keep_alive_seconds,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=settings.shutdown_grace_seconds,
            server_header=False,
            proxy_headers=False,  # the server does not use the client's address
        ),
        app,
        guard,
    )
    server.run(sockets=[listener])
    status = 1 if failure else 0
    if parts.backend.busy:
        watchdog.end_now(status)  # the interpreter's own end would wait for the device's thread
    return status


def _allow_connections(most: int) -> None:
    """Raise this process's limit of open files for so many connections, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """A socket on the address. If it is shared, the kernel spreads connections over all sockets on the address.

    `::` listens on every address of IPv6 and IPv4; 0.0.0.0 listens on those of IPv4 alone.

    Raises:
        StartupError: if the address is taken or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), backlog=2048, family=family, reuse_port=shared, dualstack_ipv6=both)
    except OSError as error:
        raise StartupError(
            f"can't listen on {host}:{port} ({error.strerror or error}): choose another LLM2VEC_HOST or LLM2VEC_PORT"
        ) from error


class _Server(uvicorn.Server):
    """uvicorn, but a signal to stop drains first, and the process then ends with status 0.

    While the server drains it still listens and answers new requests with 503: a closed socket would reset requests
    that were sent but not read yet. It stops listening once no request has been in work for a moment, or the grace
    period is over.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, guard: Guard) -> None:
        super().__init__(config)
        self._app = app
        self._guard = guard
        self._stop_at: float | None = None
        self._quiet_ticks = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> Any:
        """Take no new requests; a second interrupt does not wait for those in flight."""
        if self._stop_at is not None and sig == signal.SIGINT:
            self.force_exit = self.should_exit = True
        elif self._stop_at is None:
            drain(self._app)
            grace = self.config.timeout_graceful_shutdown or 0
            self._stop_at = time.monotonic() + grace
            watchdog.end_within(grace + _STOP_SECONDS)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends its main loop."""
        await super().on_tick(counter)
        if counter % _LOOK_TICKS == 0:
            self._guard.look(self.server_state.connections)
        if self._stop_at is not None:
            self._quiet_ticks = 0 if self._app.state.parts.embedder.running else self._quiet_ticks + 1
            left = self._stop_at - time.monotonic()
            if self._quiet_ticks >= _QUIET_TICKS or left <= 0:
                self.config.timeout_graceful_shutdown = max(1, round(left))
                self.should_exit = True
        return self.should_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after its main loop: take no new connections, but answer those that wait to be accepted.

        The kernel has already made these connections, so their clients may be sending; closing the socket alone would
        reset them.
        """
        loop = asyncio.get_running_loop()
        make = partial(cast(Any, self.config.http_protocol_class), self.config, self.server_state, self.lifespan.state)
        listeners = [listener.dup() for listener in sockets or ()]
        for server in self.servers:
            server.close()  # the event loop accepts no more
        for connection in [one for listener in listeners for one in _waiting(listener)]:
            await loop.connect_accepted_socket(make, connection)
        await super().shutdown(sockets)


def _waiting(listener: socket.socket) -> list[socket.socket]:
    """Accept the connections that wait, and close the listening socket."""
    connections = []
    with listener, suppress(OSError):
        listener.setblocking(False)
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            connections.append(connection)
    return connections
