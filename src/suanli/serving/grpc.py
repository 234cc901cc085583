"""The Open Inference Protocol over gRPC, on the same asyncio loop as HTTP, and gRPC's own health service.

It serves the same models: `messages` turns a call into an InferRequest and its answer into a message, `grpc_calls`
receives calls. Not supported: shared memory, traces and log settings (UNIMPLEMENTED), several answers to one request,
and reflection.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.core.errors import MachineError, UsageError, pip_install
from suanli.serving import describe
from suanli.serving.grpc_calls import DETAILS, Calls, Method
from suanli.serving.log import Log
from suanli.serving.messages import HEALTH, INFERENCE, fill_message, message_class, to_message, to_request
from suanli.serving.protocol import Refusal, bad_request

if TYPE_CHECKING:
    from suanli.serving.repository import Repository

SERVICE = f"{INFERENCE}.GRPCInferenceService"
STREAM = f"/{SERVICE}/ModelStreamInfer"
CALLS = 2048  # at once; one more is RESOURCE_EXHAUSTED
CALLS_OF_A_CONNECTION = 256  # at once; the client holds back others
WAITING_IN_A_STREAM = 32  # requests of one stream that are answered at once
RECEIVE_S = 60.0  # for the whole body of a request
WATCH_S = 1.0  # between two checks of the health, for clients that watch it
OPTIONS = (  # of gRPC
    ("grpc.max_concurrent_streams", CALLS_OF_A_CONNECTION),
    ("grpc.max_send_message_length", -1),
    ("grpc.per_message_decompression", 0),  # `grpc_calls` does it
    ("grpc.so_reuseport", 0),  # else a second server on the port would silently get half of the calls
    ("grpc.keepalive_time_ms", 60_000),  # so that a client that has gone is noticed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 900_000),  # clients connect again by themselves
    ("grpc.server_handshake_timeout_ms", 10_000),
)
LARGE_BYTES = 1 << 18  # of typed contents: parsed in a thread from here on

_NO_MEMORY = "suanli shares no memory with clients: send the bytes of a tensor in raw_input_contents."
_NO_SETTINGS = "Clients can't change traces or logs of suanli."
_NOT_OFFERED = {
    "SystemSharedMemoryStatus": _NO_MEMORY,
    "SystemSharedMemoryRegister": _NO_MEMORY,
    "SystemSharedMemoryUnregister": _NO_MEMORY,
    "CudaSharedMemoryStatus": _NO_MEMORY,
    "CudaSharedMemoryRegister": _NO_MEMORY,
    "CudaSharedMemoryUnregister": _NO_MEMORY,
    "TraceSetting": _NO_SETTINGS,
    "LogSettings": _NO_SETTINGS,
}


class GrpcServer:
    """A running server, from `serve_grpc`. `port` is the one that it listens on."""

    def __init__(self, server: Any, service: _Service, port: int) -> None:
        self._server, self._service, self.port = server, service, port

    async def stop(self, grace_s: float) -> None:
        """Accepts no new calls, waits up to `grace_s` seconds for those that it has, then cancels the rest."""
        self._service.stopping.set()
        await self._server.stop(grace_s)


async def serve_grpc(
    repository: Repository,
    *,
    log: Log | None = None,
    host: str = "127.0.0.1",
    port: int = 8001,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    api_key: str | None = None,
    max_message_bytes: int = 64 << 20,
    receive_s: float = RECEIVE_S,
) -> GrpcServer:
    """Serves on `port` (0: any free one) until `stop`; with TLS where a certificate and its key, in PEM, are given.

    Every call but health, live and ready needs `api_key`: `authorization: Bearer KEY` or `x-api-key: KEY`.
    Raises MachineError where the port is in use or packages are missing, UsageError for TLS files that can't be read.
    """
    try:
        from grpc import aio, ssl_server_credentials

        message_class("ModelInferRequest")
    except ImportError as error:
        fix = f"Install them: {pip_install('suanli[serve]')}"
        raise MachineError(f"gRPC needs grpcio and protobuf ({error}).", fix=fix) from None
    credentials = None
    if tls_cert is not None and tls_key is not None:
        try:
            credentials = ssl_server_credentials([(tls_key.read_bytes(), tls_cert.read_bytes())])
        except OSError as error:
            raise UsageError(f"The certificate or its key can't be read: {error}.", fix="Name two PEM files.") from None
    calls = Calls(log=log or Log("none"), api_key=api_key, max_message_bytes=max_message_bytes, receive_s=receive_s)
    service = _Service(repository, calls)
    server = aio.server(
        handlers=(calls,),
        maximum_concurrent_rpcs=CALLS,
        options=(*OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)),
    )
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            bound_port = server.add_insecure_port(address)
        else:
            bound_port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        fix = "Choose another: --grpc-port 8002, or 0."
        raise MachineError(f"Port {port} of {host} can't be opened for gRPC ({error}).", fix=fix) from None
    await server.start()
    return GrpcServer(server, service, bound_port)


class _Service:
    """The methods. Each takes a request's message and gRPC's context, returns a message, and may raise Refusal."""

    def __init__(self, repository: Repository, calls: Calls) -> None:
        self.repository, self.calls = repository, calls
        self.stopping = asyncio.Event()
        methods: dict[str, Method] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_model_load,
            "RepositoryModelUnload": self._repository_model_unload,
        }
        for name, method in methods.items():
            needs_key = name not in ("ServerLive", "ServerReady")
            calls.add(f"/{SERVICE}/{name}", message_class(f"{name}Request"), method, needs_key=needs_key)
        calls.add_stream(STREAM, self._model_stream_infer)
        for name, reason in _NOT_OFFERED.items():
            calls.add_refused(f"/{SERVICE}/{name}", reason)
        calls.add(f"/{HEALTH}.Health/Check", message_class("HealthCheckRequest", HEALTH), self._check, needs_key=False)
        calls.add_stream(f"/{HEALTH}.Health/Watch", self._watch, needs_key=False)

    # --- the server ---

    @property
    def _is_ready(self) -> bool:
        return self.repository.ready and not self.stopping.is_set()  # nor is a repository that drains

    async def _live(self, *_: Any) -> Any:
        return message_class("ServerLiveResponse")(live=True)

    async def _ready(self, *_: Any) -> Any:
        return message_class("ServerReadyResponse")(ready=self._is_ready)

    async def _server_metadata(self, *_: Any) -> Any:
        return message_class("ServerMetadataResponse")(**describe.server())

    def _health(self, service: str) -> str:
        if service not in ("", SERVICE):
            return "SERVICE_UNKNOWN"
        return "SERVING" if self._is_ready else "NOT_SERVING"

    async def _check(self, request: Any, _: Any) -> Any:
        status = self._health(request.service)
        if status == "SERVICE_UNKNOWN":
            raise Refusal(404, f"There is no service {request.service[:200]!r}; there is {SERVICE}.")
        return message_class("HealthCheckResponse", HEALTH)(status=status)

    async def _watch(self, context: Any) -> None:
        request = await self.calls.parse(await context.read(), message_class("HealthCheckRequest", HEALTH))
        sent_status = ""
        while True:
            last = (
                self.stopping.is_set()
            )  # read before the status, so that the last status is that of a stopping server
            status = self._health(request.service)
            if status != sent_status:
                await context.write(message_class("HealthCheckResponse", HEALTH)(status=status).SerializeToString())
            if last:
                return
            sent_status = status
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self.stopping.wait()

    # --- the models ---

    async def _model_ready(self, request: Any, _: Any) -> Any:
        ready = False  # also for an unknown model, as Triton answers
        with contextlib.suppress(Refusal):
            ready = self.repository.find(request.name, request.version or None).ready and not self.repository.draining
        return message_class("ModelReadyResponse")(ready=ready)

    async def _model_metadata(self, request: Any, _: Any) -> Any:
        model = self.repository.find(request.name, request.version or None)
        versions = [request.version] if request.version else self.repository.versions(model.name)
        return fill_message("ModelMetadataResponse", describe.metadata(model, versions))

    async def _model_config(self, request: Any, _: Any) -> Any:
        model = self.repository.find(request.name, request.version or None)
        return fill_message("ModelConfigResponse", {"config": describe.config(model)})

    async def _model_statistics(self, request: Any, _: Any) -> Any:
        """Of all models if the request names none, and of all versions if it names none."""
        repository, stats = self.repository, []
        for name in (request.name,) if request.name else repository.names():
            for version in (request.version,) if request.version else repository.versions(name):
                stats.append(describe.stats(repository.find(name, version)))
        return fill_message("ModelStatisticsResponse", {"model_stats": stats})

    async def _model_infer(self, request: Any, context: Any) -> Any:
        model = self.repository.find(request.model_name, request.model_version or None)
        left_s = context.time_remaining()
        deadline = None if left_s is None else asyncio.get_running_loop().time() + left_s
        slow = not request.raw_input_contents and request.ByteSize() > LARGE_BYTES
        infer_request = await asyncio.to_thread(to_request, request) if slow else to_request(request)
        return to_message(await model.infer(infer_request, deadline=deadline))

    async def _model_stream_infer(self, context: Any) -> None:
        """Requests are computed at the same time and answered in their order; a refusal doesn't end the stream."""
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(WAITING_IN_A_STREAM)

        async def read() -> None:
            while isinstance(body := await self._next(context), bytes):
                await answers.put(group.create_task(self._answer_in_stream(body, context)))
            await answers.put(None)

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            while (answer := await answers.get()) is not None:
                await context.write(await answer)
        if self.stopping.is_set():
            raise Refusal(
                503, "The server is stopping. Every request that it had of this stream is answered.", retry_after_s=1.0
            )

    async def _next(self, context: Any) -> Any:
        """The next request of a stream, as bytes; another value when the stream or the server ends."""
        reading = asyncio.ensure_future(context.read())
        stopping = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            reading.cancel()
            stopping.cancel()

    async def _answer_in_stream(self, body: bytes, context: Any) -> bytes:
        answer = message_class("ModelStreamInferResponse")()
        try:
            with self.calls.log_request(STREAM) as request_id:
                request = await self.calls.parse(body, message_class("ModelInferRequest"))
                request_id.append(request.id)
                answer.infer_response.id = request.id  # an error has the id, too
                answer.infer_response.CopyFrom(await self._model_infer(request, context))
        except Refusal as refused:
            answer.error_message = refused.message[:DETAILS]
        answer.infer_response.parameters["triton_final_response"].bool_param = True
        return bytes(answer.SerializeToString())

    # --- the repository ---

    async def _repository_index(self, request: Any, _: Any) -> Any:
        _check_repository(request)
        models = [model for model in self.repository.index() if model["state"] == "READY" or not request.ready]
        return fill_message("RepositoryIndexResponse", {"models": models})

    async def _repository_model_load(self, request: Any, _: Any) -> Any:
        _check_repository(request)
        if request.parameters:
            raise bad_request("A model is loaded as its folder says: leave out the parameters.")
        await self.repository.load(request.model_name)
        return message_class("RepositoryModelLoadResponse")()

    async def _repository_model_unload(self, request: Any, _: Any) -> Any:
        _check_repository(request)
        await self.repository.unload(request.model_name)
        return message_class("RepositoryModelUnloadResponse")()


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise bad_request("There is only one repository, without a name: leave out repository_name.")
