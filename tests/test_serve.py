"""What a server must survive, and its life: real sockets, real signals and an engine that misbehaves on demand."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hostile import (
    CLASSES,
    DIES,
    EXITS,
    GOOD,
    HANGS,
    HOLDS,
    NAN,
    SHAPE,
    SLEEPS,
    THROWS,
    engines,
    labels,
    pictures,
    request,
    room,
)
from served import Answer, Served, serving, until
from suanli.errors import DataError, UsageError
from suanli.verbs.serve import serve

INFER = "/v2/models/odd/infer"
BODY_LIMIT = 1_000_000


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with room() as found:
        yield found


@pytest.fixture(scope="module")
def everyones(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Served]:
    """One server for all faults of clients: each has to leave it as it was."""
    subject = engines(tmp_path_factory.mktemp("everyones") / "odd")
    with serving(subject, "--max-body-mb", "1", "--log-requests", environment=environment) as server:
        yield server


@pytest.fixture
def server(everyones: Served) -> Iterator[Served]:
    """It, which is checked afterwards."""
    yield everyones
    assert everyones.process.poll() is None, everyones.log()
    assert answered(everyones, (GOOD, 7)) == [7]
    until(everyones.ready, within_s=20, what="ready again")
    assert odd(everyones)["waiting"] == 0


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
    found: dict[str, Any] = server.ask("GET", "/status").json()["models"][0]
    return found


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
    """A connection that sends whatever it is told to, and reads answers one by one."""

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
    told = "".join(f"{name}: {value}\r\n" for name, value in more.items())
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{told}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )


# --- clients that send nonsense, or not all ---


def test_who_sends_slowly_or_half_of_it_is_cut_off_and_others_are_answered(server: Served) -> None:
    whole = message((GOOD, 1))
    head, _, body = whole.partition(b"\r\n\r\n")
    large = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" % INFER.encode()
    begun = {
        "nothing": b"",
        "half of the headers": head[:40],
        "only headers": head + b"\r\n\r\n",
        "half of the body": head + b"\r\n\r\n" + body[:20],
        "a body that is said to be large": large + b"x" * 20,
        "half of the chunks": b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe"
        % INFER.encode(),
    }
    with contextlib.ExitStack() as stack:
        raws = {what: stack.enter_context(Raw(server)) for what in begun}
        for what, data in begun.items():
            raws[what].send(data)
        trickle = stack.enter_context(Raw(server))
        trickle.send(head + b"\r\n\r\n")
        started = time.monotonic()
        closed: dict[str, float] = {}
        trickled = 0
        while len(closed) < len(begun) + 1 and time.monotonic() - started < 25:
            assert answered(server, (GOOD, 4)) == [4]
            with contextlib.suppress(OSError):
                if trickled < len(body) - 1:  # a byte now and then, never the last one
                    trickle.send(body[trickled : trickled + 1])
                    trickled += 1
            for what, raw in {**raws, "a byte now and then": trickle}.items():
                if what not in closed:
                    raw.socket.settimeout(0.05)
                    if raw.is_closed():
                        closed[what] = time.monotonic() - started
        assert closed.keys() == {*begun, "a byte now and then"}
        assert max(closed.values()) < 20, closed
    until(lambda: len(server.ask("GET", "/v2").body) > 0, within_s=5, what="an answer")


def test_one_byte_at_a_time_is_a_request_too(server: Served) -> None:
    with Raw(server) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in message((GOOD, 3), (GOOD, 5)):
            raw.send(bytes([byte]))
        assert read(raw.answer()) == [3, 5]


def test_who_leaves_in_the_middle_of_a_body_or_before_the_answer_is_forgotten(server: Served) -> None:
    with Raw(server) as raw:
        raw.send(message((GOOD, 1))[:-5])
    slow = Raw(server)
    slow.send(message((SLEEPS, 1, 150)))
    until(lambda: odd(server)["waiting"] == 0, within_s=5, what="the engine has it")
    time.sleep(0.1)
    leaving = [Raw(server) for _ in range(5)]
    for raw in leaving:
        raw.send(message((GOOD, 2)))
    until(lambda: odd(server)["waiting"] == 5, within_s=1.2, what="five that wait")
    for raw in leaving:
        raw.__exit__()
    until(lambda: odd(server)["waiting"] == 0, within_s=1.2, what="none that wait")
    assert read(slow.answer()) == [1]
    slow.__exit__()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: Served) -> None:
    with Raw(server) as raw:
        raw.send(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n" % INFER.encode())
        assert raw.answer().status == 413
    with Raw(server) as raw:  # also where it is not said how long it is
        raw.send(b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode())
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                raw.send(chunk)
                sent += 0x10000
        assert raw.answer().status == 413
    answer = server.ask("POST", INFER, b"x" * (BODY_LIMIT + 1))
    assert answer.status == 413
    assert str(BODY_LIMIT) in answer.json()["error"]
    assert server.ask("POST", "/predict", b"x" * (BODY_LIMIT + 1), {"Content-Type": "image/png"}).status == 413


def test_a_large_body_sent_whole_still_gets_its_refusal_on_a_connection_that_goes_on(server: Served) -> None:
    with Raw(server) as raw:
        raw.send(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n\r\n" % INFER.encode())
        for _ in range(20):
            raw.send(b"x" * 1_000_000)
        assert raw.answer().status == 413
        raw.send(message((GOOD, 2)))
        assert read(raw.answer()) == [2]


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: -5\r\n",
        "Content-Length: many\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 99999999999999999999999999\r\n",
        "Transfer-Encoding: nonsense\r\n",
        "A header without a colon\r\n",
        "Bad\x00Name: 1\r\n",
    ],
)
def test_headers_that_contradict_are_refused(server: Served, headers: str) -> None:
    with Raw(server) as raw:
        raw.send(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\nhello".encode())
        answer = raw.answer()
        assert 400 <= answer.status < 500
        assert isinstance(answer.json()["error"], str)


def test_a_body_that_is_longer_than_said_ends_the_connection_after_the_answer(server: Served) -> None:
    with Raw(server) as raw:
        raw.send(message((GOOD, 4)) + b"\x00\x01 more that nobody announced\r\n\r\n")
        assert read(raw.answer()) in ([4], 400)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                assert raw.answer().status == 400


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),  # TLS to a port without
        b"\r\n\r\n\r\n\x00\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET nothing HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % INFER.encode(),
    ],
)
def test_what_is_no_http_gets_an_error_in_json_or_is_cut_off(server: Served, data: bytes) -> None:
    with Raw(server) as raw:
        raw.send(data)
        raw.socket.settimeout(15)
        try:
            answer = raw.answer()
        except (EOFError, ConnectionError):
            return
        assert 400 <= answer.status < 500
        assert isinstance(answer.json()["error"], str)


def test_headers_without_an_end_are_cut_off_before_they_fill_the_memory(server: Served) -> None:
    def memory_bytes() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

    before = memory_bytes()
    for start in (b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-Long: ", b"GET /", b"GET /v2 HTTP/1.1\r\n"):
        with Raw(server) as raw:
            raw.send(start)
            more = b"X: y\r\n" * 50_000 if start.endswith(b"\n") else b"a" * 300_000
            sent = 0
            with contextlib.suppress(OSError):
                for _ in range(200):
                    raw.send(more)
                    sent += len(more)
            assert sent < 30_000_000, "60 MB of headers were taken"
            with contextlib.suppress(EOFError, ConnectionError):
                assert raw.answer().status in (400, 414, 431)
    assert memory_bytes() - before < 40 << 20


def test_many_requests_at_once_on_one_connection_are_answered_in_order(server: Served) -> None:
    with Raw(server) as raw:
        raw.send(b"".join(message((GOOD, i)) for i in range(10)))
        assert [read(raw.answer()) for _ in range(10)] == [[i] for i in range(10)]
        raw.send(message((SLEEPS, 1, 10)) + b"GET /v2/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" + message((GOOD, 2)))
        assert read(raw.answer()) == [1]
        assert raw.answer().status == 404
        assert read(raw.answer()) == [2]


def test_a_flood_on_one_connection_that_reads_nothing_is_cut_off(server: Served) -> None:
    ask = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    started = time.monotonic()
    with Raw(server) as raw:
        raw.socket.settimeout(0.5)
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 20:
                raw.send(ask)
        assert answered(server, (GOOD, 1)) == [1]
    assert time.monotonic() - started < 20


def test_many_bodies_that_never_end_do_not_fill_the_memory(server: Served) -> None:
    """Sixteen times the largest body is what all of them together may have sent."""
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(server)) for _ in range(24)]
        refused = 0
        for raw in raws:
            with contextlib.suppress(ConnectionError):
                raw.send(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 990000\r\n\r\n" % INFER.encode())
                raw.send(b"x" * 900_000)
            raw.socket.settimeout(0.1)
            try:
                refused += raw.answer().status == 503
            except (ConnectionError, EOFError):
                refused += 1
            except TimeoutError:
                pass
        assert 5 <= refused <= 8
        assert answered(server, (GOOD, 1)) in ([1], 503)
    assert answered(server, (GOOD, 1)) == [1]


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(server: Served) -> None:
    whole = message((GOOD, 6), headers="Expect: 100-continue\r\n")
    head, _, body = whole.partition(b"\r\n\r\n")
    with Raw(server) as raw:
        raw.send(head + b"\r\n\r\n")
        assert raw.answer().status == 100
        raw.send(body)
        assert read(raw.answer()) == [6]
    with Raw(server) as raw:
        raw.send(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9000000\r\n\r\n"
            % INFER.encode()
        )
        assert raw.answer().status == 413


def test_chunks_are_a_body_too(server: Served) -> None:
    body, more = request((GOOD, 8))
    told = "".join(f"{name}: {value}\r\n" for name, value in more.items())
    with Raw(server) as raw:
        raw.send(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n{told}Transfer-Encoding: chunked\r\n\r\n".encode())
        for start in range(0, len(body), 7):
            part = body[start : start + 7]
            raw.send(b"%x\r\n" % len(part) + part + b"\r\n")
        raw.send(b"0\r\n\r\n")
        assert read(raw.answer()) == [8]


def test_a_client_that_offers_another_protocol_is_answered_in_this_one(server: Served) -> None:
    """Java's own client offers HTTP/2 with its first request."""
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    whole = message((GOOD, 1), headers=offer)
    for cut in (len(whole), len(whole) - 5, whole.index(b"\r\n\r\n") + 4, 30):
        with Raw(server) as raw:
            raw.socket.settimeout(5)
            raw.send(whole[:cut])
            time.sleep(0.05)
            raw.send(whole[cut:])
            answer = raw.answer()
            assert read(answer) == [1]
            if answer.headers.get("connection") != "close":
                raw.send(message((GOOD, 2)))
                assert read(raw.answer()) == [2]
    head, _, body = whole.partition(b"\r\n\r\n")
    chunked = re.sub(rb"\nContent-Length: \d+", b"\nTransfer-Encoding: chunked", head)
    with Raw(server) as raw:
        raw.send(chunked + b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        assert read(raw.answer()) == [1]
    with Raw(server) as raw:
        raw.send(f"GET /v2 HTTP/1.1\r\nHost: localhost\r\n{offer}\r\n".encode())
        assert raw.answer().status == 200


def test_compressed_bodies_are_read_up_to_the_limit(server: Served) -> None:
    body, headers = request((GOOD, 9))
    packed = {**headers, "Content-Encoding": "gzip"}
    assert read(server.ask("POST", INFER, gzip.compress(body), packed)) == [9]
    assert server.ask("POST", INFER, gzip.compress(bytes(200_000_000), 1)[:900_000], packed).status == 413
    assert server.ask("POST", INFER, gzip.compress(bytes(50_000_000)), packed).status == 413
    assert server.ask("POST", INFER, gzip.compress(body)[:-9], packed).status == 400
    assert server.ask("POST", INFER, b"not packed", packed).status == 400
    assert server.ask("POST", INFER, body, {**headers, "Content-Encoding": "br"}).status == 415


# --- requests that say nonsense ---


def tensor(**changes: object) -> dict[str, object]:
    good = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12}
    return {key: value for key, value in (good | changes).items() if value is not ...}


