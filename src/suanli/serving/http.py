"""HTTP: the Open Inference Protocol, pictures for people, metrics and pages, as one ASGI application.

Starlette finds the endpoint. Around that are a request's identity and its line in the log, who may ask, and refusals in
JSON. Where a model has too much to do, the refusal is sent before the body is read.

What this doesn't do: listen (see `server`), batch (see `batching`), or gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from suanli.serving import bodies, describe, metrics, pages, protocol
from suanli.serving.forms import read_inputs
from suanli.serving.log import Log
from suanli.serving.model import ServedModel
from suanli.serving.openapi import JsonResponse, Operation, WrongMethod, document
from suanli.serving.protocol import HEADER_LENGTH, Refusal, bad_request
from suanli.serving.repository import Repository

BINARY_HEADER = HEADER_LENGTH.lower().encode()
LARGE_JSON = 1 << 18  # bytes: read in a thread, so that others are answered meanwhile
Top = Annotated[int, Field(ge=1, le=10_000, description="So many of the likeliest classes; 5 where it isn't said.")]
JsonLength = Annotated[
    int, Field(ge=0, description="Where the JSON ends and the tensors' bytes begin; 0: all is one picture or text.")
]
PREDICT = {  # what it may be asked with
    "multipart/form-data": bodies.Files,
    "image/*": bytes,
    "application/octet-stream": bytes,
    "application/json": bodies.Texts,
    "text/plain": bodies.Text,
}


class App:
    """The ASGI application. `host_names`: the names by which it may be addressed; None: any."""

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
        self._hosts = host_names
        self._numbers = count(1)
        self._prefix = f"{time.time_ns() // 1000:x}"
        self._started = time.monotonic()
        self.operations = self._list_operations()
        self._open = {operation.path for operation in self.operations if operation.open_to_all}
        self._router = Router(self.operations, redirect_slashes=False, default=_refuse_path)

    def _list_operations(self) -> list[Operation]:
        """All that can be asked. A path of models is there with a version and without."""
        models = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        page: dict[str, Any] = {"open_to_all": True, "include_in_schema": False}
        infer: dict[str, Any] = {
            "body": {"application/json": bodies.InferRequest, "application/octet-stream": bytes},
            "answer": {"application/json": bodies.InferResponse, "application/octet-stream": bytes},
            "parameters": {("header", HEADER_LENGTH): JsonLength},
        }
        index: dict[str, Any] = {"body": {"application/json": bodies.IndexRequest}, "body_required": False}
        change: dict[str, Any] = {"body": {"application/json": dict[str, Any]}, "body_required": False}
        asked = {("query", "top"): Top, ("query", "model"): str, ("query", "version"): str}
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
            Operation("POST /predict", self.predict, body=PREDICT, parameters=asked),
            Operation("GET /status", self.status, open_to_all=True),
            Operation("GET /metrics", self.metrics, answer={"text/plain": str}),
            Operation("GET /openapi.json", self.openapi),
            *(Operation(f"GET {path}", self.page, **page) for path in pages.files()),
        ]

    # --- around every request ---

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        headers = scope["suanli.headers"] = dict(scope["headers"])
        identity = self._request_id(headers)
        reason = ""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-request-id", identity.encode()))
                self._log_request(scope, identity, started, message["status"], reason)
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
            self._log_request(scope, identity, started, 499)
        except Exception as error:  # noqa: BLE001  # one request must not harm the others; the log has the reason
            self.log.error("request failed", request_id=identity, path=scope["path"], reason=repr(error)[:500])
            await _error_response(Refusal(500, "This was not foreseen; the server's log says more."))(
                scope, receive, answer
            )

    def _request_id(self, headers: Mapping[bytes, bytes]) -> str:
        """Of a request, in its answer and in the log: the client's, if it is a plain word."""
        given = headers.get(b"x-request-id", b"")
        if given and len(given) <= 128 and given.isascii() and given.replace(b"-", b"").replace(b"_", b"").isalnum():
            return given.decode()
        return f"{self._prefix}-{next(self._numbers)}"

    def _log_request(self, scope: Scope, identity: str, started: float, status: int, reason: str = "") -> None:
        """A line in the log: for an engine that failed, and for each request where that is wanted."""
        failed = status == 500 and reason != ""
        if not failed and not self.log.requests:
            return
        say = self.log.error if failed else self.log.event
        ms = round(1e3 * (time.perf_counter() - started), 3)
        more = {"reason": reason[:500]} if reason else {}
        say("request", request_id=identity, method=scope["method"], path=scope["path"], status=status, ms=ms, **more)

    def _check_access(self, path: str, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raises Refusal for who may not ask: without the key, or by a foreign page in the user's browser."""
        if self._hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            try:
                name = urlsplit(f"//{host}").hostname or ""
            except ValueError:  # half an IPv6 address
                name = ""
            if name not in self._hosts:
                raise Refusal(421, "This server is addressed by another name. Its owner can allow it with --host.")
        origin = headers.get(b"origin")
        own = headers.get(b"host", b"")
        if origin is not None and method not in ("GET", "HEAD") and origin.partition(b"://")[2] != own:
            raise Refusal(403, "Pages of other sites can't ask this server.")
        if self._key is None or path in self._open:
            return
        given = headers.get(b"x-api-key", b"")
        scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = rest.strip()
        if not hmac.compare_digest(given, self._key):
            raise Refusal(401, "An API key is needed: Authorization: Bearer KEY.")

    # --- the protocol ---

    async def server_metadata(self, _: Request) -> JsonResponse[bodies.ServerMetadata]:
        """About the server."""
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
        """Names, datatypes and shapes."""
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
        """Statistics."""
        return JsonResponse({"model_stats": [describe.stats(self._model(request))]})

    async def infer(self, request: Request) -> Response:
        """Answers for tensors."""
        self._admit(self._model(request))
        body = await self._body(request)
        given = request.scope["suanli.headers"].get(BINARY_HEADER)
        length = None
        if given is not None:
            if not given.isdigit() or len(given) > 12:
                raise bad_request(f"{HEADER_LENGTH} is a number of bytes.")
            length = int(given)
        if (len(body) if length is None else length) > LARGE_JSON:
            asked = await asyncio.to_thread(protocol.parse, body, length)
        else:
            asked = protocol.parse(body, length)
        model = self._model(request)  # again: another may have taken its place meanwhile
        with _cancel_on_disconnect(request.scope):
            answer = await model.infer(asked)
        parts, head = protocol.render(answer, asked)
        if head is None:
            return Response(parts[0], media_type="application/json")
        return Response(b"".join(parts), 200, {HEADER_LENGTH: str(head)}, "application/octet-stream")

    def _admit(self, model: ServedModel) -> None:
        try:
            model.admit()
        except Refusal as error:
            model.figures.count_failure(0.0, error.status)
            raise

    async def repository_index(self, request: Request) -> JsonResponse[list[bodies.ModelState]]:
        """Models and states."""
        ready = (await self._object(request)).get("ready", False)
        if not isinstance(ready, bool):
            raise bad_request("ready is true or false.")
        return JsonResponse([entry for entry in self.repository.index() if not ready or entry["state"] == "READY"])

    async def model_load(self, request: Request) -> JsonResponse[bodies.Nothing]:
        """Load a model, or load it again."""
        if (await self._object(request)).get("parameters"):
            raise bad_request("A model is loaded as its folder says: parameters can't be given.")
        await self.repository.load(request.path_params["name"])
        return JsonResponse({})

    async def model_unload(self, request: Request) -> JsonResponse[bodies.Nothing]:
        """Answer what was asked, and unload."""
        await self._object(request)
        await self.repository.unload(request.path_params["name"])
        return JsonResponse({})

    # --- for people ---

    async def predict(self, request: Request) -> JsonResponse[bodies.Predictions]:
        """Names what is in pictures or texts."""
        started = time.perf_counter()
        top = request.query_params.get("top") or "5"
        if not top.isdecimal() or not 1 <= int(top[:9]) <= 10_000:
            raise bad_request("top is a number of 1 or more.")
        named = request.query_params.get("model")

        def find() -> ServedModel:
            version = request.query_params.get("version") or None
            return self.repository.find(named, version) if named else self.repository.single()

        model = find()
        self._admit(model)
        body = await self._body(request)
        names, raws = await read_inputs(body, request.headers.get("content-type", ""), model.preprocess.kind)
        model = find()  # again: another may have taken its place meanwhile
        with _cancel_on_disconnect(request.scope):
            found = await model.predict(names, raws, top=int(top[:9]))
        return JsonResponse(
            {
                "model": model.name,
                "version": model.version,
                "engine": model.info.engine,
                "precision": model.info.precision,
                "seconds": time.perf_counter() - started,
                "predictions": found,
            }
        )

    async def status(self, _: Request) -> JsonResponse[bodies.Status]:
        """What the pages show."""
        repository = self.repository
        models = [describe.status(model) for model in repository.models()]
        there = {(model["name"], model["version"]) for model in models}
        for entry in repository.index():  # what is being loaded, or could not be
            if (entry["name"], entry["version"]) not in there:
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
        """Figures for Prometheus."""
        return Response(metrics.text(self.repository), headers={"content-type": metrics.CONTENT_TYPE})

    async def openapi(self, _: Request) -> JsonResponse[dict[str, object]]:
        """This document."""
        models = {name: self.repository.versions(name) for name in self.repository.names()}
        key_needed = self._key is not None
        found = await asyncio.to_thread(document, self.operations, key_needed=key_needed, models=models)
        return JsonResponse(found)

    async def page(self, request: Request) -> Response:
        """A page, or what it loads."""
        return pages.answer(request)

    # --- bodies ---

    async def _object(self, request: Request) -> dict[str, object]:
        """What a body says that may be left out."""
        body = await self._body(request)
        values = protocol.parse_json(body) if body else {}
        if not isinstance(values, dict):
            raise bad_request("The body is a JSON object, or empty.")
        return values

    async def _body(self, request: Request) -> bytes:
        """All of it. Raises Refusal(413) for one that is too large, or (499) where it doesn't come. It isn't read with
        Starlette's `stream`, which costs as much as reading a small request."""
        headers, limit = request.scope["suanli.headers"], self._max_body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:15]) > limit:
            raise Refusal(413, f"The body is larger than {limit} bytes.")
        parts: list[bytes] = []
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Refusal(499, "The client has left.")
            parts.append(message["body"])
            if request.scope.get("suanli.too_large") or sum(map(len, parts)) > limit:
                raise Refusal(413, f"The body is larger than {limit} bytes.")
            more = message["more_body"]
        body = b"".join(parts)
        coding = headers.get(b"content-encoding", b"identity").lower()
        return body if coding == b"identity" else _decompress(body, coding.decode("latin-1"), limit)


@contextlib.contextmanager
def _cancel_on_disconnect(scope: Scope) -> Iterator[None]:
    """While a request waits for its answer: when its client leaves, it is withdrawn."""
    task = asyncio.current_task()
    assert task is not None

    def left() -> None:
        scope["suanli.disconnected"] = True
        task.cancel()

    scope["suanli.on_disconnect"] = left
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


def _decompress(body: bytes, coding: str, limit: int) -> bytes:
    """A compressed body. Raises Refusal(413) for one that grows beyond the limit."""
    modes = {"gzip": 31, "deflate": 15}
    if coding not in modes:
        raise Refusal(415, f"The content encoding {coding[:40]} can't be read here.")
    try:
        return protocol.decompress(body, limit, wbits=modes[coding])
    except zlib.error as error:
        raise bad_request(f"The body can't be decompressed: {error}.") from None
