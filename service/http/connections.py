"""The limits of one connection: the time to send a request and to read an answer, the bytes of a header, a place.

uvicorn's protocol on httptools has no such limits. No request has timers of its own: the server looks at all
connections twice a second.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.embedding.in_flight import InFlight
from service.http.error_responses import openai_error_body
from service.http.requests import LATE
from service.metrics import Metrics
from service.settings import Settings

# Bytes of a request's line and header together. A header can hold an instruction.
MOST_HEADER_BYTES = 1 << 16

# Seconds that a client has to read the reason before its connection is cut.
_END_SECONDS = 5.0

# Seconds that a stopping server keeps a connection without a request: the request may be on its way.
_FIRST_REQUEST_SECONDS = 0.5

# Every answer begins so; and the first and the longest pause before the server looks for the client's reset.
_BEGINNING = b"HTTP/1.1 "
_RESET_SECONDS = 0.005
_MOST_RESET_SECONDS = 0.25


class _HeaderTooLarge(Exception):
    pass


@dataclass(frozen=True)
class Guard:
    """The limits, and the search for connections that break them."""

    settings: Settings
    metrics: Metrics
    in_flight: InFlight

    def dropped(self, reason: str) -> None:
        self.metrics.dropped_connections.labels(reason).inc()

    def look(self, connections: Iterable[Any]) -> None:
        """End the connections that take too long, and add up the bytes that clients have not taken."""
        now = time.monotonic()
        unsent = 0
        for connection in list(connections):
            if isinstance(connection, Connection):
                unsent += connection.look(now, self.settings)
        self.in_flight.unsent_bytes = unsent


class Unsent:
    """The bytes that a client has not taken. A client that takes a few from time to time is slow, and not gone."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._bytes = 0

    def idle_seconds(self, now: float, unsent_bytes: int) -> float:
        """Seconds in which the client has taken nothing, judged by the bytes at each look."""
        if self._since is None or unsent_bytes < self._bytes or not unsent_bytes:
            self._since = now
        self._bytes = unsent_bytes
        return now - self._since


class _Remainder:
    """The transport for an answer whose first bytes have been written already."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._written = len(_BEGINNING)
        self.close = transport.close

    def write(self, data: bytes) -> None:
        """The first piece holds the status line and the whole header."""
        self._transport.write(data[self._written :])
        self._written = 0


class _Parser(httptools.HttpRequestParser):  # type: ignore[misc,unused-ignore]
    """httptools' parser, which ignores a client's offer to upgrade to another protocol.

    This server speaks no other protocol, and HTTP lets it ignore the offer. The stock HttpClient of Java makes it with
    every request. httptools would skip the body of such a request, so it gets the header again, without the offer.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets its own
        self._connection = connection

    def feed_data(self, data: Any) -> None:
        parser = self
        while True:
            try:
                httptools.HttpRequestParser.feed_data(parser, data)
            except httptools.HttpParserUpgrade as paused:
                if not parser.offers_upgrade:
                    raise
                data = self._connection.head_without_upgrade() + data[paused.args[0] :]
                # A new parser, since this one may have ended.
                parser = self._connection.parser = _Parser(self._connection)
            else:
                return

    @property
    def offers_upgrade(self) -> bool:
        """Whether the present request offers an upgrade that the server may ignore; it can't ignore CONNECT."""
        return bool(self.should_upgrade()) and self.get_method() != b"CONNECT"