BAD_JSON: dict[str, Any] = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"id": "\xff"}',
    "a list": b"[]",
    "a number": b"3",
    "deep": b"[" * 100_000,
    "many digits": b'{"inputs": ' + b"9" * 100_000 + b"}",
    "no inputs": {},
    "inputs are a number": {"inputs": 3},
    "inputs are numbers": {"inputs": [1, 2]},
    "two inputs": {"inputs": [tensor(), tensor(name="other")]},
    "twice the same": {"inputs": [tensor(), tensor()]},
    "another name": {"inputs": [tensor(name="audio")]},
    "no name": {"inputs": [tensor(name=...)]},
    "an id that is a number": {"id": 5, "inputs": [tensor()]},
    "an unknown datatype": {"inputs": [tensor(datatype="UINT7")]},
    "another datatype": {"inputs": [tensor(datatype="FP32", data=[0.5] * 12)]},
    "no shape": {"inputs": [tensor(shape=...)]},
    "a negative size": {"inputs": [tensor(shape=[-1, 2, 2, 3])]},
    "two negative sizes": {"inputs": [tensor(shape=[-1, 2, -2, 3])]},
    "a size that is a float": {"inputs": [tensor(shape=[1.0, 2, 2, 3])]},
    "a size that is true": {"inputs": [tensor(shape=[True, 2, 2, 3])]},
    "a huge size": {"inputs": [tensor(shape=[10**18, 2, 2, 3])]},
    "sizes whose product is beyond 64 bits": {"inputs": [tensor(shape=[2**32, 2**32, 2**32])]},
    "none of them": {"inputs": [tensor(shape=[0, 2, 2, 3], data=[])]},
    "pictures without pixels": {"inputs": [tensor(shape=[4, 0, 0, 3], data=[])]},
    "pictures of no colour": {"inputs": [tensor(shape=[1, 2, 2, 0], data=[])]},
    "pictures of five colours": {"inputs": [tensor(shape=[1, 2, 2, 5], data=[0] * 20)]},
    "a rank of 3": {"inputs": [tensor(shape=[2, 2, 3])]},
    "a rank of 100": {"inputs": [tensor(shape=[1] * 100, data=[1])]},
    "too few numbers": {"inputs": [tensor(data=[0] * 11)]},
    "too many numbers": {"inputs": [tensor(data=[0] * 13)]},
    "ragged": {"inputs": [tensor(data=[[0] * 6, [0] * 5])]},
    "texts": {"inputs": [tensor(data=["0"] * 12)]},
    "nothing in it": {"inputs": [tensor(data=[None] * 12)]},
    "too large for its type": {"inputs": [tensor(data=[256] * 12)]},
    "negative": {"inputs": [tensor(data=[-1] * 12)]},
    "floats": {"inputs": [tensor(data=[0.5] * 12)]},
    "NaN": b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 2, 2, 3], "data": [NaN]}]}',
    "an unknown output": {"inputs": [tensor()], "outputs": [{"name": "mask"}]},
    "outputs without names": {"inputs": [tensor()], "outputs": [{}]},
    "parameters are a list": {"inputs": [tensor()], "parameters": []},
    "a deadline that is text": {"inputs": [tensor()], "parameters": {"timeout": "soon"}},
    "a negative deadline": {"inputs": [tensor()], "parameters": {"timeout": -5}},
    "bytes that are no picture": {"inputs": [tensor(datatype="BYTES", shape=[1], data=["hello"])]},
    "more than are allowed": {"inputs": [tensor(shape=[5000, 1, 1, 1], data=[0] * 5000)]},
    "binary data without any": {"inputs": [tensor(data=..., parameters={"binary_data_size": 12})]},
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_a_bad_request_is_told_what_is_wrong(everyones: Served, what: str) -> None:
    values = BAD_JSON[what]
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    answer = everyones.ask("POST", INFER, body)
    assert answer.status == 400, answer.body
    assert 5 < len(answer.json()["error"]) < 600


