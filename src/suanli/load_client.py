"""Sends HTTP requests at a given rate, or from a number of clients, and times the answers: one load, in this thread.

A loop around a selector and non-blocking sockets, with whole requests that were made beforehand; of an answer it
reads no more than status, Content-Length, Connection and Retry-After. It shall cost less than any server that it
measures: an event loop with streams costs several times as much, and rounds waits to milliseconds, which would make
every request late. It tells how far it lagged behind its own schedule. What loads are, and how latencies count, is in
`loads.py`.

What this doesn't do: HTTP/2, pipelining, answers without Content-Length, more than one thread.
"""

from __future__ import annotations

import contextlib
import re
import select
import selectors
import socket
import ssl
import struct
import time
from array import array
from collections import Counter, deque

from suanli.loads import MOST_REQUESTS, Load, ServerGone, Stretch, Target, address
from suanli.measure import percentile

CONNECT_S = 5.0
GONE_S = 1.0  # without a single connection: the server isn't there any more
RETRY_S = 0.05  # between two tries to connect
PAUSE_S = 0.01  # of a closed loop's client that was refused
CHECK_S = 0.05  # between two looks for requests that took too long
BURST = 64  # requests that are sent late before answers are read again
COARSE_S = 0.003  # waits above this may be rounded to milliseconds, as epoll does
BUFFER_BYTES = 256 * 1024
HEAD_BYTES = 64 * 1024  # at most, of an answer's status and headers
SAID_BYTES = 500  # of an error's text

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)
_RETRY = re.compile(rb"\r\nretry-after:", re.IGNORECASE)
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: no port is kept for a closed connection


def offer(target: Target, load: Load) -> Stretch:
    """Sends a load from this thread and waits for the answers; takes at most `seconds` and `timeout_s`, and the time to
    connect. Raises ServerGone where nothing listens, at the beginning or later."""
    client = Client(target)
    try:
        return client.offer(load)
    finally:
        client.close()


