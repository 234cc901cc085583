"""HTTP: the Open Inference Protocol, pictures for people, metrics and pages, as one ASGI application.

`POST …/infer` is what must be fast, so there is no framework between it and the socket: a path is split, a body is read
once, an answer is sent. Where a model has too much to do, the refusal is sent before the body is read. Everything else
(`/predict`, pages) is rare.

What this doesn't do: listen (see `server`), batch (see `batching`), or gRPC.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from suanli.serving import describe, metrics, openapi, pages, protocol
from suanli.serving.log import Log
from suanli.serving.model import ServedModel
from suanli.serving.protocol import HEADER_LENGTH, Refused, bad
from suanli.serving.repository import Repository
from suanli.types import Json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Reply = tuple[int, Headers, bytes]

LARGE_JSON = 1 << 18  # bytes: read in a thread, so that others are answered meanwhile
FILES = 256  # of one request for people
OPEN = ("/", "/health", "/status", "/v2/health/live", "/v2/health/ready")  # to whoever has no key
OWN = ("/status", "/metrics", "/openapi.json")
ABOUT: tuple[list[str], ...] = ([], ["ready"], ["config"], ["stats"])  # what there is below a model
BINARY_HEADER = HEADER_LENGTH.lower().encode()


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        identity = self._identity(headers)
        try:
            status, more, body = await self._answer(scope, headers, receive)
        except Refused as error:
            status, more, body = _refusal(error)
            self._failed(scope, identity, started, error)
        except asyncio.CancelledError:
            if not scope.get("suanli.gone"):
                raise
            if self.log.requests:
                self._told(scope, identity, started, 499, "info")
            return
        except Exception as error:  # noqa: BLE001  # one request must not harm the others; the log has the reason
            status, more, body = _refusal(Refused(500, "This was not foreseen; the server's log says more."))
            self.log.error("request failed", request_id=identity, path=scope["path"], reason=repr(error)[:500])
        else:
            if self.log.requests:
                self._told(scope, identity, started, status, "info")
        head = [(b"content-length", b"%d" % len(body)), (b"x-request-id", identity.encode()), *more]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _identity(self, headers: Mapping[bytes, bytes]) -> str:
        """Of a request, in its answer and in the log: the client's, if it is a plain word."""
        given = headers.get(b"x-request-id", b"")
        if given and len(given) <= 128 and given.isascii() and given.replace(b"-", b"").replace(b"_", b"").isalnum():
            return given.decode()
        return f"{self._prefix}-{next(self._numbers)}"

    def _failed(self, scope: Scope, identity: str, started: float, error: Refused) -> None:
        level = "error" if error.status == 500 else "info"
        if level == "error" or self.log.requests:
            self._told(scope, identity, started, error.status, level, reason=error.message[:500])

    def _told(self, scope: Scope, identity: str, started: float, status: int, level: str, **more: Json) -> None:
        say = self.log.error if level == "error" else self.log.event
        ms = round(1e3 * (time.perf_counter() - started), 3)
        say("request", request_id=identity, method=scope["method"], path=scope["path"], status=status, ms=ms, **more)

    # --- where to ---

    async def _answer(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Reply:
        path, method = scope["path"], scope["method"]
        self._guard(path, method, headers)
        parts = [unquote(part) for part in scope["raw_path"].decode("ascii").strip("/").split("/")]
        if parts[0] == "v2":
            return await self._v2(parts[1:], scope, headers, receive)
        if path == "/predict":
            _allow(method, "POST")
            return await self._predict(scope, headers, receive)
        if path not in OWN and pages.page(path) is None:
            raise Refused(404, "There is nothing here. See / and /v2.")
        _allow(method, "GET")
        if path == "/status":
            return _json(self.status())
        if path == "/metrics":
            return 200, [(b"content-type", metrics.CONTENT_TYPE.encode())], metrics.text(self.repository)
        if path == "/openapi.json":
            models = {name: self.repository.versions(name) for name in self.repository.names()}
            return _json(openapi.document(key_needed=self._key is not None, models=models))
        return _page(path, headers)

    def _guard(self, path: str, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raises Refused for who may not ask: without the key, or by a foreign page in the user's browser."""
        if self._hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            try:
                name = urlsplit(f"//{host}").hostname or ""
            except ValueError:  # half an IPv6 address
                name = ""
            if name not in self._hosts:
                raise Refused(421, "This server is addressed by another name. Its owner can allow it with --host.")
        origin = headers.get(b"origin")
        own = headers.get(b"host", b"")
        if origin is not None and method not in ("GET", "HEAD") and origin.partition(b"://")[2] != own:
            raise Refused(403, "Pages of other sites can't ask this server.")
        if self._key is None or path in OPEN or path.startswith("/page/"):
            return
        given = headers.get(b"x-api-key", b"")
        scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = rest.strip()
        if not hmac.compare_digest(given, self._key):
            raise Refused(401, "An API key is needed: Authorization: Bearer KEY.")

    async def _v2(self, parts: list[str], scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Reply:
        method = scope["method"]
        match parts:
            case ["models", name, "infer"]:
                return await self._infer(name, None, scope, headers, receive)
            case ["models", name, "versions", version, "infer"]:
                return await self._infer(name, version, scope, headers, receive)
            case [] | [""]:
                _allow(method, "GET")
                return _json(describe.server())
            case ["health", "live"]:
                _allow(method, "GET")
                return _json({"live": True})
            case ["health", "ready"]:
                _allow(method, "GET")
                ready = self.repository.ready
                return _json({"ready": ready}, 200 if ready else 503)
            case ["models", "stats"]:
                _allow(method, "GET")
                return _json({"model_stats": [model.stats() for model in self.repository.models()]})
            case ["models", name, *rest] if name:
                chosen = None
                if len(rest) >= 2 and rest[0] == "versions":
                    chosen, rest = rest[1], rest[2:]
                if rest in ABOUT:
                    _allow(method, "GET")
                return self._about(self.repository.find(name, chosen), chosen, rest)
            case ["repository", *rest]:
                _allow(method, "POST")
                return await self._repository(rest, scope, headers, receive)
        raise Refused(404, "The protocol has no such path.")

    def _about(self, model: ServedModel, version: str | None, rest: list[str]) -> Reply:
        match rest:
            case []:
                versions = self.repository.versions(model.name) if version is None else [version]
                return _json(model.metadata(versions))
            case ["ready"]:
                ready = model.ready and not self.repository.draining
                return _json({"name": model.name, "ready": ready}, 200 if ready else 503)
            case ["config"]:
                return _json(model.config())
            case ["stats"]:
                return _json({"model_stats": [model.stats()]})
        raise Refused(404, "The protocol has no such path.")

    async def _repository(
        self, parts: list[str], scope: Scope, headers: Mapping[bytes, bytes], receive: Receive
    ) -> Reply:
        asked = _object(await self._body(scope, headers, receive))
        match parts:
            case ["index"]:
                ready = asked.get("ready", False)
                if not isinstance(ready, bool):
                    raise bad("ready is true or false.")
                return _json([entry for entry in self.repository.index() if not ready or entry["state"] == "READY"])
            case ["models", name, "load"] if name:
                if asked.get("parameters"):
                    raise bad("A model is loaded as its folder says: parameters can't be given.")
                await self.repository.load(name)
                return _json({})
            case ["models", name, "unload"] if name:
                await self.repository.unload(name)
                return _json({})
        raise Refused(404, "The protocol has no such path.")

    # --- answering ---

    async def _infer(
        self, name: str, version: str | None, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive
    ) -> Reply:
        _allow(scope["method"], "POST")
        self._admit(self.repository.find(name, version))
        body = await self._body(scope, headers, receive)
        given = headers.get(BINARY_HEADER)
        length = None
        if given is not None:
            if not given.isdigit() or len(given) > 12:
                raise bad(f"{HEADER_LENGTH} is a number of bytes.")
            length = int(given)
        if (len(body) if length is None else length) > LARGE_JSON:
            request = await asyncio.to_thread(protocol.parse, body, length)
        else:
            request = protocol.parse(body, length)
        model = self.repository.find(name, version)  # again: another may have taken its place meanwhile
        with _Leaving(scope):
            response = await model.infer(request)
        parts, head = protocol.render(response, request)
        if head is None:
            return 200, [(b"content-type", b"application/json")], parts[0]
        more = [(b"content-type", b"application/octet-stream"), (BINARY_HEADER, b"%d" % head)]
        return 200, more, b"".join(parts)

    def _admit(self, model: ServedModel) -> None:
        try:
            model.admit()
        except Refused as error:
            model.figures.not_done(0.0, error.status)
            raise

    async def _predict(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> Reply:
        started = time.perf_counter()
        query = parse_qs(scope["query_string"].decode("latin-1"))
        asked = {key: values[-1] for key, values in query.items()}
        top = asked.get("top", "5")
        if not top.isdecimal() or not 1 <= int(top[:9]) <= 10_000:
            raise bad("top is a number of 1 or more.")
        named = asked.get("model")

        def find() -> ServedModel:
            return self.repository.only() if named is None else self.repository.find(named, asked.get("version"))

        model = find()
        self._admit(model)
        body = await self._body(scope, headers, receive)
        kind = headers.get(b"content-type", b"").decode("latin-1")
        names, raws = await _inputs(body, kind, model.preprocess.kind)
        model = find()  # again: another may have taken its place meanwhile
        with _Leaving(scope):
            found = await model.predict(raws, top=int(top[:9]))
        return _json(
            {
                "model": model.name,
                "version": model.version,
                "engine": model.about.engine,
                "precision": model.about.precision,
                "seconds": time.perf_counter() - started,
                "predictions": [values | {"name": name} for name, values in zip(names, found, strict=True)],
            }
        )

    async def _body(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """All of it. Raises Refused(413) for one that is too large, or (499) where it doesn't come."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:15]) > self._max_body_bytes:
            raise Refused(413, f"The body is larger than {self._max_body_bytes} bytes.")
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(499, "The client has left.")
            parts.append(message["body"])
            if scope.get("suanli.too_large") or sum(map(len, parts)) > self._max_body_bytes:
                raise Refused(413, f"The body is larger than {self._max_body_bytes} bytes.")
            if not message["more_body"]:
                break
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        coding = headers.get(b"content-encoding", b"identity").lower()
        return body if coding == b"identity" else _unpacked(body, coding, self._max_body_bytes)

    def status(self) -> dict[str, Json]:
        """For the pages: no secret is in it."""
        repository = self.repository
        models = [model.status() for model in repository.models()]
        there = {(model["name"], model["version"]) for model in models}
        for entry in repository.index():  # what is being loaded, or could not be
            if (entry["name"], entry["version"]) not in there:
                state = "loading" if entry["state"] == "LOADING" else "failed"
                models.append({"name": entry["name"], "version": entry["version"], "state": state,
                               "reason": entry["reason"], "classes": []})  # fmt: skip
        return {
            "name": "suanli",
            "version": describe.version(),
            "ready": repository.ready,
            "draining": repository.draining,
            "uptime_s": time.monotonic() - self._started,
            "key_needed": self._key is not None,
            "models": models,
        }


class _Leaving:
    """While a request waits for its answer: when its client leaves, it is withdrawn."""

    def __init__(self, scope: Scope) -> None:
        self._scope, self._task = scope, asyncio.current_task()

    def __enter__(self) -> None:
        self._scope["suanli.left"] = self._gone

    def __exit__(self, *_: object) -> None:
        self._scope["suanli.left"] = None

    def _gone(self) -> None:
        self._scope["suanli.gone"] = True
        assert self._task is not None
        self._task.cancel()


async def _inputs(body: bytes, kind: str, wanted: str) -> tuple[list[str], list[bytes | str]]:
    """Names and raw inputs of a request by people. Raises Refused(400), or (415)."""
    media, _, _ = kind.partition(";")
    media = media.strip().lower()
    if not body:
        raise bad("The body is empty.")
    if media == "multipart/form-data":
        return await _files(body, kind, wanted)
    if media == "application/json":
        values = protocol.parse_json(body)
        texts = values.get("inputs") if isinstance(values, dict) else None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise bad('The body is {"inputs": ["a text", …]}.')
        if wanted == "image":
            raise Refused(415, "This model reads pictures: send files, as multipart/form-data, or one as it is.")
        if len(texts) > FILES:
            raise bad(f"{len(texts)} texts are more than {FILES}.")
        return [f"#{i}" for i in range(len(texts))], texts
    if media == "application/x-www-form-urlencoded" and wanted == "image":  # what curl says of --data-binary
        media = ""
    if media in ("", "application/octet-stream") or media.split("/")[0] == {"image": "image"}.get(wanted, "text"):
        return ["#0"], [body]
    raise Refused(415, f"{media[:100]} can't be read here.")


async def _files(body: bytes, kind: str, wanted: str) -> tuple[list[str], list[bytes | str]]:
    from starlette.datastructures import Headers as FormHeaders
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> Any:
        yield body

    form = FormHeaders({"content-type": kind})
    try:
        parser = MultiPartParser(form, stream(), max_files=FILES, max_fields=FILES, max_part_size=1 << 20)
        parts = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise bad(f"The form can't be read: {str(error)[:200]}.") from None
    names: list[str] = []
    raws: list[bytes | str] = []
    try:
        for _, part in parts.multi_items():
            if isinstance(part, UploadFile):
                names.append(part.filename or f"#{len(names)}")
                raws.append(await part.read())
            elif wanted == "text":
                names.append(f"#{len(names)}")
                raws.append(part)
    finally:
        await parts.close()
    if not raws:
        raise bad("The form has no file.")
    return names, raws


def _unpacked(body: bytes, coding: bytes, limit: int) -> bytes:
    """A compressed body. Raises Refused(413) for one that grows beyond the limit."""
    modes = {b"gzip": 31, b"deflate": 15}
    if coding not in modes:
        raise Refused(415, f"The content encoding {coding.decode('latin-1')[:40]} can't be read here.")
    try:
        return protocol.inflated(body, limit, wbits=modes[coding])
    except zlib.error as error:
        raise bad(f"The body can't be decompressed: {error}.") from None


def _page(path: str, headers: Mapping[bytes, bytes]) -> Reply:
    page = pages.page(path)
    assert page is not None
    more = [(name.lower().encode(), value.encode()) for name, value in pages.headers(path).items()]
    tag = headers.get(b"if-none-match")
    if tag is not None and pages.is_current(path, tag.decode("latin-1")):
        return 304, more, b""
    return 200, more, page[0]


def _object(body: bytes) -> dict[str, Json]:
    """What a body says that may be left out."""
    values = protocol.parse_json(body) if body else {}
    if not isinstance(values, dict):
        raise bad("The body is a JSON object, or empty.")
    return values


class _WrongMethod(Refused):
    def __init__(self, allowed: str) -> None:
        super().__init__(405, f"This takes {allowed}.")
        self.allowed = "GET, HEAD" if allowed == "GET" else allowed


def _allow(method: str, allowed: str) -> None:
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        raise _WrongMethod(allowed)


def _json(values: Json, status: int = 200) -> Reply:
    body = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")
    return status, [(b"content-type", b"application/json")], body


def _refusal(error: Refused) -> Reply:
    status, more, body = _json({"error": error.message}, error.status)
    if error.retry_after_s is not None:  # whole seconds, since the header has no others
        more.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if error.status == 401:
        more.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, _WrongMethod):
        more.append((b"allow", error.allowed.encode()))
    return status, more, body
