"""One call of gRPC: whose it is, its body within bounds of size and time, how it is refused, and a line in the log.

A key is checked before the body of a call is read. gRPC itself would inflate a compressed request without a bound, and
wait for the rest of one for ever: both are done here instead. It knows no method; see `grpc` for those.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import operator
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NoReturn

from suanli.serving.log import Log
from suanli.serving.protocol import Refusal, bad_request, decompress

DETAILS = 400  # characters of a message: in a header, where one may take 12 bytes and 8 KiB are the most
_STATUS = {  # HTTP's to gRPC's; others of 400 to 499 are INVALID_ARGUMENT, the rest INTERNAL
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

Method = Callable[[Any, Any], Awaitable[Any]]  # from the request's message and gRPC's context to the answer's message


class Calls:
    """The handlers of all methods. gRPC asks `service` for one as soon as a call's headers are here."""

    def __init__(self, *, log: Log, api_key: str | None, max_message_bytes: int, receive_s: float) -> None:
        self._log = log
        self._api_key = None if api_key is None else api_key.encode()
        self._max_message_bytes, self._receive_s = max_message_bytes, receive_s
        self._no_key = _make_refusing_handler(
            Refusal(401, "A key is needed: authorization: Bearer KEY, or x-api-key: KEY.")
        )
        self._handlers: dict[str, Any] = {}
        self._open: set[str] = set()  # methods that need no key

    def service(self, call: Any) -> Any:
        """The handler of the method that a call names; None: there is none."""
        handler = self._handlers.get(call.method)
        if handler is None or self._api_key is None or call.method in self._open:
            return handler
        return handler if self._has_key(dict(call.invocation_metadata), self._api_key) else self._no_key

    def _has_key(self, metadata: Mapping[str, str | bytes], key: bytes) -> bool:
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else str(metadata.get("x-api-key", ""))
        return hmac.compare_digest(given.encode("utf-8", "replace"), key)

    def add(self, method: str, request: Any, answer: Method, *, keyed: bool = True) -> None:
        """A method with one request, whose class is given, and one answer."""
        from grpc import stream_unary_rpc_method_handler

        async def handle(_: Any, context: Any) -> Any:  # a stream to gRPC, which would read one request without a limit
            try:
                with self.log_request(method) as identity:
                    asked = await self.parse(await self._body(context), request)
                    identity.append(getattr(asked, "id", ""))
                    return await answer(asked, context)
            except Refusal as refused:
                await _abort(context, refused)

        write = operator.methodcaller("SerializeToString")
        self._register(method, stream_unary_rpc_method_handler(handle, response_serializer=write), keyed)

    def add_stream(self, method: str, handle: Callable[[Any], Awaitable[None]], *, keyed: bool = True) -> None:
        """A method that reads and writes bytes by itself."""
        from grpc import stream_stream_rpc_method_handler

        async def guarded(_: Any, context: Any) -> None:
            try:
                await handle(context)
            except Refusal as refused:
                await _abort(context, refused)

        self._register(method, stream_stream_rpc_method_handler(guarded), keyed)

    def add_refused(self, method: str, reason: str) -> None:
        """A method that clients know and that isn't offered."""
        self._register(method, _make_refusing_handler(Refusal(501, reason)), keyed=True)

    def _register(self, method: str, handler: Any, keyed: bool) -> None:
        self._handlers[method] = handler
        if not keyed:
            self._open.add(method)

    @contextlib.contextmanager
    def log_request(self, method: str) -> Iterator[list[str]]:
        """Around the work on one request, whose identity is put into the list: a line in the log where it wants one.
        What nobody foresaw becomes Refusal(500), and its reason is for the log only."""
        from grpc import aio

        started = time.perf_counter()
        identity: list[str] = []
        try:
            yield identity
        except Refusal as error:
            self._write_log_line(method, identity, started, _status_name(error), error.message)
            raise
        except asyncio.CancelledError:
            self._write_log_line(method, identity, started, "CANCELLED")
            raise
        except aio.BaseError:  # of a call that is over
            raise
        except Exception as error:  # one request must not harm the others; the log has the reason
            self._write_log_line(method, identity, started, "INTERNAL", repr(error))
            raise Refusal(500, "This was not foreseen; the server's log says more.") from error
        else:
            self._write_log_line(method, identity, started, "OK")

    def _write_log_line(self, method: str, identity: list[str], started: float, status: str, reason: str = "") -> None:
        if status != "INTERNAL" and not self._log.requests:
            return
        say = self._log.error if status == "INTERNAL" else self._log.event
        ms = round(1e3 * (time.perf_counter() - started), 3)
        why = {"reason": reason[:500]} if reason else {}
        say("request", request_id="".join(identity)[:128], method="gRPC", path=method, status=status, ms=ms, **why)

    async def _body(self, context: Any) -> Any:
        try:
            async with asyncio.timeout(self._receive_s):
                return await context.read()
        except TimeoutError:
            raise Refusal(408, f"The request was not here after {self._receive_s:g} s.") from None

    async def parse(self, body: Any, kind: Any) -> Any:
        """The message of a class in what was read, which is gRPC's EOF where nothing came. Raises Refusal."""
        from google.protobuf.message import DecodeError

        if not isinstance(body, bytes):
            raise bad_request("The call ended before its request.")
        if body[:2] == b"\x1f\x8b" or (body[:1] == b"\x78" and int.from_bytes(body[:2]) % 31 == 0):
            body = await asyncio.to_thread(_decompress, body, self._max_message_bytes)
        try:
            return kind.FromString(body)
        except DecodeError as error:
            raise bad_request(f"The request is not a {kind.DESCRIPTOR.name}: {error}.") from None


def _decompress(body: bytes, most_bytes: int) -> bytes:
    """A body that was compressed with gzip or deflate. No message of ours begins like one, so a look at it is enough:
    where gRPC doesn't inflate, it doesn't tell how a body was sent either."""
    try:
        return decompress(body, most_bytes, wbits=zlib.MAX_WBITS | 32)
    except zlib.error:
        raise bad_request("The request is neither a message of protocol buffers nor compressed.") from None


def _make_refusing_handler(refused: Refusal) -> Any:
    """A handler that refuses without reading a body."""
    from grpc import stream_stream_rpc_method_handler

    async def refuse(_: Any, context: Any) -> None:
        await _abort(context, refused)

    return stream_stream_rpc_method_handler(refuse)


def _status_name(refused: Refusal) -> str:
    return _STATUS.get(refused.status, "INVALID_ARGUMENT" if 400 <= refused.status < 500 else "INTERNAL")


async def _abort(context: Any, refused: Refusal) -> NoReturn:
    """Ends the call, by an exception of gRPC's. When to try again is told as its clients read it (gRPC proposal A6)."""
    from grpc import StatusCode

    after_s = refused.retry_after_s
    trailing = () if after_s is None else (("grpc-retry-pushback-ms", str(math.ceil(after_s * 1000))),)
    await context.abort(StatusCode[_status_name(refused)], refused.message[:DETAILS], trailing)
    raise AssertionError("abort raises")
