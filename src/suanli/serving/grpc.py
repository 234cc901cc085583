"""The Open Inference Protocol over gRPC, on the asyncio loop that HTTP runs on, and gRPC's own health service.

It is one more way to the same models: a call becomes an InferRequest and its answer a message again, see `messages`;
how calls are received is in `grpc_calls`. What this doesn't do: shared memory, traces and settings of logs
(UNIMPLEMENTED), models that answer one request more than once, and reflection.
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
CALLS_OF_A_CONNECTION = 256  # at once; its client lets others wait
WAITING_IN_A_STREAM = 32  # requests of one stream that are being answered
RECEIVE_S = 60.0  # for the whole body of a request
WATCH_S = 1.0  # between two looks at the health, for those who watch it
LARGE_BYTES = 1 << 18  # of typed contents, which from here on are read in a thread

_MEMORY = "suanli shares no memory with clients: send the bytes of a tensor in raw_input_contents."
_SETTINGS = "suanli has no traces or logs that clients could set."
_NOT_OFFERED = {
    "SystemSharedMemoryStatus": _MEMORY,
    "SystemSharedMemoryRegister": _MEMORY,
    "SystemSharedMemoryUnregister": _MEMORY,
    "CudaSharedMemoryStatus": _MEMORY,
    "CudaSharedMemoryRegister": _MEMORY,
    "CudaSharedMemoryUnregister": _MEMORY,
    "TraceSetting": _SETTINGS,
    "LogSettings": _SETTINGS,
}


class GrpcServer:
    """A server that runs. Made by `serve_grpc`; `port` is the one that it listens on."""

    def __init__(self, server: Any, service: _Service, port: int) -> None:
        self._server, self._service, self.port = server, service, port

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, waits `grace_s` seconds for those that it has, then cancels what is left."""
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
    """Answers on `port` (0: any that is free) until `stop`, with TLS where there are a certificate and its key in PEM.

    `api_key` is asked of every call but health, live and ready: `authorization: Bearer KEY` or `x-api-key: KEY`.
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
    log = log or Log("none")
    calls = Calls(log=log, api_key=api_key, max_message_bytes=max_message_bytes, receive_s=receive_s)
    service = _Service(repository, calls)
    server = aio.server(
        handlers=(calls,),
        maximum_concurrent_rpcs=CALLS,
        options=(
            ("grpc.max_concurrent_streams", CALLS_OF_A_CONNECTION),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.per_message_decompression", 0),  # see `grpc_calls`
            ("grpc.so_reuseport", 0),  # or a second server on the port would get half of the calls, silently
            ("grpc.keepalive_time_ms", 60_000),  # a client that is gone is noticed
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_connection_idle_ms", 900_000),  # clients connect again by themselves
            ("grpc.server_handshake_timeout_ms", 10_000),
        ),
    )
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        fix = "Choose another: --grpc-port 8002, or 0."
        raise MachineError(f"Port {port} of {host} can't be had for gRPC ({error}).", fix=fix) from None
    await server.start()
    return GrpcServer(server, service, bound)


class _Service:
    """The methods: each takes the request's message and gRPC's context, and raises Refusal."""

    def __init__(self, repository: Repository, calls: Calls) -> None:
        self.repository, self.calls = repository, calls
        self.stopping = asyncio.Event()
        answers: dict[str, Method] = {
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
        for name, answer in answers.items():
            keyed = name not in ("ServerLive", "ServerReady")
            calls.add(f"/{SERVICE}/{name}", message_class(f"{name}Request"), answer, keyed=keyed)
        calls.add_stream(STREAM, self._model_stream_infer)
        for name, reason in _NOT_OFFERED.items():
            calls.add_refused(f"/{SERVICE}/{name}", reason)
        calls.add(f"/{HEALTH}.Health/Check", message_class("HealthCheckRequest", HEALTH), self._check, keyed=False)
        calls.add_stream(f"/{HEALTH}.Health/Watch", self._watch, keyed=False)

    # --- the server ---

    @property
    def _is_ready(self) -> bool:
        return self.repository.ready and not self.stopping.is_set()  # a repository that drains isn't ready

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

    async def _check(self, asked: Any, _: Any) -> Any:
        status = self._health(asked.service)
        if status == "SERVICE_UNKNOWN":
            raise Refusal(404, f"There is no service {asked.service[:200]!r}; there is {SERVICE}.")
        return message_class("HealthCheckResponse", HEALTH)(status=status)

    async def _watch(self, context: Any) -> None:
        asked = await self.calls.parse(await context.read(), message_class("HealthCheckRequest", HEALTH))
        told = ""
        while True:
            last = self.stopping.is_set()  # before the status, which is then the one of a server that stops
            status = self._health(asked.service)
            if status != told:
                await context.write(message_class("HealthCheckResponse", HEALTH)(status=status).SerializeToString())
            if last:
                return
            told = status
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self.stopping.wait()

    # --- the models ---

    async def _model_ready(self, asked: Any, _: Any) -> Any:
        ready = False  # also of a model that isn't there, as Triton answers
        with contextlib.suppress(Refusal):
            ready = self.repository.find(asked.name, asked.version or None).ready and not self.repository.draining
        return message_class("ModelReadyResponse")(ready=ready)

    async def _model_metadata(self, asked: Any, _: Any) -> Any:
        model = self.repository.find(asked.name, asked.version or None)
        versions = [asked.version] if asked.version else self.repository.versions(model.name)
        return fill_message("ModelMetadataResponse", describe.metadata(model, versions))

    async def _model_config(self, asked: Any, _: Any) -> Any:
        model = self.repository.find(asked.name, asked.version or None)
        return fill_message("ModelConfigResponse", {"config": describe.config(model)})

    async def _model_statistics(self, asked: Any, _: Any) -> Any:
        """Of all models where none is named, of all its versions where none is."""
        repository, found = self.repository, []
        for name in (asked.name,) if asked.name else repository.names():
            for version in (asked.version,) if asked.version else repository.versions(name):
                found.append(describe.stats(repository.find(name, version)))
        return fill_message("ModelStatisticsResponse", {"model_stats": found})

    async def _model_infer(self, asked: Any, context: Any) -> Any:
        model = self.repository.find(asked.model_name, asked.model_version or None)
        left_s = context.time_remaining()
        deadline = None if left_s is None else asyncio.get_running_loop().time() + left_s
        slow = not asked.raw_input_contents and asked.ByteSize() > LARGE_BYTES
        request = await asyncio.to_thread(to_request, asked) if slow else to_request(asked)
        return to_message(await model.infer(request, deadline=deadline))

    async def _model_stream_infer(self, context: Any) -> None:
        """Requests are computed together and answered in their order; one that is refused doesn't end the stream."""
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
            raise Refusal(503, "The server is stopping; what it had of this stream is answered.", retry_after_s=1.0)

    async def _next(self, context: Any) -> Any:
        """The next request of a stream; something else where it ends, or the server does."""
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
            with self.calls.log_request(STREAM) as identity:
                asked = await self.calls.parse(body, message_class("ModelInferRequest"))
                identity.append(asked.id)
                answer.infer_response.id = asked.id  # an error says whose it is, too
                answer.infer_response.CopyFrom(await self._model_infer(asked, context))
        except Refusal as refused:
            answer.error_message = refused.message[:DETAILS]
        answer.infer_response.parameters["triton_final_response"].bool_param = True
        return bytes(answer.SerializeToString())

    # --- the repository ---

    async def _repository_index(self, asked: Any, _: Any) -> Any:
        _only_repository(asked)
        listed = [model for model in self.repository.index() if model["state"] == "READY" or not asked.ready]
        return fill_message("RepositoryIndexResponse", {"models": listed})

    async def _repository_model_load(self, asked: Any, _: Any) -> Any:
        _only_repository(asked)
        if asked.parameters:
            raise bad_request("A model is loaded as its folder says: parameters can't be given.")
        await self.repository.load(asked.model_name)
        return message_class("RepositoryModelLoadResponse")()

    async def _repository_model_unload(self, asked: Any, _: Any) -> Any:
        _only_repository(asked)
        await self.repository.unload(asked.model_name)
        return message_class("RepositoryModelUnloadResponse")()


def _only_repository(asked: Any) -> None:
    if asked.repository_name:
        raise bad_request("There is one repository, without a name: leave repository_name out.")
