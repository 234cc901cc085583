"""What tests send to a server byte by byte, and what they read of its answers and its processes.

The model is `odd`, whose engine is that of `hostile`.
"""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hostile import labels, request
from served import Answer, Served

INFER = "/v2/models/odd/infer"


def answered(server: Served, *orders: tuple[int, ...], **parameters: object) -> list[int] | int:
    """Classes, or the status of the refusal."""
    return read(server.ask("POST", INFER, *request(*orders, **parameters)))


def read(answer: Answer) -> list[int] | int:
    if answer.status != 200:
        assert isinstance(answer.json()["error"], str)
        return answer.status
    return labels(answer.body)


def odd(server: Served) -> dict[str, Any]:
    """What the server says of the model."""
    result: dict[str, Any] = server.ask("GET", "/status").json()["models"][0]
    return result


def children(pid: int) -> set[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return {int(child) for child in text.split() if is_there(int(child))}


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors(server: Served) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


class Raw:
    """A connection that sends any bytes, and reads answers one by one."""

    def __init__(self, server: Served) -> None:
        self.socket = socket.create_connection((server.host, server.port), timeout=30)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Answer:
        """The next one. Raises EOFError where there is none."""
        line = self._file.readline()
        if not line:
            raise EOFError
        assert line.startswith(b"HTTP/1.1 "), line
        headers: dict[str, str] = {}
        while (header := self._file.readline().strip()) != b"":
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = self._file.read(int(headers.get("content-length", "0")))
        return Answer(int(line.split()[1]), headers, body)

    def is_closed(self) -> bool:
        """Whether the other side ends it, within the socket's time, and says nothing more."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


def message(*orders: tuple[int, ...], path: str = INFER, headers: str = "", **parameters: object) -> bytes:
    """A request as it goes over the wire."""
    body, more = request(*orders, **parameters)
    lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}{headers}Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def file_of(picture: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind)
    return stream.getvalue()
