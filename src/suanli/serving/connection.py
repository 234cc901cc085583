"""uvicorn's HTTP connection, with two additions: a body arrives whole, and bad clients are disconnected.

A body is collected until it is complete, instead of being passed on in pieces, so that a request wakes its task only
once. A client is disconnected if it sends too slowly, sends only a part of a request, headers without an end or very
many requests at once, or doesn't read its answers. When a client disconnects, the function that its request has put
into `scope["suanli.on_disconnect"]` is called at once.

The number of connections is limited here, too, since uvicorn's limit counts those that wait for a next request: where
there are too many, the one that has waited longest is closed. Only where none waits, a new one's requests are refused.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEADERS_S = 10.0  # for all headers of a request, counted for the first one from the start of the connection
BODY_S = 10.0  # for a body, plus its size at the slowest rate
SLOWEST_BYTES_PER_S = 50_000
STALLED_S = 30.0  # a client must read some of its answers within this time
HEAD_BYTES = 1 << 16  # of a request's path and headers
MAX_CONNECTIONS = 1024
PIPELINED = 64  # requests of a connection that wait for the one before them
BODIES = 16  # limit for all unanswered bodies together, as a multiple of the largest body


class SharedState:
    """State that all connections of a server share."""

    __slots__ = ("closing", "held_bytes", "idle", "max_body_bytes")

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self.idle: dict[Connection, None] = {}  # that wait for a next request, the longest first
        self.closing = False  # the server is shutting down: each connection closes after its next answer
        self.held_bytes = 0  # of bodies without an answer yet


class Connection(HttpToolsProtocol):
    """One connection of a client. uvicorn makes it, so that `shared` is set in a subclass for each server."""

    shared = SharedState(1 << 26)

    # --- from uvicorn and the transport ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._running: Any = None  # the cycle that is being answered; `cycle` is the latest one
        self._in_head = self._head_is_new = False
        self._head_bytes = 0
        self._held_bytes = 0
        self._body_bytes, self._body_since = 0, 0.0
        self._start_timer(HEADERS_S)
        if len(self.connections) > MAX_CONNECTIONS and self.shared.idle:
            longest = next(iter(self.shared.idle))
            del self.shared.idle[longest]
            self.connections.discard(longest)  # it counts no more
            longest.timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.shared.idle.pop(self, None)
        self.resume_writing()
        self._release()
        cycle = self._running
        if cycle is not None and not cycle.response_complete:
            on_disconnect = cycle.scope.get("suanli.on_disconnect")
            if on_disconnect is not None:
                on_disconnect()
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_is_new = False
        self.shared.idle.pop(self, None)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._ignore_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "This is not HTTP/1.1.")
        if self._in_head and not self._head_is_new and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(431, f"Path and headers are more than {HEAD_BYTES} bytes.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # it didn't read its last answer: a close would wait for it
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Goes on in HTTP/1.1 when the client offers another protocol, as Java's own client does. The parser accepts
        nothing after such headers, so that a new one reads the body; the connection closes after this request."""
        framing = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        self.parser = httptools.HttpRequestParser(_Body(self))
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(b"%s: %s\r\n" % pair for pair in framing))
        if rest:
            self.data_received(rest)

    # --- from the parser ---

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._head_is_new = True
        self._head_bytes = 0
        self._start_timer(HEADERS_S)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._body_bytes, self._body_since = 0, self.loop.time()
        self._start_timer(BODY_S)
        super().on_headers_complete()
        if self.shared.closing or self.parser.should_upgrade():
            self.cycle.keep_alive = False
        if len(self.pipeline) > PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        cycle, shared = self.cycle, self.shared
        self._body_bytes += len(body)
        if cycle.response_complete:  # the request was refused before its body was read
            return
        cycle.body += body
        if len(cycle.body) > shared.max_body_bytes:
            scope: Any = cycle.scope
            scope["suanli.too_large"] = True
            cycle.body = bytearray()
            cycle.more_body = False
            cycle.message_event.set()
        self._held_bytes += len(body)
        shared.held_bytes += len(body)
        if shared.held_bytes > BODIES * shared.max_body_bytes and not self.transport.is_closing():
            self._refuse(503, "The server holds too many unanswered requests.", b"retry-after: 1\r\n")

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():  # its body is still to come
            return
        self._stop_timer()
        super().on_message_complete()

    # --- answers ---

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        too_many = len(self.connections) > MAX_CONNECTIONS
        super()._start_asgi_task(cycle, _refuse_request if too_many else app)

    def on_response_complete(self) -> None:
        if not self.pipeline:
            self._release()
            if not self.transport.is_closing():
                self.shared.idle[self] = None
        super().on_response_complete()

    def _refuse(self, status: int, text: str, headers: bytes = b"") -> None:
        """Answers, and closes the connection, where there is no request that the application could answer."""
        body = json.dumps({"error": text}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + headers + b"\r\n" + body)
        self.transport.close()

    def _release(self) -> None:
        self.shared.held_bytes -= self._held_bytes
        self._held_bytes = 0

    # --- slow clients ---

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._end_if_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_if_slow(self) -> None:
        if not self._in_head and self.cycle is not None and not self.cycle.response_complete:
            due = self._body_since + BODY_S + self._body_bytes / SLOWEST_BYTES_PER_S
            if due > self.loop.time():  # the rate so far is high enough
                self._start_timer(due - self.loop.time())
                return
        if not self.transport.is_closing():
            self.transport.abort()


async def _refuse_request(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
    body = json.dumps({"error": "The server has too many connections that are in use."}).encode()
    headers = {b"content-type": b"application/json", b"content-length": b"%d" % len(body), b"retry-after": b"1"}
    headers[b"connection"] = b"close"
    await send({"type": "http.response.start", "status": 503, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": body})


class _Body:
    """The callbacks of a parser that reads only the body of a request."""

    def __init__(self, connection: Connection) -> None:
        self.on_body, self.on_message_complete = connection.on_body, connection.on_message_complete