def test_the_server_is_well_after_bad_requests(server: Served) -> None:
    assert odd(server)["restarts"] == 0


@pytest.mark.parametrize("length", ["-1", "5", "0x10", "1e3", "99999999999999999999", "\u0665", "", "10, 20", "100000"])
def test_a_lying_length_of_the_json_is_refused(everyones: Served, length: str) -> None:
    body, _ = request((GOOD, 1))
    answer = everyones.ask(
        "POST", INFER, body, {"Inference-Header-Content-Length": length.encode("utf-8").decode("latin-1")}
    )
    assert answer.status == 400, answer.body


@pytest.mark.parametrize("size", [-1, 11, 13, 10**12, 1.5, "12", True, None, []])
def test_a_lying_size_of_a_tensor_is_refused(everyones: Served, size: object) -> None:
    head = json.dumps({"inputs": [tensor(data=..., parameters={"binary_data_size": size})]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = everyones.ask("POST", INFER, head + bytes(12), headers)
    assert answer.status == 400, answer.body


def png(width: int, height: int) -> bytes:
    """A black picture of one bit a pixel: 113 MB of it are 110 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def file_of(picture: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind)
    return stream.getvalue()


def elements(*parts: bytes) -> tuple[bytes, dict[str, str]]:
    """A binary request with a BYTES tensor."""
    raw = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    described = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(parts)],
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [described], "outputs": [{"name": "label"}]}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def test_a_picture_that_unfolds_to_gigabytes_is_refused(server: Served) -> None:
    for side, told in ((30_000, "Not an image that suanli can read"), (12_000, "12000x12000"), (7_200, "7200x7200")):
        bomb = png(side, side)
        assert len(bomb) < BODY_LIMIT
        before = time.monotonic()
        answer = server.ask("POST", INFER, *elements(bomb))
        assert answer.status == 400
        assert told in answer.json()["error"]
        found = server.ask("POST", "/predict", bomb, {"Content-Type": "image/png"})
        assert found.status == 200
        assert told in found.json()["predictions"][0]["error"]
        assert time.monotonic() - before < 5


def test_broken_pictures_are_told_beside_good_ones(server: Served) -> None:
    good = [file_of(pictures((GOOD, i))[0]) for i in range(3)]
    large = file_of(np.full((300, 400, 3), (0, 6, 0), np.uint8))
    files = {
        "good": (good[1], "class1"),
        "cut": (file_of(np.random.default_rng(1).integers(0, 255, (50, 50, 3), np.uint8))[:-200], None),
        "empty": (b"", None),
        "text": (b"<html>", None),
        "a name": (b"\x89PNG\r\n\x1a\n", None),
        "large": (large, "class6"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None),
        "good too": (good[2], "class2"),
    }
    form = b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, (content, _) in files.items()
    )
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    answer = server.ask("POST", "/predict", form + b"--edge--\r\n", headers)
    assert answer.status == 200, answer.body
    for found, (name, (_, label)) in zip(answer.json()["predictions"], files.items(), strict=True):
        assert (found["name"], found["label"]) == (name, label)
        assert (found["error"] is None) == (label is not None)
    assert read(server.ask("POST", INFER, *elements(good[2], good[0]))) == [2, 0]
    refused = server.ask("POST", INFER, *elements(good[2], files["cut"][0]))
    assert refused.status == 400
    assert "Input 1" in refused.json()["error"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=edge", b""),
        ("multipart/form-data; boundary=edge", b"no edge in it"),
        ("multipart/form-data; boundary=edge", b"--edge--\r\n"),
        ("multipart/form-data; boundary=edge", b'--edge\r\nContent-Disposition: form-data; name="f"\r\n\r\n'),
        ("multipart/form-data; boundary=edge", b"--edge\r\n" + b"X-Y: z\r\n" * 10_000),
        ("multipart/form-data; boundary=edge", b"--edge\r\nno: name\r\n\r\nhello\r\n--edge--\r\n"),
        (
            "multipart/form-data; boundary=edge",
            b'--edge\r\nContent-Disposition: form-data; name="f"; filename="\xff\x00"\r\n\r\n\r\n--edge--',
        ),
        ("application/json", b"[]"),
        ("application/json", b"{"),
        ("application/json", b'{"inputs": ["x"]}'),
        ("text/plain", b"hello"),
        ("nonsense", b"x"),
        ("\u00fc/\u00fc", b"x"),
        ("image/png", b""),
    ],
)
def test_a_bad_form_is_refused(everyones: Served, kind: str, body: bytes) -> None:
    answer = everyones.ask("POST", "/predict", body, {"Content-Type": kind})
    if answer.status == 200:  # a file that can't be read is told as that
        assert all(found["error"] for found in answer.json()["predictions"])
    else:
        assert answer.status in (400, 415), answer.body
        assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("query", ["top=0", "top=-1", "top=x", "top=", "top=%F0%9D%9F%93", "top=99999999999999999999"])
def test_a_bad_query_is_refused_or_made_the_best_of(everyones: Served, query: str) -> None:
    content = file_of(pictures((GOOD, 1))[0])
    answer = everyones.ask("POST", f"/predict?{query}", content, {"Content-Type": "image/png"})
    assert answer.status in (200, 400), answer.body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nothing", 404),
        ("GET", "/v2/models/odd/versions/7", 404),
        ("GET", "/v2/models/../../etc/passwd", 404),
        ("GET", "/page/../../../../etc/passwd", 404),
        ("GET", "/page/%2e%2e/%2e%2e/http.py", 404),
        ("GET", "/page/%00", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2", 405),
        ("BREW", "/v2", 405),
        ("POST", "/metrics", 405),
        ("POST", "/v2/models/%F0%9F%90%88/infer", 404),
        ("POST", "/v2/models/" + "x" * 5000 + "/infer", 404),
        ("POST", "/v2/models//infer", 404),
        ("POST", "/v2/repository/models/..%2F..%2Fetc/load", 404),
        ("POST", "/v2/repository/models/nothing/unload", 404),
        ("GET", "/%", 404),
        ("GET", "//v2//models", 404),
        ("GET", "/nothing", 404),
    ],
)
def test_paths_that_lead_nowhere(everyones: Served, method: str, path: str, status: int) -> None:
    with Raw(everyones) as raw:
        raw.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
        answer = raw.answer()
    assert answer.status in ({status, 400} if method == "BREW" else {status}), answer.body
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("example.org", 421),
        ("127.0.0.1.example.org", 421),
        ("localhost@example.org", 421),
        ("[::1", 421),
        ("", 421),
        ("\u00fc", 421),
    ],
)
def test_only_pages_of_this_machine_can_reach_it(everyones: Served, host: str, status: int) -> None:
    with Raw(everyones) as raw:
        raw.send(f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
        found = raw.answer().status
    assert found == status or (status == 421 and found == 400)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("http://localhost", 403),
        ("https://example.org", 403),
        ("null", 403),
        ("http://localhost:8000.example.org", 403),
        ("http://example.org/?://localhost:8000", 403),
    ],
)
def test_pages_of_other_sites_cannot_ask(everyones: Served, origin: str, status: int) -> None:
    with Raw(everyones) as raw:
        raw.send(
            message((GOOD, 1), headers=f"Origin: {origin}\r\n").replace(b"Host: localhost", b"Host: localhost:8000")
        )
        assert raw.answer().status == status


def test_every_line_of_the_log_is_json_whatever_clients_put_into_it(server: Served) -> None:
    paths = ['/"}\n', "/%0a%7b", "/%1b[2J", "/\u2028x", "/%ff%00", "/\\\\", "/'\"", "/%ED%A0%80"]
    for path in paths:
        with Raw(server) as raw:
            wire = path.encode().replace(b"\n", b"%0A").replace(b"\xe2\x80\xa8", b"%E2%80%A8")
            raw.send(b"GET " + wire + b' HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\x1b[2J"}\xff\r\n\r\n')
            with contextlib.suppress(EOFError):
                raw.answer()
    body, headers = request((THROWS,))
    assert server.ask("POST", INFER, body, headers | {"X-Request-Id": "my-own_1"}).headers["x-request-id"] == "my-own_1"
    events = []
    for line in server.log().split("\n"):
        if line and not line.startswith(("Serving on", "Ctrl-C ends it")):
            events.append(json.loads(line))
            assert {"time", "level", "event"} <= events[-1].keys()
            assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line), repr(line)
    assert [event["status"] for event in events if event.get("request_id") == "my-own_1"] == [500]
    assert not server.events("request failed")  # nothing was unforeseen


# --- engines that fail, behind a server ---


def test_an_engine_that_fails_or_dies_on_some_inputs_harms_only_those(server: Served) -> None:
    orders: list[tuple[int, ...]] = [(GOOD, i % 10) for i in range(20)]
    orders[3], orders[9], orders[14] = (THROWS,), (SHAPE,), (NAN,)
    with ThreadPoolExecutor(len(orders)) as pool:
        found = list(pool.map(lambda order: answered(server, order), orders))
        for order, answer in zip(orders, found, strict=True):
            assert answer == ([order[1]] if order[0] == GOOD else 500)
        (engine,) = children(server.process.pid)
        before = odd(server)["restarts"]

        slow = pool.submit(answered, server, (SLEEPS, 5, 50))
        time.sleep(0.2)
        orders = [(GOOD, 1), (GOOD, 2), (DIES,), (GOOD, 3)]
        found = list(pool.map(lambda order: answered(server, order), orders))
        assert slow.result() == [5]
    assert found == [[1], [2], 500, [3]], server.events("engine lost")
    until(server.ready, within_s=20, what="ready again")
    assert odd(server)["restarts"] == before + 2
    assert not is_there(engine)
    assert len(children(server.process.pid)) == 1
    assert "SIGSEGV" in server.events("engine lost")[-1]["reason"]


def test_a_deadline_is_kept(server: Served) -> None:
    with Raw(server) as slow:
        slow.send(message((SLEEPS, 1, 100)))
        time.sleep(0.1)
        before = time.monotonic()
        assert answered(server, (GOOD, 2), timeout=150_000) == 504
        assert time.monotonic() - before < 0.8
        assert read(slow.answer()) == [1]
    assert answered(server, (GOOD, 2), timeout=60_000_000) == [2]


def test_readiness_tells_the_truth_while_a_model_comes_up(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = engines(tmp_path / "odd", load="time.sleep(2)")
    with serving(subject, environment=environment, ready=False) as server:
        assert server.ask("GET", "/v2/health/live").status == 200
        assert server.ask("GET", "/v2/health/ready").status == 503
        answer = server.ask("POST", INFER, *request((GOOD, 1)))
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert server.ask("GET", "/v2/models/odd/ready").status == 503
        status = server.ask("GET", "/status").json()
        assert (status["ready"], status["models"][0]["state"]) == (False, "loading")
        index = server.ask("POST", "/v2/repository/index").json()
        assert [(entry["name"], entry["state"]) for entry in index] == [("odd", "LOADING")]
        until(server.ready, within_s=30, what="ready")
        assert answered(server, (GOOD, 1)) == [1]
        assert server.ask("GET", "/v2/models/odd/ready").status == 200
        # A crash loop: not ready, refused at once, and the rest of the server is there.
        assert answered(server, (EXITS,)) == 500
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("GET", "/v2/health/live").status == 200
        answer = server.ask("POST", INFER, *request((GOOD, 1)))
        assert (answer.status, "retry-after" in answer.headers) == (503, True)
        until(server.ready, within_s=30, what="ready again")
        assert answered(server, (GOOD, 1)) == [1]


def test_overload_is_refused_at_once_and_what_is_accepted_is_answered_in_time(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """200 inputs a second are possible, and 24 clients ask as fast as they can."""
    subject = engines(tmp_path / "odd", input_ms=5)
    took: dict[int, list[float]] = {200: [], 503: []}
    with serving(subject, "--p99-ms", "100", environment=environment) as server:
        end = time.monotonic() + 4

        def client(label: int) -> None:
            connection = server.connection()
            while time.monotonic() < end:
                before = time.monotonic()
                connection.request("POST", INFER, *request((GOOD, label % 10)))
                reply = connection.getresponse()
                body = reply.read()
                took[reply.status].append(time.monotonic() - before)
                if reply.status == 200:
                    assert labels(body) == [label % 10]
                else:
                    assert int(reply.headers["Retry-After"]) >= 1
                    time.sleep(0.02)
            connection.close()

        with ThreadPoolExecutor(24) as pool:
            list(pool.map(client, range(24)))
        accepted, refused = sorted(took[200]), sorted(took[503])
        assert len(accepted) > 50
        assert len(refused) > 50
        assert accepted[len(accepted) * 9 // 10] < 1.0
        assert refused[len(refused) // 2] < 0.25
        until(lambda: answered(server, (GOOD, 3)) == [3], within_s=2, what="recovered")
        assert odd(server)["restarts"] == 0
        status = odd(server)
        assert status["refused"] >= len(refused)
        assert status["waiting"] == 0


# --- the life of a server ---


class Clients:
    """Threads that ask again and again over connections that they keep. What became of each request is in `found`."""

    def __init__(self, server: Served, count: int, orders: Callable[[int], tuple[int, ...]]) -> None:
        self.found: list[tuple[str, object]] = []
        self._server, self._orders = server, orders
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                raw = Raw(self._server)
            except ConnectionError:
                self.found.append(("not connected", None))
                return
            with raw:
                for turn in range(1_000_000):
                    if self._stop.is_set():
                        return
                    order = self._orders(number)
                    try:
                        raw.send(message(order))
                        answer = raw.answer()
                    except (EOFError, OSError) as error:
                        # A connection that the kernel took and the server never saw is no accepted request.
                        self.found.append(("lost" if turn else "not accepted", repr(error)))
                        break
                    self.found.append(("answered", (order, read(answer))))
                    if answer.headers.get("connection") == "close":
                        break

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def count(self, what: str) -> int:
        return sum(kind == what for kind, _ in self.found)


def test_sigterm_under_load_loses_no_accepted_request(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = engines(tmp_path / "odd", batch_ms=10)
    with serving(subject, environment=environment) as server:
        clients = Clients(server, 8, lambda number: (GOOD, number))
        with Raw(server) as idle, Raw(server) as slow, Raw(server) as half:
            slow.send(message((SLEEPS, 4, 100)))
            half.send(message((GOOD, 5))[:-4])
            until(lambda: clients.count("answered") > 50, within_s=20, what="some answers")
            (engine,) = children(server.process.pid)
            server.process.send_signal(signal.SIGTERM)
            ended = time.monotonic()
            time.sleep(0.1)
            half.send(message((GOOD, 5))[-4:])
            assert read(half.answer()) == [5]
            assert read(slow.answer()) == [4]
            clients.join()
            assert server.process.wait(20) == 0
            assert time.monotonic() - ended < 15
            assert idle.is_closed()
        assert not is_there(engine)
        for kind, what in clients.found:
            assert kind in ("answered", "not connected", "not accepted"), what
            if kind == "answered":
                (_, number), answer = what  # type: ignore[misc]
                assert answer == [number]
        assert clients.count("not accepted") <= 8
        assert json.loads(server.log().strip().splitlines()[-1])["event"] in ("stopping", "stopped")


def test_sigterm_while_a_model_comes_up(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = engines(tmp_path / "odd", load="time.sleep(30)")
    with serving(subject, environment=environment, ready=False) as server:
        until(lambda: bool(children(server.process.pid)), within_s=10, what="an engine's process")
        (engine,) = children(server.process.pid)
        server.process.terminate()
        assert server.process.wait(10) == 0
        assert not is_there(engine)


def test_a_second_signal_ends_it_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
    with serving(engines(tmp_path / "odd"), environment=environment, exit_code=None) as server:
        (engine,) = children(server.process.pid)
        with Raw(server) as hanging:
            hanging.send(message((HANGS,)))
            time.sleep(0.2)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.7)
            assert server.process.poll() is None  # it waits for the one that it accepted
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(5) is not None
        assert not is_there(engine)


@pytest.mark.parametrize("what", [GOOD, HOLDS], ids=["idle", "busy"])
def test_engines_end_with_a_server_that_is_killed(tmp_path: Path, environment: dict[str, str], what: int) -> None:
    with serving(engines(tmp_path / "odd"), environment=environment, exit_code=None) as server, Raw(server) as raw:
        (engine,) = children(server.process.pid)
        raw.send(message((what,)))
        time.sleep(0.3)
        server.process.kill()
        until(lambda: not is_there(engine), within_s=3, what="the engine has ended")


def start(*words: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a server that can't start."""
    done = subprocess.run(
        [sys.executable, "-m", "suanli", "serve", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "300"} | environment,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_port_that_is_taken_is_said(tmp_path: Path, environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, told = start(str(engines(tmp_path / "odd")), "--port", str(port), environment=environment)
    assert code == 4, told
    assert f"Port {port}" in told


def test_where_there_is_no_model_it_is_said(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "models" / "notes").mkdir(parents=True)
    code, told = start(str(tmp_path / "models"), "--port", "0", environment=environment)
    assert code == 3, told
    assert "models" in told
    with pytest.raises(DataError, match="nothing"):
        serve(tmp_path / "nothing", port=0)


def test_an_engine_that_does_not_come_up_is_said(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = engines(tmp_path / "odd", load="raise ValueError('no luck today')")
    code, told = start(str(subject), "--port", "0", environment=environment)
    assert code == 4, told
    assert "no luck today" in told


def certificate(place: Path, name: str) -> tuple[Path, Path]:
    """A certificate and its key, for a day."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the command openssl")
    key, cert = place / f"{name}.key", place / f"{name}.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True, timeout=60)
    return cert, key


def test_tls(tmp_path: Path, environment: dict[str, str]) -> None:
    cert, key = certificate(tmp_path, "one")
    _, other = certificate(tmp_path, "two")
    subject = engines(tmp_path / "odd")
    with serving(subject, "--tls-cert", str(cert), "--tls-key", str(key), environment=environment) as server:
        assert server.url.startswith("https://")
        assert answered(server, (GOOD, 2)) == [2]
        with Raw(server) as raw:  # without TLS
            raw.send(message((GOOD, 1)))
            with contextlib.suppress(ConnectionError):
                assert raw.socket.recv(100)[:4] != b"HTTP"
        with Raw(server) as raw:  # half a handshake
            raw.send(b"\x16\x03\x01")
        assert answered(server, (GOOD, 3)) == [3]
    nothing = tmp_path / "nothing.pem"
    (tmp_path / "text.pem").write_text("hello")
    for one, two in ((cert, other), (nothing, key), (cert, nothing), (tmp_path / "text.pem", key)):
        with pytest.raises(UsageError, match="certificate"):
            serve(subject, port=0, tls_cert=one, tls_key=two)
    with pytest.raises(UsageError, match="key"):
        serve(subject, port=0, tls_cert=cert)
    code, told = start(
        str(subject), "--port", "0", "--tls-cert", str(cert), "--tls-key", str(other), environment=environment
    )
    assert code == 2, told


OPEN = ("/", "/health", "/status", "/v2/health/live", "/v2/health/ready")
CLOSED = (
    ("GET", "/v2"),
    ("GET", "/v2/models/odd"),
    ("GET", "/v2/models/odd/stats"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("POST", INFER),
    ("POST", "/predict"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/odd/unload"),
    ("GET", "/v2/health/live/../../models/odd"),
    ("GET", "//status"),
)


@pytest.mark.parametrize("given", ["file", "environment"])
def test_an_api_key(tmp_path: Path, environment: dict[str, str], given: str) -> None:
    key = "correct-horse_7"
    (tmp_path / "key").write_text(key + "\n")
    options = ("--api-key-file", str(tmp_path / "key")) if given == "file" else ()
    more = {} if given == "file" else {"SUANLI_API_KEY": key}
    with serving(engines(tmp_path / "odd"), *options, environment=environment | more) as server:
        for path in OPEN:
            assert server.ask("GET", path).status == 200, path
        assert server.ask("GET", "/status").json()["key_needed"] is True
        wrong = [
            {},
            {"X-API-Key": ""},
            {"X-API-Key": key[:-1]},
            {"X-API-Key": key + "x"},
            {"X-API-Key": "\u00fc\u00e4"},
            {"Authorization": key},
            {"Authorization": "Bearer"},
            {"Authorization": f"Basic {key}"},
            {"Authorization": "Bearer nothing", "X-API-Key": key},
        ]
        for method, path in CLOSED:
            for headers in wrong if path == "/v2" else wrong[:3]:
                answer = server.ask(method, path, headers=headers)
                assert answer.status == 401, (path, headers)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert key not in answer.body.decode()
        body, more = request((GOOD, 5))
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer  {key}"}):
            assert read(server.ask("POST", INFER, body, more | headers)) == [5]
        assert server.ask("GET", "/metrics", headers={"X-API-Key": key}).status == 200
        assert key not in server.log()
        with Raw(server) as raw:  # a large body is not read from who has no key
            raw.send(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n\r\n" % INFER.encode())
            assert raw.answer().status == 401


@pytest.mark.parametrize("content", [b"", b"  \n", b"two words", b"\xff\xfe", "schl\u00fcssel".encode()])
def test_a_key_that_cannot_be_one_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match="API key"):
        serve(tmp_path, port=0, api_key_file=tmp_path / "key")


# --- models that change ---


def test_models_are_swapped_under_load_without_a_lost_request(tmp_path: Path, environment: dict[str, str]) -> None:
    """Three times because somebody asks for it, twice because the folder has changed."""
    folder = tmp_path / "models" / "odd"
    engines(folder)
    with serving(tmp_path / "models", environment=environment) as server:
        opened = descriptors(server)
        clients = Clients(server, 6, lambda _: (GOOD, 0))
        for version in range(1, 6):
            before = len(clients.found)
            until(lambda: len(clients.found) > before + 20, within_s=20, what="answers")  # noqa: B023
            engines(folder, offset=version)
            if version <= 3:
                assert server.ask("POST", "/v2/repository/models/odd/load").status == 200
            until(lambda: answered(server, (GOOD, 0)) == [version], within_s=30, what="the new one")  # noqa: B023
            assert server.ready()
        clients.stop()
        seen: list[int] = []
        for kind, what in clients.found:
            assert kind == "answered", what
            (_, answer) = what  # type: ignore[misc]
            assert isinstance(answer, list), answer
            seen += answer
        assert set(seen) == set(range(6))
        until(lambda: len(children(server.process.pid)) == 1, within_s=10, what="one engine")
        until(lambda: descriptors(server) <= opened + 1, within_s=10, what="as many descriptors as before")
        assert not server.events("engine lost")
        assert not server.events("request failed")
        first = [seen.index(version) for version in range(6)]
        assert first == sorted(first)


def test_a_folder_of_models_is_followed(tmp_path: Path, environment: dict[str, str]) -> None:
    """What is new, broken, mended and removed; what can't be loaded changes nothing."""
    models = tmp_path / "models"
    engines(models / "odd" / "1")
    with serving(models, environment=environment) as server:

        def index() -> dict[tuple[str, str], str]:
            found = server.ask("POST", "/v2/repository/index").json()
            return {(entry["name"], entry["version"]): entry["state"] for entry in found}

        assert index() == {("odd", "1"): "READY"}
        engines(models / "odd" / "2", offset=2)
        engines(models / "even", offset=5)
        ready = {("even", "1"): "READY", ("odd", "1"): "READY", ("odd", "2"): "READY"}
        until(lambda: index() == ready, within_s=30, what="new models")
        assert answered(server, (GOOD, 0)) == [2]  # the newest
        assert read(server.ask("POST", "/v2/models/odd/versions/1/infer", *request((GOOD, 0)))) == [0]
        assert read(server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0)))) == [5]
        assert server.ask("GET", "/v2/models/odd").json()["versions"] == ["1", "2"]

        # Replaced by a broken one, and cut short: what was there goes on.
        (models / "even" / "engines.json").write_text("{")
        engines(models / "odd" / "2", offset=3)
        (file,) = (models / "odd" / "2").glob("hostile-*/settings.json")
        file.write_bytes(file.read_bytes()[:20])
        until(lambda: len(server.events("model not loaded")) >= 2, within_s=30, what="two that can't be loaded")
        assert index() == ready
        assert server.ready()
        assert answered(server, (GOOD, 0)) == [2]
        assert read(server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0)))) == [5]
        refused = server.ask("POST", "/v2/repository/models/even/load")
        assert refused.status == 400
        assert "engines.json" in refused.json()["error"]
        assert read(server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0)))) == [5]

        # A new one that is broken is told; the others are there.
        (models / "worse").mkdir()
        (models / "worse" / "model.json").write_text('{"format": 1}')
        until(lambda: index().get(("worse", "1")) == "UNAVAILABLE", within_s=30, what="a broken one")
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("POST", "/v2/models/worse/infer", *request((GOOD, 0))).status in (404, 503)
        assert answered(server, (GOOD, 0)) == [2]
        shutil.rmtree(models / "worse")

        # Mended, unloaded, loaded and removed.
        engines(models / "even", offset=6)
        until(
            lambda: read(server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0)))) == [6],
            within_s=30,
            what="the mended one",
        )
        until(server.ready, within_s=10, what="ready")
        assert server.ask("POST", "/v2/repository/models/even/unload").status == 200
        assert server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0))).status == 404
        assert ("even", "1") not in index() or index()["even", "1"] == "UNAVAILABLE"
        assert server.ask("POST", "/v2/repository/models/even/unload").status == 404
        time.sleep(2.2)  # two looks: it doesn't come back by itself
        assert server.ask("GET", "/v2/models/even").status == 404
        assert server.ask("POST", "/v2/repository/models/even/load").status == 200
        assert read(server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0)))) == [6]
        shutil.rmtree(models / "odd" / "2")
        until(lambda: answered(server, (GOOD, 0)) == [0], within_s=30, what="the version before")
        shutil.rmtree(models / "even")
        until(lambda: index() == {("odd", "1"): "READY"}, within_s=30, what="one model")
        assert server.ready()
        until(lambda: len(children(server.process.pid)) == 1, within_s=10, what="one engine")


