"""How calls of gRPC are received: the key, limits of size and time for a request, refusals, and a line in the log.

The key is checked before a request is read. gRPC itself would decompress a request without a limit, and would wait for
the rest of one for ever; so both are done here. The methods are in `grpc`.
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

DETAILS = 400  # characters of an error: it is in a header of at most 8 KiB, where a character may take 12 bytes
_STATUS = {  # gRPC's by HTTP's; others from 400 to 499 are INVALID_ARGUMENT, the rest INTERNAL
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

Method = Callable[[Any, Any], Awaitable[Any]]  # request's message, gRPC's context -> answer's message


class Calls:
    """The handlers of all methods. gRPC calls `service` as soon as the headers of a call have arrived."""

    def __init__(self, *, log: Log, api_key: str | None, max_message_bytes: int, receive_s: float) -> None:
        self._log = log
        self._api_key = None if api_key is None else api_key.encode()
        self._max_message_bytes, self._receive_s = max_message_bytes, receive_s
        self._refuse_key = _make_refusing_handler(
            Refusal(401, "An API key is needed: authorization: Bearer KEY, or x-api-key: KEY.")
        )
        self._handlers: dict[str, Any] = {}
        self._without_key: set[str] = set()  # methods that need no key

    def service(self, call: Any) -> Any:
        """The handler for a call; None: there is no such method."""
        handler = self._handlers.get(call.method)
        if handler is None or self._api_key is None or call.method in self._without_key:
            return handler
        return handler if self._has_key(dict(call.invocation_metadata), self._api_key) else self._refuse_key

    def _has_key(self, metadata: Mapping[str, str | bytes], key: bytes) -> bool:
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        sent_key = token.strip() if scheme.lower() == "bearer" else str(metadata.get("x-api-key", ""))
        return hmac.compare_digest(sent_key.encode("utf-8", "replace"), key)

    def add(self, path: str, request_class: Any, method: Method, *, needs_key: bool = True) -> None:
        """Adds a method with one request and one answer."""
        from grpc import stream_unary_rpc_method_handler

        async def handle(
            _: Any, context: Any
        ) -> Any:  # a stream for gRPC, which would read a single request without a limit
            try:
                with self.log_request(path) as request_id:
                    request = await self.parse(await self._read(context), request_class)
                    request_id.append(getattr(request, "id", ""))
                    return await method(request, context)
            except Refusal as refusal:
                await _abort(context, refusal)

        write = operator.methodcaller("SerializeToString")
        self._register(path, stream_unary_rpc_method_handler(handle, response_serializer=write), needs_key)

    def add_stream(self, path: str, handle: Callable[[Any], Awaitable[None]], *, needs_key: bool = True) -> None:
        """Adds a method that reads and writes the bytes of messages itself."""
        from grpc import stream_stream_rpc_method_handler

        async def handle_refusals(_: Any, context: Any) -> None:
            try:
                await handle(context)
            except Refusal as refusal:
                await _abort(context, refusal)

        self._register(path, stream_stream_rpc_method_handler(handle_refusals), needs_key)

    def add_refused(self, path: str, reason: str) -> None:
        """Adds a method that clients know but suanli doesn't support."""
        self._register(path, _make_refusing_handler(Refusal(501, reason)), needs_key=True)

    def _register(self, path: str, handler: Any, needs_key: bool) -> None:
        self._handlers[path] = handler
        if not needs_key:
            self._without_key.add(path)

    @contextlib.contextmanager
    def log_request(self, path: str) -> Iterator[list[str]]:
        """Around the work on one request: writes a line to the log, if it logs requests. The caller puts the request's
        id into the list. An unexpected error becomes Refusal(500), and only the log has its reason."""
        from grpc import aio

        start = time.perf_counter()
        request_id: list[str] = []
        try:
            yield request_id
        except Refusal as error:
            self._write_log_line(path, request_id, start, _status_name(error), error.message)
            raise
        except asyncio.CancelledError:
            self._write_log_line(path, request_id, start, "CANCELLED")
            raise
        except aio.BaseError:  # the call has ended
            raise
        except Exception as error:  # one request must not harm the others; the log has the reason
            self._write_log_line(path, request_id, start, "INTERNAL", repr(error))
            raise Refusal(500, "The server has an internal error; its log has the reason.") from error
        else:
            self._write_log_line(path, request_id, start, "OK")

    def _write_log_line(self, path: str, request_id: list[str], start: float, status: str, reason: str = "") -> None:
        if status != "INTERNAL" and not self._log.requests:
            return
        write = self._log.error if status == "INTERNAL" else self._log.event
        ms = round(1e3 * (time.perf_counter() - start), 3)
        more = {"reason": reason[:500]} if reason else {}
        write("request", request_id="".join(request_id)[:128], method="gRPC", path=path, status=status, ms=ms, **more)

    async def _read(self, context: Any) -> Any:
        try:
            async with asyncio.timeout(self._receive_s):
                return await context.read()
        except TimeoutError:
            raise Refusal(408, f"The request did not arrive within {self._receive_s:g} s.") from None

    async def parse(self, body: Any, message_class: Any) -> Any:
        """The message in a body, which is gRPC's EOF where nothing was sent. Raises Refusal."""
        from google.protobuf.message import DecodeError

        if not isinstance(body, bytes):
            raise bad_request("The call ended before its request.")
        if body[:2] == b"\x1f\x8b" or (body[:1] == b"\x78" and int.from_bytes(body[:2]) % 31 == 0):
            body = await asyncio.to_thread(_decompress, body, self._max_message_bytes)
        try:
            return message_class.FromString(body)
        except DecodeError as error:
            raise bad_request(f"The request is not a {message_class.DESCRIPTOR.name}: {error}.") from None


def _decompress(body: bytes, max_bytes: int) -> bytes:
    """A body that starts like gzip or deflate. That decides, since no message of the protocol starts like them: gRPC
    doesn't report the encoding where it doesn't decompress."""
    try:
        return decompress(body, max_bytes, wbits=zlib.MAX_WBITS | 32)
    except zlib.error:
        raise bad_request("The request is neither a message of protocol buffers nor compressed.") from None


def _make_refusing_handler(refusal: Refusal) -> Any:
    """A handler that refuses without reading a body."""
    from grpc import stream_stream_rpc_method_handler

    async def refuse(_: Any, context: Any) -> None:
        await _abort(context, refusal)

    return stream_stream_rpc_method_handler(refuse)


def _status_name(refusal: Refusal) -> str:
    return _STATUS.get(refusal.status, "INVALID_ARGUMENT" if 400 <= refusal.status < 500 else "INTERNAL")


async def _abort(context: Any, refusal: Refusal) -> NoReturn:
    """Ends the call by an exception of gRPC's. The time of a retry is sent in the form of gRPC proposal A6."""
    from grpc import StatusCode

    after_s = refusal.retry_after_s
    trailing = () if after_s is None else (("grpc-retry-pushback-ms", str(math.ceil(after_s * 1000))),)
    await context.abort(StatusCode[_status_name(refusal)], refusal.message[:DETAILS], trailing)
    raise AssertionError("abort raises")
