"""HTTP: the Open Inference Protocol, /predict, metrics and pages, as one ASGI application.

Starlette routes a request. Around that, `App` gives each request an id and a line in the log, checks who may send it,
and answers refusals in JSON. A model that has too many requests refuses one before its body is read.

Not here: sockets (`server`, `connection`), batches (`batching`), gRPC (`grpc`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from suanli.engines.predictor import Prediction
from suanli.serving import bodies, codec, describe, metrics, pages
from suanli.serving.codec import HEADER_LENGTH
from suanli.serving.forms import read_body, read_inputs, read_object, read_threshold, read_top
from suanli.serving.log import Log
from suanli.serving.model import NothingReadable, ServedModel
from suanli.serving.openapi import JsonResponse, Operation, WrongMethod, document
from suanli.serving.protocol import Refusal, bad_request
from suanli.serving.repository import Repository

BINARY_HEADER = HEADER_LENGTH.lower().encode()
LARGE_JSON = 1 << 18  # bytes: parsed in a thread from here on, so that other requests are answered meanwhile
Top = Annotated[
    int,
    Field(ge=1, le=10_000, description="At most so many entries of an answer that ranks: by default 5, and all boxes."),
]
Threshold = Annotated[
    float, Field(ge=0, le=1, description="In place of the one that the model decides by: the score of a shown box.")
]
JsonLength = Annotated[
    int,
    Field(
        ge=0,
        description="Length of the JSON, after which the tensors' bytes follow; 0: the body is one image or text.",
    ),
]
PREDICT_BODIES = {  # by media type
    "multipart/form-data": bodies.Files,
    "image/*": bytes,
    "application/octet-stream": bytes,
    "application/json": bodies.TextsOrRows,
    "text/csv": bodies.Text,
    "text/plain": bodies.Text,
}


class App:
    """The ASGI application. `host_names`: the values that the Host header may have; None: any."""

    def __init__(
        self,
        repository: Repository,
        *,
        log: Log,
        max_body_bytes: int,
        api_key: str | None = None,
        host_names: tuple[str, ...] | None = None,
    ) -> None:
        self.repository, self.log = repository, log
        self._max_body_bytes = max_body_bytes
        self._key = None if api_key is None else api_key.encode()
        self._host_names = host_names
        self._numbers = count(1)
        self._prefix = f"{time.time_ns() // 1000:x}"
        self._started = time.monotonic()
        self.operations = self._list_operations()
        self._open = {operation.path for operation in self.operations if operation.open_to_all}
        self._router = Router(self.operations, redirect_slashes=False, default=_refuse_path)

    def _list_operations(self) -> list[Operation]:
        """All routes. Those of a model exist with and without a version."""
        models = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        page: dict[str, Any] = {"open_to_all": True, "include_in_schema": False}
        infer: dict[str, Any] = {
            "body": {"application/json": bodies.InferRequest, "application/octet-stream": bytes},
            "answer": {"application/json": bodies.InferResponse, "application/octet-stream": bytes},
            "parameters": {("header", HEADER_LENGTH): JsonLength},
        }
        index: dict[str, Any] = {"body": {"application/json": bodies.IndexRequest}, "body_required": False}
        change: dict[str, Any] = {"body": {"application/json": dict[str, Any]}, "body_required": False}
        query = {"top": Top, "threshold": Threshold, "model": str, "version": str}
        return [
            *(Operation(f"POST {path}/infer", self.infer, **infer) for path in models),
            Operation("GET /v2", self.server_metadata),
            Operation("GET /v2/health/live", self.server_live, open_to_all=True),
            Operation("GET /v2/health/ready", self.server_ready, open_to_all=True),
            Operation("GET /v2/models/stats", self.all_stats),
            *(Operation(f"GET {path}", self.model_metadata) for path in models),
            *(Operation(f"GET {path}/ready", self.model_ready) for path in models),
            *(Operation(f"GET {path}/config", self.model_config) for path in models),
            *(Operation(f"GET {path}/stats", self.model_stats) for path in models),
            Operation("POST /v2/repository/index", self.repository_index, **index),
            Operation("POST /v2/repository/models/{name}/load", self.model_load, **change),
            Operation("POST /v2/repository/models/{name}/unload", self.model_unload, **change),
            Operation(
                "POST /predict",
                self.predict,
                body=PREDICT_BODIES,
                refused={400: bodies.Unreadable | bodies.Error},
                parameters={("query", name): kind for name, kind in query.items()},
            ),
            Operation("GET /status", self.status, open_to_all=True),
            Operation("GET /metrics", self.metrics, answer={"text/plain": str}),
            Operation("GET /openapi.json", self.openapi),
            *(Operation(f"GET {path}", self.page, **page) for path in pages.files()),
        ]

    # --- around every request ---

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start = time.perf_counter()
        headers = scope["suanli.headers"] = dict(scope["headers"])
        request_id = self._request_id(headers)
        reason = ""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-request-id", request_id.encode()))
                self._log_request(scope, request_id, start, message["status"], reason)
            await send(message)

        try:
            path = scope["path"]
            self._check_access(path, scope["method"], headers)
            if path.startswith("/v2/"):
                scope["path"] = path.rstrip("/")
            await self._router(scope, receive, answer)
        except Refusal as error:
            reason = error.message
            await _error_response(error)(scope, receive, answer)
        except asyncio.CancelledError:
            if not scope.get("suanli.disconnected"):
                raise
            self._log_request(scope, request_id, start, 499)
        except Exception as error:  # noqa: BLE001  # one request must not harm the others; the log has the reason
            self.log.error("request failed", request_id=request_id, path=scope["path"], reason=repr(error)[:500])
            await _error_response(Refusal(500, "The server has an internal error; its log has the reason."))(
                scope, receive, answer
            )

    def _request_id(self, headers: Mapping[bytes, bytes]) -> str:
        """Identifies a request in its answer and in the log: the client's X-Request-Id, if it is a plain word."""
        own = headers.get(b"x-request-id", b"")
        if own and len(own) <= 128 and own.isascii() and own.replace(b"-", b"").replace(b"_", b"").isalnum():
            return own.decode()
        return f"{self._prefix}-{next(self._numbers)}"

    def _log_request(self, scope: Scope, request_id: str, start: float, status: int, reason: str = "") -> None:
        """Writes a line for a request whose engine failed, and with --log-requests for every request."""
        failed = status == 500 and reason != ""
        if not failed and not self.log.requests:
            return
        write = self.log.error if failed else self.log.event
        ms = round(1e3 * (time.perf_counter() - start), 3)
        more = {"reason": reason[:500]} if reason else {}
        method, path = scope["method"], scope["path"]
        write("request", request_id=request_id, method=method, path=path, status=status, ms=ms, **more)

    def _check_access(self, path: str, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raises Refusal for a request without the key, or from another site's page in the user's browser."""
        if self._host_names is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            try:
                name = urlsplit(f"//{host}").hostname or ""
            except ValueError:  # an incomplete IPv6 address
                name = ""
            if name not in self._host_names:
                raise Refusal(421, "This server doesn't answer to that host name. Its owner can allow it with --host.")
        origin = headers.get(b"origin")
        own_host = headers.get(b"host", b"")
        if origin is not None and method not in ("GET", "HEAD") and origin.partition(b"://")[2] != own_host:
            raise Refusal(403, "Pages of other sites may not use this server.")
        if self._key is None or path in self._open:
            return
        key = headers.get(b"x-api-key", b"")
        scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            key = rest.strip()
        if not hmac.compare_digest(key, self._key):
            raise Refusal(401, "An API key is needed: Authorization: Bearer KEY.")

    # --- the protocol ---

    async def server_metadata(self, _: Request) -> JsonResponse[bodies.ServerMetadata]:
        """The server's name, version and extensions."""
        return JsonResponse(describe.server())

    async def server_live(self, _: Request) -> JsonResponse[bodies.ServerLive]:
        """Whether the server runs."""
        return JsonResponse({"live": True})

    async def server_ready(self, _: Request) -> JsonResponse[bodies.ServerReady]:
        """Whether every model answers."""
        ready = self.repository.ready
        return JsonResponse({"ready": ready}, 200 if ready else 503)

    async def all_stats(self, _: Request) -> JsonResponse[bodies.Statistics]:
        """Statistics of every model."""
        return JsonResponse({"model_stats": [describe.stats(model) for model in self.repository.models()]})

    def _model(self, request: Request) -> ServedModel:
        return self.repository.find(request.path_params["name"], request.path_params.get("version"))

    async def model_metadata(self, request: Request) -> JsonResponse[bodies.ModelMetadata]:
        """Names, datatypes and shapes of a model's tensors."""
        model, version = self._model(request), request.path_params.get("version")
        return JsonResponse(describe.metadata(model, [version] if version else self.repository.versions(model.name)))

    async def model_ready(self, request: Request) -> JsonResponse[bodies.ModelReady]:
        """Whether the model answers."""
        model = self._model(request)
        ready = model.ready and not self.repository.draining
        return JsonResponse({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def model_config(self, request: Request) -> JsonResponse[bodies.ModelConfig]:
        """Triton's model configuration."""
        return JsonResponse(describe.config(self._model(request)))

    async def model_stats(self, request: Request) -> JsonResponse[bodies.Statistics]:
        """Statistics of a model."""
        return JsonResponse({"model_stats": [describe.stats(self._model(request))]})

    async def infer(self, request: Request) -> Response:
        """Answer tensors."""
        self._admit(self._model(request))
        body = await read_body(request, self._max_body_bytes)
        header = request.scope["suanli.headers"].get(BINARY_HEADER)
        length = None
        if header is not None:
            if not header.isdigit() or len(header) > 12:
                raise bad_request(f"{HEADER_LENGTH} must be a number of bytes.")
            length = int(header)
        if (len(body) if length is None else length) > LARGE_JSON:
            infer_request = await asyncio.to_thread(codec.parse, body, length)
        else:
            infer_request = codec.parse(body, length)
        model = self._model(request)  # again, since a newer version may have taken its place meanwhile
        with _cancel_on_disconnect(request.scope):
            answer = await model.infer(infer_request)
        parts, json_length = codec.render(answer, infer_request)
        if json_length is None:
            return Response(parts[0], media_type="application/json")
        return Response(b"".join(parts), 200, {HEADER_LENGTH: str(json_length)}, "application/octet-stream")

    def _admit(self, model: ServedModel) -> None:
        try:
            model.admit()
        except Refusal as error:
            model.figures.count_failure(0.0, error.status)
            raise

    async def repository_index(self, request: Request) -> JsonResponse[list[bodies.ModelState]]:
        """All models with their states."""
        ready = (await read_object(request, self._max_body_bytes)).get("ready", False)
        if not isinstance(ready, bool):
            raise bad_request("ready must be true or false.")
        return JsonResponse([entry for entry in self.repository.index() if not ready or entry["state"] == "READY"])

    async def model_load(self, request: Request) -> JsonResponse[bodies.Nothing]:
        """Load a model, or load it again."""
        if (await read_object(request, self._max_body_bytes)).get("parameters"):
            raise bad_request("A model is loaded as its folder says: leave out the parameters.")
        await self.repository.load(request.path_params["name"])
        return JsonResponse({})

    async def model_unload(self, request: Request) -> JsonResponse[bodies.Nothing]:
        """Answer open requests, then unload the model."""
        await read_object(request, self._max_body_bytes)
        await self.repository.unload(request.path_params["name"])
        return JsonResponse({})

    # --- for the pages and people ---

    async def predict(self, request: Request) -> JsonResponse[bodies.Predictions]:
        """Answer files or texts as they are. One that can't be read has an error; if all are, the status is 400."""
        start = time.perf_counter()
        top, threshold = read_top(request.query_params), read_threshold(request.query_params)
        name = request.query_params.get("model")

        def find() -> ServedModel:
            version = request.query_params.get("version") or None
            return self.repository.find(name, version) if name else self.repository.single()

        model = find()
        self._admit(model)
        body = await read_body(request, self._max_body_bytes)
        names, raws = await read_inputs(body, request.headers.get("content-type", ""), model.preprocess)
        model = find()  # again, since a newer version may have taken its place meanwhile
        reason = None
        predictions: Sequence[Prediction]
        try:
            with _cancel_on_disconnect(request.scope):
                predictions = await model.predict(names, raws, top=top, threshold=threshold)
        except NothingReadable as error:
            predictions, reason = error.predictions, error.message
        values: bodies.Predictions = {
            "model": model.name,
            "version": model.version,
            "engine": model.info.engine,
            "precision": model.info.precision,
            "seconds": time.perf_counter() - start,
            "texts": [one.answer.text if one.answer else "" for one in predictions],
            "predictions": [cast(bodies.Prediction, one.to_json()) for one in predictions],
        }
        if reason is not None:
            values = bodies.Unreadable(**values, error=reason)
        return JsonResponse(values, 200 if reason is None else 400)

    async def status(self, _: Request) -> JsonResponse[bodies.Status]:
        """Status of the server and its models, which the pages show."""
        repository = self.repository
        models = [describe.status(model) for model in repository.models()]
        loaded = {(model["name"], model["version"]) for model in models}
        for entry in repository.index():  # also those that are being loaded, or could not be
            if (entry["name"], entry["version"]) not in loaded:
                state: bodies.State = "loading" if entry["state"] == "LOADING" else "failed"
                name, version, reason = entry["name"], entry["version"], entry["reason"]
                models.append({"name": name, "version": version, "state": state, "reason": reason, "classes": []})
        return JsonResponse(
            {
                "name": "suanli",
                "version": describe.version(),
                "ready": repository.ready,
                "draining": repository.draining,
                "uptime_s": time.monotonic() - self._started,
                "key_needed": self._key is not None,
                "models": models,
            }
        )

    async def metrics(self, _: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(self.repository), headers={"content-type": metrics.CONTENT_TYPE})

    async def openapi(self, _: Request) -> JsonResponse[dict[str, Any]]:
        """This document."""
        models = {name: self.repository.versions(name) for name in self.repository.names()}
        key_needed = self._key is not None
        return JsonResponse(await asyncio.to_thread(document, self.operations, key_needed=key_needed, models=models))

    async def page(self, request: Request) -> Response:
        """A page, or a file that it loads."""
        return pages.answer(request)


@contextlib.contextmanager
def _cancel_on_disconnect(scope: Scope) -> Iterator[None]:
    """Around waiting for an answer: cancels the request when its client disconnects."""
    task = asyncio.current_task()
    assert task is not None

    def cancel() -> None:
        scope["suanli.disconnected"] = True
        task.cancel()

    scope["suanli.on_disconnect"] = cancel
    try:
        yield
    finally:
        scope["suanli.on_disconnect"] = None


async def _refuse_path(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    if scope["path"].startswith("/v2/"):
        raise Refusal(404, "The protocol has no such path.")
    raise Refusal(404, "There is nothing here. See / and /v2.")


def _error_response(error: Refusal) -> JsonResponse[bodies.Error]:
    headers = {}
    if error.retry_after_s is not None:  # whole seconds, since the header has no others
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, WrongMethod):
        headers["allow"] = error.allowed
    return JsonResponse({"error": error.message}, error.status, headers)