class Connection(HttpToolsProtocol):
    """One client's connection. The event loop calls its first methods, and the parser those that begin with `on_`."""

    parser: _Parser

    def __init__(self, guard: Guard, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)
        self._guard = guard
        self._one_too_many = False
        self._reading_since: float | None = None  # of a request that has not all come
        self._unsent = Unsent()
        self._ends_at: float | None = None
        self._last = False  # whether it ends with what is being asked
        self._half_closed = False  # whether the client has ended its side
        self._in_header = True  # or before it
        self._header_bytes = 0
        self._unparsed_bytes = 0  # since the last whole piece of a request

    def connection_made(self, transport: Any) -> None:
        self._one_too_many = len(self.connections) >= self._guard.settings.max_connections
        super().connection_made(transport)
        self._reading_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        if self._ends_at is not None or self.transport.is_closing():
            return
        if self._one_too_many:
            self._refuse(503, "too_many_connections", "the server has all the connections that it takes", "too_many")
            return
        if self._reading_since is None:
            self._reading_since = time.monotonic()
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
            self._refuse_header()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has ended its side. True keeps ours open, for the answer.

        Two kinds of client do this: one that has hung up, and one that still reads, such as `nc -N`. The server writes
        the first bytes, which all answers share: a client that has hung up resets the connection.
        """
        if not self._answering or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        if not (self._half_closed or self.pipeline or self.cycle.response_started):
            self.transport.write(_BEGINNING)
            self.cycle.transport = cast(Any, _Remainder(self.transport))
            self.loop.call_later(_RESET_SECONDS, self._look_for_reset, _RESET_SECONDS)
        self._half_closed = True
        return True

    def resume_writing(self) -> None:
        self._unsent = Unsent()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP, or if one of the methods below raised."""
        if self._header_bytes > MOST_HEADER_BYTES:
            self._refuse_header()
        else:
            self._refuse(400, "invalid_http", "this is no HTTP request", "bad_request")

    def on_message_begin(self) -> None:
        self._reading_since = time.monotonic()
        self._in_header = True
        self._header_bytes = self._unparsed_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called also for the trailers of chunked bodies, which uvicorn keeps as well."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        if self.parser.offers_upgrade:
            return
        self._in_header = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.offers_upgrade:
            return
        self._reading_since = None
        self._in_header = True
        self._header_bytes = self._unparsed_bytes = 0
        super().on_message_complete()
        if self._last:
            self._end_with_answer()

    def head_without_upgrade(self) -> bytes:
        """The request's line and header as they came, without the offer to upgrade."""
        line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([line, *fields, b"", b""])

    def shutdown(self) -> None:
        """Called by uvicorn when the server stops: answer the present request, then end the connection.

        The whole request is read first. Bytes that arrive after a close reset the connection, and the client would lose
        the answer that it has not read yet.
        """
        self._last = True
        if self._reading_since is None:
            self._end_with_answer()
        elif not self._asking:
            self.loop.call_later(_FIRST_REQUEST_SECONDS, self._end_unasked)

    def look(self, now: float, settings: Settings) -> int:
        """End the connection if it takes too long, with an answer if there is none yet. Returns the bytes not taken."""
        unsent = self.transport.get_write_buffer_size()
        if self._ends_at is not None and now > self._ends_at:
            self.transport.abort()
            return 0
        if self._unsent.idle_seconds(now, unsent) > settings.answer_write_seconds:
            self._guard.dropped("slow_reader")
            self.transport.abort()
            return 0
        if self._reading_since is None or self.transport.is_closing():
            return unsent
        if self.flow.read_paused or (self._in_header and self._answering):  # it is not the client that is slow
            self._reading_since = now
        elif now - self._reading_since > settings.request_read_seconds:
            self._too_late(now)
        return unsent

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _asking(self) -> bool:
        return not self._in_header or bool(self._header_bytes or self._unparsed_bytes)

    def _end_with_answer(self) -> None:
        """End the connection now, or after the answer that is under way."""
        if self._answering:
            self.cycle.keep_alive = False
        else:
            self.transport.close()

    def _end_unasked(self) -> None:
        if not self._asking:
            self._end_with_answer()

    def _look_for_reset(self, seconds: float) -> None:
        """End the connection if the client has reset it: the event loop no longer reads, and would not see that."""
        if self.transport.is_closing() or self.cycle.response_started:
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):
            self.transport.abort()
        else:
            seconds = min(2 * seconds, _MOST_RESET_SECONDS)
            self.loop.call_later(seconds, self._look_for_reset, seconds)

    def _too_late(self, now: float) -> None:
        cycle = self.cycle
        if self._in_header:
            if self._asking:
                self._refuse(408, "request_timeout", "the request did not arrive in time", "slow_request")
            else:  # nothing was asked
                self._guard.dropped("slow_request")
                self.transport.close()
        elif cycle.response_complete:  # and the rest of what it answers still comes
            self._guard.dropped("slow_request")
            self.transport.abort()
        elif not cycle.response_started and LATE not in cycle.scope["state"]:
            self._guard.dropped("slow_request")
            cycle.scope["state"][LATE] = True  # whoever reads the body answers, in the words of its API
            cycle.keep_alive = False
            cycle.message_event.set()

    def _count(self, size: int) -> None:
        self._unparsed_bytes = 0
        self._header_bytes += size
        if self._header_bytes > MOST_HEADER_BYTES:
            raise _HeaderTooLarge

    def _refuse_header(self) -> None:
        message = f"the request's header has more than {MOST_HEADER_BYTES} bytes"
        self._refuse(431, "header_too_large", message, "bad_request")

    def _refuse(self, status: int, code: str, message: str, reason: str) -> None:
        """Say why, and end the connection. If an answer is under way, only end it."""
        self._guard.dropped(reason)
        self._ends_at = time.monotonic() + _END_SECONDS
        if self._answering:
            self.transport.abort()
            return
        body = orjson.dumps(openai_error_body(message, status, code))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
