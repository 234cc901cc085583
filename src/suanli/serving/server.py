"""A server from its first socket to its last answer: HTTP and gRPC on one loop, and an end that loses nothing.

On SIGTERM or Ctrl-C it says that it isn't ready, takes no new connections, answers what it has, and ends; a second
Ctrl-C ends it at once. What this doesn't do: several processes for one port; one engine uses all cores.
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
DRAIN_S = 60.0  # for what was accepted
LAST_S = 0.25  # in which clients with a connection are told that the answer is the last


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how a server listens."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    grpc_port: int | None = None  # None: no gRPC
    max_body_bytes: int = 1 << 26
    max_connections: int = 1024
    api_key: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    shutdown_delay_s: float = 0.0  # between saying that it isn't ready and taking no more connections


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    subject: Path,
    settings: ModelOptions,
    options: ServerOptions,
    log: Log,
    *,
    on_start: Callable[[int, int | None], None],
) -> None:
    """Serves until a signal ends it. `on_start` is told the ports once it listens. Raises MachineError where a port is
    in use or the model's engine doesn't come up, DataError where there is no model."""
    loop = asyncio.get_running_loop()
    repository = Repository(subject, settings, log)
    loopback = options.host in LOOPBACK
    app = App(
        repository,
        log=log,
        max_body_bytes=options.max_body_bytes,
        api_key=options.api_key,
        host_names=LOOPBACK if loopback else None,
    )
    with _bind(options.host, options.port) as listener, log_library_errors(log):
        server = _Server(_make_config(app, options))
        stop, now = asyncio.Event(), asyncio.Event()  # a first signal, and a second
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _request_stop, stop, now)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        grpc = None
        try:
            if options.grpc_port is not None:
                grpc = await _start_grpc(repository, options, log)
            loading = asyncio.create_task(repository.start())
            while not server.started and not running.done():
                await asyncio.sleep(0.005)
            gc.collect()
            gc.freeze()  # what was imported stays: else each collection of old garbage halts all answers to look at it
            on_start(listener.getsockname()[1], None if grpc is None else grpc.port)
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({loading, stopped, running}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                await asyncio.wait({stopped, running}, return_when=asyncio.FIRST_COMPLETED)
            loading.cancel()
            log.event("stopping", requests="those that were accepted are answered")
            ending = asyncio.create_task(_shut_down(server, running, grpc, repository, options.shutdown_delay_s))
            at_once = asyncio.create_task(now.wait())
            limit_s = options.shutdown_delay_s + DRAIN_S
            await asyncio.wait({ending, at_once}, return_when=asyncio.FIRST_COMPLETED, timeout=limit_s)
            ending.cancel()
        except EngineDied as error:
            raise MachineError(f"The model can't be served: {error}", fix="See suanli predict for the same.") from error
        finally:
            server.should_exit = server.force_exit = True
            for connection in list(server.server_state.connections):  # none, but where there was no time
                connection.transport.abort()
            if grpc is not None:
                await grpc.stop(0)
            await asyncio.gather(running, return_exceptions=True)
            repository.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


async def _shut_down(
    server: uvicorn.Server, running: asyncio.Task[None], grpc: GrpcServer | None, repository: Repository, delay_s: float
) -> None:
    """Takes nothing new, and returns when what was accepted is answered.

    Who keeps a connection and asks again and again would lose the request that is on its way when that is closed. So
    for a moment every answer says that it is the last of its connection.
    """
    repository.draining = True
    await asyncio.sleep(delay_s)
    server.config.http_protocol_class.shared.closing = True  # type: ignore[attr-defined]  # a Connection
    for listener in server.servers:
        listener.close()
    await asyncio.sleep(LAST_S)
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


def _request_stop(stop: asyncio.Event, now: asyncio.Event) -> None:
    if stop.is_set():
        now.set()
    stop.set()


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
            limit_concurrency=options.max_connections,
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
        raise UsageError(f"{host!r} can't be listened on ({error}).", fix="Give an address of this machine.") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            raise MachineError(
                f"Port {port} of {host} can't be had ({error.strerror}).", fix="Choose another: --port 8080, or 0."
            ) from error
        listener.setblocking(False)
        yield listener
