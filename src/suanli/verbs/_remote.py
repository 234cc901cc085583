"""Predictions from a server (`suanli serve`) instead of a model on this machine; files are sent as they are."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeAlias
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from suanli.core.answers import Answer
from suanli.core.errors import DataError, MachineError, UsageError
from suanli.core.types import Json
from suanli.engines.predictor import Prediction

TRIES = 5  # while the server is overloaded
WAIT_S = 120.0
Sendable: TypeAlias = bytes | str | Mapping[str, Json]
MOST_INPUTS = 256  # of one request
MAX_BYTES = 16_000_000  # of one request, unless one file is larger


class Server:
    """`url` is http://HOST:PORT, or that and /v2/models/NAME[/versions/V] where the server has several models."""

    def __init__(self, url: str) -> None:
        parts = _parse(url)
        path = parts.path.strip("/").split("/")
        match path:
            case [""]:
                self._name, self._version = None, None
            case ["v2", "models", name]:
                self._name, self._version = name, None
            case ["v2", "models", name, "versions", version]:
                self._name, self._version = name, version
            case _:
                raise UsageError(f"{url!r} names no model.", fix="End it with the port, or /v2/models/NAME.")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._connection = _connect(parts)
        key = os.environ.get("SUANLI_API_KEY", "").strip()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def close(self) -> None:
        self._connection.close()

    @cached_property
    def _model(self) -> Json:
        """What the server says of its model. Raises DataError where it has several, or none."""
        models = [m for m in self._ask("GET", "/status")["models"] if m["state"] in ("ready", "draining")]
        if self._name is not None:
            models = [m for m in models if m["name"] == self._name]
        names = sorted({m["name"] for m in models})
        if len(names) != 1:
            available = ", ".join(names) or "none"
            raise DataError(f"The models at {self.url} are: {available}.", fix="Name one: --url URL/v2/models/NAME.")
        return models[0]

    @property
    def kind(self) -> str:
        """Of the data that its model reads."""
        return str(self._model["kind"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._model["classes"])

    @cached_property
    def empty(self) -> Answer:
        """An answer without values."""
        values = self._model["answer"]
        return Answer(kind=values["kind"], text="", values=values["values"], columns=tuple(values["columns"]))

    def predict(
        self, names: Sequence[str], raws: Sequence[Sendable], *, top: int | None, threshold: float | None
    ) -> list[Prediction]:
        """One Prediction for each input, in their order. Raises MachineError where the server doesn't answer."""
        given = {"top": top, "threshold": threshold, "model": self._name, "version": self._version}
        query = {name: str(value) for name, value in given.items() if value is not None}
        predictions: list[Prediction] = []
        start = 0
        while start < len(raws):
            end, size = start, 0
            while end < min(len(raws), start + MOST_INPUTS) and (end == start or size + len(raws[end]) <= MAX_BYTES):
                size += len(raws[end])
                end += 1
            kind, body = _pack(raws[start:end])
            answer = self._ask("POST", f"/predict?{urlencode(query)}", body, {"Content-Type": kind})
            for name, values, text in zip(names[start:end], answer["predictions"], answer["texts"], strict=True):
                error, own = values["error"], {key: values[key] for key in self.empty.values}
                result = None if error is not None else replace(self.empty, text=text, values=own)
                flags = None if values.get("flags") is None else tuple(values["flags"])
                predictions.append(Prediction(name=name, answer=result, error=error, empty=self.empty, flags=flags))
            start = end
        return predictions

    def _ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Json:
        for attempt in range(TRIES):
            try:
                self._connection.request(method, path, body, self._headers | (headers or {}))
                reply = self._connection.getresponse()
                content = reply.read()
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                raise MachineError(
                    f"{self.url} doesn't answer ({error}).", fix="Is it running? suanli serve RUN starts it."
                ) from error
            try:
                values = json.loads(content)
            except ValueError:
                values = {}
            if reply.status == 200 or (isinstance(values, dict) and "predictions" in values):
                return values  # if none of the inputs can be read, the status is 400, and each has an error
            message = values.get("error") if isinstance(values, dict) else None
            if reply.status != 503 or attempt == TRIES - 1:
                raise _error(self.url, reply.status, message or reply.reason)
            again = reply.headers.get("Retry-After", "1")
            time.sleep(min(float(again) if again.isdigit() else 1.0, 10.0))
        raise AssertionError("the last try returns or raises")


def _parse(url: str) -> SplitResult:
    """Raises UsageError for what isn't the address of a server."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port that is no number
        pass
    raise UsageError(f"{url!r} is not the address of a server.", fix="Such as http://127.0.0.1:8000.")


def _connect(parts: SplitResult) -> http.client.HTTPConnection:
    """A connection that opens with the first request."""
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=WAIT_S, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, port, timeout=WAIT_S)


def _error(url: str, status: int, message: str) -> MachineError | UsageError:
    if status == 401:
        return UsageError(f"{url} needs an API key.", fix="Put it into $SUANLI_API_KEY.")
    if status < 500:
        return UsageError(f"{url} refused: {message}", fix="See its page /health.")
    return MachineError(f"{url} could not answer: {message}", fix="Try again later; see its page /health.")


def _pack(raws: Sequence[Sendable]) -> tuple[str, bytes]:
    """Content type and body: texts and rows as JSON, files as a form."""
    rows = [dict(raw) for raw in raws if isinstance(raw, Mapping)]
    if rows and len(rows) == len(raws):
        return "application/json", json.dumps({"rows": rows}).encode()
    if all(isinstance(raw, str) for raw in raws):
        return "application/json", json.dumps({"inputs": list(raws)}).encode()
    boundary = secrets.token_hex(16)
    parts: list[bytes] = []
    for i, raw in enumerate(raws):
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{quote(str(i))}"\r\n\r\n'
        parts += [head.encode(), raw if isinstance(raw, bytes) else str(raw).encode(), b"\r\n"]
    return f"multipart/form-data; boundary={boundary}", b"".join([*parts, f"--{boundary}--\r\n".encode()])