def test_a_model_whose_last_file_comes_late_is_loaded_in_the_end(tmp_path: Path, environment: dict[str, str]) -> None:
    """What lists the files is often copied before the large ones."""
    models = tmp_path / "models"
    engines(models / "odd")
    engines(tmp_path / "next", offset=1)
    (late,) = (tmp_path / "next").glob("hostile-*/settings.json")
    content = late.read_bytes()
    late.unlink()
    with serving(models, environment=environment) as server:
        shutil.copytree(tmp_path / "next", models / "new")
        until(lambda: bool(server.events("model not loaded")), within_s=20, what="half of a model")
        (models / "new" / late.relative_to(tmp_path / "next")).write_bytes(content)
        ask = lambda: read(server.ask("POST", "/v2/models/new/infer", *request((GOOD, 0))))  # noqa: E731
        until(lambda: ask() == [1], within_s=20, what="the whole model")
        until(server.ready, within_s=10, what="ready")

        # Unloaded while a request is computed, swapped while one is being sent, loaded by many at once.
        with Raw(server) as slow, Raw(server) as half:
            slow.send(message((SLEEPS, 1, 60), path="/v2/models/new/infer"))
            picture = file_of(pictures((GOOD, 1))[0])
            half.send(b"POST /predict?model=odd HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
            half.send(b"Content-Length: %d\r\n\r\n" % len(picture) + picture[:20])
            time.sleep(0.1)
            assert server.ask("POST", "/v2/repository/models/new/unload").status == 200
            assert server.ask("POST", "/v2/repository/models/odd/load").status == 200
            time.sleep(0.2)
            half.send(picture[20:])
            answer = half.answer()
            assert answer.status == 200, answer.body
            assert answer.json()["predictions"][0]["label"] == "class1"
            assert read(slow.answer()) == [2]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.ask, "POST", "/v2/repository/models/odd/load") for _ in range(4)]
            assert [one.result().status for one in asked] == [200] * 4
        until(lambda: len(children(server.process.pid)) == 1, within_s=10, what="one engine")
        assert answered(server, (GOOD, 0)) == [0]


