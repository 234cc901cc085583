"""uvicorn's HTTP connection, with what a server of models needs beside: whole bodies, and an end to slow senders.

A body is collected until it is complete instead of being handed over in pieces, so that a request wakes its task once;
its size is known to be allowed from its first header on. Who sends a request too slowly, or half of one, is cut off.
When the client leaves, the request is told at once through `scope["suanli.left"]`, a function that the request puts
there.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 10.0  # for all of a request's headers, and for the first of a connection to begin
BODY_S = 10.0  # for a body, and beside that
SLOWEST_BYTES_PER_S = 50_000


class Connection(HttpToolsProtocol):
    max_body_bytes = 1 << 26  # set in a subclass, since uvicorn makes the objects

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._clock: asyncio.TimerHandle | None = None
        self._within(HEADERS_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            scope: Any = cycle.scope
            left = scope.get("suanli.left")
            if left is not None:
                left()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._within(HEADERS_S)

    def on_headers_complete(self) -> None:
        size = 0
        for name, value in self.headers:
            if name == b"content-length" and value.isdigit():
                size = int(value[:15])
        self._within(BODY_S + min(size, self.max_body_bytes) / SLOWEST_BYTES_PER_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if cycle.response_complete:  # it was refused without being read
            return
        cycle.body += body
        if len(cycle.body) > self.max_body_bytes:
            scope: Any = cycle.scope
            scope["suanli.too_large"] = True
            cycle.body = bytearray()
            cycle.more_body = False
            cycle.keep_alive = False
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._stop_clock()
        super().on_message_complete()

    def _within(self, seconds: float) -> None:
        self._stop_clock()
        self._clock = self.loop.call_later(seconds, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()
