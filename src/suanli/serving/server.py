"""Runs a server: HTTP and gRPC on one loop, from the first socket to a shutdown that loses no request.

On SIGTERM or Ctrl-C the server reports that it isn't ready, accepts no new connections, answers the requests that it
has, and ends; a second Ctrl-C ends it at once. A port has one server process, since one engine uses all cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from suanli.core.errors import MachineError, UsageError
from suanli.serving.connection import Connection, SharedState
from suanli.serving.http import App
from suanli.serving.log import Log, log_library_errors
from suanli.serving.model import ModelOptions
from suanli.serving.repository import Repository
from suanli.serving.worker import EngineDied

if TYPE_CHECKING:
    from suanli.serving.grpc import GrpcServer

KEEP_ALIVE_S = 75
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DRAIN_S = 60.0  # limit for answering accepted requests
CLOSING_S = 0.25  # time in which every answer says that its connection will close


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how a server listens."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    grpc_port: int | None = None  # None: no gRPC
    max_body_bytes: int = 1 << 26
    api_key: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    shutdown_delay_s: float = 0.0  # between reporting that it isn't ready and refusing connections


class _Server(uvicorn.Server):
    """uvicorn's server, without its handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_models(
    subject: Path,
    model_options: ModelOptions,
    options: ServerOptions,
    log: Log,
    *,
    on_start: Callable[[int, int | None], None],
) -> None:
    """Serves until a signal ends it. `on_start` gets the ports, of HTTP and gRPC, once the server listens.

    Raises MachineError where a port is in use or a single model's engine doesn't come up, DataError where there is no
    model, UsageError for a host or TLS files that can't be used.
    """
    repository = Repository(subject, model_options, log)
    loopback = options.host in LOOPBACK
    app = App(
        repository,
        log=log,
        max_body_bytes=options.max_body_bytes,
        api_key=options.api_key,
        host_names=LOOPBACK if loopback else None,
    )
    with (
        _bind(options.host, options.port) as listener,
        log_library_errors(log),
        _catch_signals() as (stop, stop_now),
    ):
        server = _Server(_make_config(app, options))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        grpc = None
        try:
            if options.grpc_port is not None:
                grpc = await _start_grpc(repository, options, log)
            loading = asyncio.create_task(repository.start())
            while not server.started and not running.done():
                await asyncio.sleep(0.005)
            gc.collect()
            gc.freeze()  # else each full collection would stop all answers to scan what was imported
            on_start(listener.getsockname()[1], None if grpc is None else grpc.port)
            await _wait_for_stop(stop, loading, running)
            log.event("stopping", requests="accepted requests are still answered")
            shutdown = asyncio.create_task(_shut_down(server, running, grpc, repository, options.shutdown_delay_s))
            second_signal = asyncio.create_task(stop_now.wait())
            limit_s = options.shutdown_delay_s + DRAIN_S
            await asyncio.wait({shutdown, second_signal}, return_when=asyncio.FIRST_COMPLETED, timeout=limit_s)
            shutdown.cancel()
        except EngineDied as error:
            raise MachineError(
                f"The model can't be served: {error}", fix="Try suanli predict with the same model."
            ) from error
        finally:
            server.should_exit = server.force_exit = True
            for connection in list(server.server_state.connections):  # only those that had no time to end
                connection.transport.abort()
            if grpc is not None:
                await grpc.stop(0)
            await asyncio.gather(running, return_exceptions=True)
            repository.close()


@contextlib.contextmanager
def _catch_signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Two events: SIGINT or SIGTERM sets the first one, and a second signal the other."""
    loop = asyncio.get_running_loop()
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def handle() -> None:
        if stop.is_set():
            stop_now.set()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
    try:
        yield stop, stop_now
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _wait_for_stop(stop: asyncio.Event, loading: asyncio.Task[None], running: asyncio.Task[None]) -> None:
    """Returns when `stop` is set or uvicorn ends by itself. Raises what `loading` raises."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({loading, stopped, running}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()
        await asyncio.wait({stopped, running}, return_when=asyncio.FIRST_COMPLETED)
    loading.cancel()


async def _shut_down(
    server: uvicorn.Server, running: asyncio.Task[None], grpc: GrpcServer | None, repository: Repository, delay_s: float
) -> None:
    """Accepts no new requests, and returns when the accepted ones are answered.

    A client that sends one request after another over a connection would lose the one that is on its way when the
    connection closes. So for a moment every answer says that its connection will close.
    """
    repository.draining = True
    await asyncio.sleep(delay_s)
    server.config.http_protocol_class.shared.closing = True  # type: ignore[attr-defined]  # a Connection
    for listener in server.servers:
        listener.close()
    await asyncio.sleep(CLOSING_S)
    server.should_exit = True
    if grpc is not None:
        await grpc.stop(DRAIN_S)
    await asyncio.wait({running})
    await repository.drain()


async def _start_grpc(repository: Repository, options: ServerOptions, log: Log) -> GrpcServer:
    from suanli.serving.grpc import serve_grpc

    assert options.grpc_port is not None
    return await serve_grpc(
        repository,
        host=options.host,
        port=options.grpc_port,
        api_key=options.api_key,
        max_message_bytes=options.max_body_bytes,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        log=log,
    )


def _make_config(app: App, options: ServerOptions) -> uvicorn.Config:
    protocol = type("Bounded", (Connection,), {"shared": SharedState(options.max_body_bytes)})
    tls = options.tls_cert is not None
    try:
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(DRAIN_S),
            ssl_certfile=str(options.tls_cert) if tls else None,
            ssl_keyfile=str(options.tls_key) if tls else None,
        )
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"The certificate or its key can't be used ({error}).", fix="Give PEM files.") from error
    return config


@contextlib.contextmanager
def _bind(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
    except OSError as error:
        raise UsageError(
            f"The host {host!r} can't be used ({error}).", fix="Give an address of this machine."
        ) from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            raise MachineError(
                f"Port {port} of {host} can't be opened ({error.strerror}).", fix="Choose another: --port 8080, or 0."
            ) from error
        listener.setblocking(False)
        yield listener