def test_a_folder_that_is_away_for_a_moment_is_not_unloaded(tmp_path: Path, environment: dict[str, str]) -> None:
    """Who copies a new model over an old one may remove that first."""
    models = tmp_path / "models"
    engines(models / "odd")
    engines(tmp_path / "next", offset=1)
    with serving(models, environment=environment) as server:
        clients = Clients(server, 2, lambda _: (GOOD, 0))
        for turn in range(2):
            until(lambda: clients.count("answered") > 0, within_s=10, what="an answer")
            shutil.rmtree(models / "odd")
            time.sleep(0.5)  # less than two looks
            shutil.copytree(tmp_path / "next", models / "odd")
            time.sleep(0.3 * turn)
        until(lambda: answered(server, (GOOD, 0)) == [1], within_s=30, what="the new one")
        clients.stop()
        for kind, what in clients.found:
            assert kind == "answered", what
            (_, answer) = what  # type: ignore[misc]
            assert answer in ([0], [1])


def test_an_engine_that_does_not_come_up_leaves_the_other_models(tmp_path: Path, environment: dict[str, str]) -> None:
    models = tmp_path / "models"
    engines(models / "bad", load="raise ValueError('no luck')")
    engines(models / "odd")
    with serving(models, environment=environment, ready=False) as server:
        until(lambda: answered(server, (GOOD, 1)) == [1], within_s=30, what="the good one")
        assert server.ask("GET", "/v2/health/ready").status == 503
        states = {model["name"]: model for model in server.ask("GET", "/status").json()["models"]}
        assert states["odd"]["state"] == "ready"
        assert states["bad"]["state"] == "failed"
        assert "no luck" in states["bad"]["reason"]
        assert server.ask("POST", "/v2/models/bad/infer", *request((GOOD, 0))).status in (404, 503)
        assert server.ask("GET", "/v2/models/odd/ready").status == 200


