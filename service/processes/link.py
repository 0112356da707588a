"""One connection between two processes of a server: messages both ways, and each end's metrics on request.

Messages arrive, and in order, unless the connection is lost. Then everybody who waits for the other end gets an error.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable
from typing import cast

from service.errors import Unavailable
from service.metrics import Metrics, Samples
from service.processes.wire import AskSamples, GiveSamples, Message, Splitter, decode, encode

# A system call costs as much as all other work on a short message, so short messages share one. From this many bytes
# on, messages are written at once.
_WRITE_BYTES = 1 << 16


class Link(asyncio.Protocol):
    """A link over `end`, this process's end of a connected pair of Unix sockets. `name` is the other end's name."""

    def __init__(
        self,
        name: str,
        end: socket.socket,
        metrics: Metrics,
        on_message: Callable[[Message], None] = lambda message: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.lost = False
        self._end = end
        self._metrics = metrics
        self._on_message = on_message
        self._on_lost = on_lost
        self._splitter = Splitter()
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Samples]] = {}

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._end)

    def send(self, message: Message) -> None:
        """Send a message, together with all others of this turn of the event loop. A lost connection drops it."""
        if self.lost:
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._write)
        frame = encode(message)
        self._unsent.append(frame)
        self._unsent_bytes += len(frame)

    async def drain(self) -> None:
        """Wait until most of the messages are on their way, or the other end is lost."""
        if self._unsent_bytes > _WRITE_BYTES:
            self._write()
        await self._writable.wait()

    async def samples(self) -> Samples:
        if self.lost:
            raise self.gone()
        number = next(self._numbers)
        asked: asyncio.Future[Samples] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        try:
            self.send(AskSamples(number))
            return await asked
        finally:
            del self._asked[number]

    def close(self) -> None:
        """Close the connection, once all messages are on their way."""
        if self._transport is not None:
            self._write()
            self._transport.close()
        else:
            self._end.close()

    def give_up(self) -> None:
        """Treat the other end as lost, even if messages are on their way."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self) -> None:
        if self._transport is not None and not self.lost and self._unsent:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
        self._unsent_bytes = 0

    def gone(self) -> Unavailable:
        return Unavailable(f"the server has lost its {self.name}")

    # asyncio calls the methods from here on.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer requests for metrics here, and hand on the other messages."""
        for frame in self._splitter.feed(data):
            message = decode(frame)
            if isinstance(message, AskSamples):
                self.send(GiveSamples(message.number, self._metrics.samples()))
            elif isinstance(message, GiveSamples):
                asked = self._asked.get(message.number)  # None if the asker no longer waits
                if asked is not None and not asked.done():
                    asked.set_result(message.samples)
            else:
                self._on_message(message)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._writable.set()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(self.gone())
        self._on_lost()