class Client:
    """Sends load after load, over connections that stay open."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: list[socket.socket] = []

    def offer(self, load: Load) -> Stretch:
        """As the function `offer`."""
        sending = _Sending(self._target, load)
        try:
            return sending.stretch(self._idle)
        finally:
            self._idle += sending.end_with_idle()

    def close(self) -> None:
        for one in self._idle:
            one.close()
        self._idle.clear()


class _Connection:
    """One keep-alive connection, and the request that is on its way."""

    __slots__ = ("due", "head", "left", "out", "sent", "socket", "status", "text", "writes")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.out: memoryview | None = None  # what is still to be sent
        self.due = self.sent = -1.0  # when the request was due, and began to be sent; due -1: there is none
        self.head = b""  # of the answer
        self.left = -1  # bytes of the answer's body that are to come; -1: its head isn't whole
        self.status = 0
        self.text = b""  # of an error
        self.writes = False  # the selector watches whether it can be written to


class _Sending:
    """A load while it is sent."""

    def __init__(self, target: Target, load: Load) -> None:
        self.load, self.requests = load, target.requests
        parts = address(target.url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.family: int = socket.AF_INET
        self.place: tuple[str, int] = (self.host, self.port)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.selector = selectors.DefaultSelector()
        self.buffer = bytearray(BUFFER_BYTES)
        self.all = [_Connection() for _ in range(load.connections)]
        self.free: list[_Connection] = []
        self.closed: deque[_Connection] = deque()  # to be opened again
        self.paused: deque[tuple[float, _Connection]] = deque()  # until when
        self.waiting: deque[float] = deque()  # when requests were due that have no connection yet
        self.accepted, self.refused, self.refused_sent = array("q"), array("q"), array("q")  # microseconds
        self.lags = array("d")
        self.errors: Counter[str] = Counter()
        self.said = ""
        self.offered = self.waited = self.without_retry_after = 0
        self.number = self.flying = 0  # of the next request; requests that are on their way
        self.end = self.connected_at = self.retry_at = self.answered_at = 0.0

    def stretch(self, idle: list[socket.socket]) -> Stretch:
        """Uses connections of `idle` first, and takes them out."""
        self._connect_all(idle)
        start, computed = time.perf_counter(), time.process_time()
        self._send_all(start)
        took_s, computed_s = time.perf_counter() - start, time.process_time() - computed
        lags = self.lags or array("d", [0.0])
        return Stretch(
            rate_per_s=self.load.rate_per_s,
            seconds=self.load.seconds,
            offered=self.offered,
            answered_s=max(self.load.seconds, self.answered_at - start),
            accepted_us=self.accepted.tolist(),
            refused_us=self.refused.tolist(),
            refused_sent_us=self.refused_sent.tolist(),
            without_retry_after=self.without_retry_after,
            errors=dict(self.errors),
            said=self.said,
            waited=self.waited,
            lag_ms_p99=1000 * percentile(lags, 0.99),
            lag_ms_max=1000 * max(lags),
            cpu_share=computed_s / took_s,
        )

    def end_with_idle(self) -> list[socket.socket]:
        """The connections that can be used again; the others are closed."""
        self.selector.close()
        found = []
        for connection in self.all:
            if connection.socket is None:
                continue
            if connection.due >= 0 or connection.out is not None:
                connection.socket.close()
            else:
                found.append(connection.socket)
        return found

    # --- when requests go ---

    def _send_all(self, start: float) -> None:
        self.end = start + self.load.seconds
        self.connected_at = start
        moments = iter(()) if self.load.rate_per_s is None else self.load.moments(start)
        due = next(moments, None)
        if self.load.rate_per_s is None:
            clients, self.free = self.free, []
            for connection in clients:
                self._next(connection, start)
        check_at = start + CHECK_S
        while True:
            now = time.perf_counter()
            for _ in range(BURST):
                if due is None or due > now:
                    break
                self._arrive(due, now)
                due, now = next(moments, None), time.perf_counter()
            while self.paused and self.paused[0][0] <= now:
                self._resume(self.paused.popleft()[1], now)
            if now >= check_at:
                self._check(now)
                check_at = now + CHECK_S
            if now >= self.end and due is None and not (self.flying or self.waiting):
                return
            if now >= self.end + self.load.timeout_s:
                self.errors["no answer in time"] += self.flying + len(self.waiting)
                return
            until = min(check_at, due or check_at, self.paused[0][0] if self.paused else check_at)
            for key, events in self._events(until - now):
                self._event(key.data, events)

    def _arrive(self, due: float, now: float) -> None:
        self.offered += 1
        self.lags.append(now - due)
        if self.free:
            self._send(self.free.pop(), due, now)
        else:
            self.waited += 1
            self.waiting.append(due)

    def _next(self, connection: _Connection, now: float) -> None:
        """What a connection does that has nothing to do."""
        if self.load.rate_per_s is not None:
            if self.waiting:
                self._send(connection, self.waiting.popleft(), now)
            else:
                self.free.append(connection)
        elif now < self.end and self.offered < MOST_REQUESTS:
            self.offered += 1
            self._send(connection, now, now)

    def _resume(self, connection: _Connection, now: float) -> None:
        """After a pause, in which it may have been closed, and opened again with something to do."""
        if connection.socket is not None and connection.out is None and connection.due < 0:
            self._next(connection, now)

    def _send(self, connection: _Connection, due: float, now: float) -> None:
        request = self.requests[self.number % len(self.requests)]
        self.number += 1
        self.flying += 1
        connection.due, connection.sent = due, now
        connection.head, connection.left, connection.text = b"", -1, b""
        connection.out = memoryview(request)
        self._flush(connection)

    def _check(self, now: float) -> None:
        """Gives up requests that took too long, and the server if it is gone."""
        if self.closed and now >= self.retry_at:
            self._reopen(now)
        if len(self.closed) < len(self.all):
            self.connected_at = now
        elif now - self.connected_at > GONE_S:
            raise ServerGone(
                f"The server at {self.host}:{self.port} was gone after {len(self.accepted):,} answers.",
                fix="Look at what it wrote last, and start it again.",
            )
        oldest = now - self.load.timeout_s
        for connection in self.all:
            stuck = connection.out is not None and connection.sent < oldest
            if connection.socket is not None and (stuck or 0 <= connection.due < oldest):
                self._lost(connection, "no answer in time")
        while self.waiting and self.waiting[0] < oldest:
            self.waiting.popleft()
            self.errors["no answer in time"] += 1

    # --- sockets ---

    def _events(self, wait_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        """What happens within `wait_s`. epoll would round a short wait up to a millisecond; `select` on the epoll
        itself doesn't."""
        wait_s = max(0.0, wait_s)
        if 0 < wait_s < COARSE_S and hasattr(self.selector, "fileno"):
            select.select([self.selector.fileno()], [], [], wait_s)
            wait_s = 0.0
        return self.selector.select(wait_s)

    def _event(self, connection: _Connection, events: int) -> None:
        if connection.out is not None:
            self._go_on(connection)
        if events & selectors.EVENT_READ and connection.socket is not None:
            self._read(connection)

    def _go_on(self, connection: _Connection) -> None:
        """Sends what is left of a request."""
        answered = connection.due < 0  # before the server had the whole request, whose rest it takes first
        usable = self._flush(connection)
        if answered and not usable:
            self._close(connection)
        elif answered and connection.out is None:
            self._next(connection, time.perf_counter())

    def _flush(self, connection: _Connection) -> bool:
        """Sends what can be sent now. False: the connection can't be sent on any more."""
        assert connection.socket is not None
        assert connection.out is not None
        blocked, usable = False, True
        try:
            sent = connection.socket.send(connection.out)
            connection.out = connection.out[sent:] if sent < len(connection.out) else None
            blocked = connection.out is not None
        except ssl.SSLWantReadError:  # in the middle of a handshake
            pass
        except _WOULD_BLOCK:
            blocked = True
        except OSError:  # an answer that came before can still be read; if there is none, reading tells
            connection.out, usable = None, False
        if blocked != connection.writes:
            connection.writes = blocked
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if blocked else 0)
            self.selector.modify(connection.socket, wanted, connection)
        return usable

    def _read(self, connection: _Connection) -> None:
        more = True
        while more and connection.socket is not None:
            try:
                count = connection.socket.recv_into(self.buffer)
            except _WOULD_BLOCK:
                return
            except OSError:
                count = 0
            if not count:
                self._lost(connection, "connection closed")
                return
            more = isinstance(connection.socket, ssl.SSLSocket) and bool(connection.socket.pending())
            self._received(connection, count)

    def _received(self, connection: _Connection, count: int) -> None:
        """The first `count` bytes of the buffer are of an answer."""
        body_at = 0
        if connection.left < 0:
            before = len(connection.head)
            end = self.buffer.find(_END, 0, count) if not before else -1  # as a rule, the head comes whole
            connection.head += self.buffer[: end + 4 if end >= 0 else count]
            end = connection.head.find(_END)
            if len(connection.head) > HEAD_BYTES or (end >= 0 and not self._understood(connection)):
                self._lost(connection, "no HTTP answer with Content-Length")
                return
            if end < 0:
                return
            body_at = end + 4 - before
        connection.left -= count - body_at
        if not 200 <= connection.status < 300 and len(connection.text) < SAID_BYTES:
            connection.text += self.buffer[body_at:count]
        if connection.left <= 0:
            self._complete(connection, time.perf_counter())

    def _understood(self, connection: _Connection) -> bool:
        head, length = connection.head, _LENGTH.search(connection.head)
        if connection.due < 0 or length is None or not head.startswith(b"HTTP/1.") or not head[9:12].isdigit():
            return False
        connection.status, connection.left = int(head[9:12]), int(length[1])
        return True

    def _complete(self, connection: _Connection, now: float) -> None:
        status, took_us = connection.status, round(1e6 * (now - connection.due))
        if 200 <= status < 300:
            self.accepted.append(took_us)
            self.answered_at = now
        elif status == 503:
            self.refused.append(took_us)
            self.refused_sent.append(round(1e6 * (now - connection.sent)))
            self.without_retry_after += _RETRY.search(connection.head) is None
        else:
            self.errors[f"HTTP {status}"] += 1
            self.said = self.said or connection.text[:SAID_BYTES].decode(errors="replace").strip()
        self.flying -= 1
        connection.due = -1.0
        if _CLOSE.search(connection.head):
            self._close(connection)
        elif connection.out is not None:
            return
        elif status == 503 and self.load.rate_per_s is None:
            self.paused.append((now + PAUSE_S, connection))
        else:
            self._next(connection, now)

    def _lost(self, connection: _Connection, why: str) -> None:
        """A connection is of no more use, which is an error only if something was asked."""
        if connection.due >= 0:
            self.flying -= 1
            self.errors[why] += 1
        self._close(connection)

    # --- connections ---

    def _connect_all(self, idle: list[socket.socket]) -> None:
        """Before the clock runs, so that what is wrong is told."""
        for connection in self.all:
            made = None
            while idle and made is None:
                made = _alive(idle.pop())
            self._use(connection, made or self._connected())
            self.free.append(connection)

    def _connected(self) -> socket.socket:
        try:
            made = socket.create_connection((self.host, self.port), timeout=CONNECT_S)
            return made if self.tls is None else self.tls.wrap_socket(made, server_hostname=self.host)
        except OSError as error:
            raise ServerGone(
                f"No connection to {self.host}:{self.port} ({error.strerror or error}).",
                fix="Start the server first, or check the address.",
            ) from error

    def _use(self, connection: _Connection, made: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it may be closed already
            self.family, self.place = made.family, made.getpeername()
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.socket, connection.out, connection.writes, connection.due = made, None, False, -1.0
        self.selector.register(made, selectors.EVENT_READ, connection)

    def _close(self, connection: _Connection) -> None:
        assert connection.socket is not None
        self.selector.unregister(connection.socket)
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        connection.socket.close()
        connection.socket, connection.out, connection.due = None, None, -1.0
        if connection in self.free:
            self.free.remove(connection)
        self.closed.append(connection)
        now = time.perf_counter()
        if now >= self.retry_at:
            self._reopen(now)

    def _reopen(self, now: float) -> None:
        """Connects again, as far as it goes at once: a server that isn't there is asked again a moment later."""
        while self.closed:
            made = socket.socket(self.family, socket.SOCK_STREAM)
            made.settimeout(GONE_S)
            try:
                made.connect(self.place)
                if self.tls is not None:  # shakes hands when it is first written to
                    made = self.tls.wrap_socket(made, server_hostname=self.host, do_handshake_on_connect=False)
            except OSError:
                made.close()
                self.retry_at = time.perf_counter() + RETRY_S
                return
            connection = self.closed.popleft()
            self._use(connection, made)
            self._next(connection, now)


def _alive(idle: socket.socket) -> socket.socket | None:
    """A connection on which nothing is to come; None: it was closed, or something strange came, and it is closed."""
    try:
        idle.recv(1)
    except _WOULD_BLOCK:
        return idle
    except OSError:
        pass
    idle.close()
    return None