@pytest.mark.long
def test_an_hour_of_misfortune_in_half_a_minute(tmp_path: Path, environment: dict[str, str]) -> None:
    """Everything at once: good clients, engines that die and throw, clients that leave, models that are swapped. Good
    requests are answered rightly or refused, and nothing is left over."""
    folder = tmp_path / "models" / "odd"
    engines(folder)
    with serving(tmp_path / "models", environment=environment) as server:
        before = descriptors(server)
        clients = Clients(server, 4, lambda number: (GOOD, number))
        end = time.monotonic() + 30
        turn = 0
        while time.monotonic() < end:
            turn += 1
            with Raw(server) as raw:
                raw.send(message(((THROWS, SHAPE, NAN)[turn % 3],)))
                if turn % 2:
                    with contextlib.suppress(EOFError, ConnectionError):
                        raw.answer()
            if turn % 150 == 0:
                answered(server, (DIES,))
            if turn % 200 == 0:
                engines(folder, offset=10 * (turn % 3))  # the same answers
                server.ask("POST", "/v2/repository/models/odd/load")
        clients.stop()
        for kind, what in clients.found:
            assert kind == "answered", what
            (_, number), answer = what  # type: ignore[misc]
            assert answer in ([number], 503)
        assert sum(isinstance(what[1], list) for _, what in clients.found) > 500  # type: ignore[index]
        until(server.ready, within_s=60, what="ready")
        until(lambda: len(children(server.process.pid)) == 1, within_s=20, what="one engine")
        until(lambda: descriptors(server) <= before + 2, within_s=20, what="as many descriptors as before")
        assert not server.events("request failed")


@pytest.mark.long
def test_memory_does_not_grow_with_refused_requests(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = engines(tmp_path / "odd", input_ms=20, side=128)
    with serving(subject, "--p99-ms", "100", environment=environment) as server:

        def memory_bytes() -> int:
            return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

        body, headers = request((GOOD, 1), side=128)

        def load(seconds: float) -> None:
            end = time.monotonic() + seconds

            def client(_: int) -> None:
                connection = server.connection()
                while time.monotonic() < end:
                    connection.request("POST", INFER, body, headers)
                    connection.getresponse().read()
                connection.close()

            with ThreadPoolExecutor(16) as pool:
                list(pool.map(client, range(16)))

        load(5)
        before = memory_bytes()
        load(20)
        assert memory_bytes() - before < 30 << 20
        assert odd(server)["refused"] > 100


def test_classes_are_what_the_engine_has(everyones: Served) -> None:
    assert odd(everyones)["classes"] == list(CLASSES)
