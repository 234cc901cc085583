"""What clients and inputs a server must survive: real sockets, and an engine that misbehaves on demand."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile import (
    CLASSES,
    DIES,
    GOOD,
    NAN,
    SHAPE,
    SLEEPS,
    THROWS,
    engines,
    pictures,
    register,
    request,
)
from served import Served, serving, until
from wire import INFER, Raw, answered, children, file_of, is_there, message, odd, read

BODY_LIMIT = 1_000_000
PATIENCE_S = 3.0  # of the server, with who is slow; else ten


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with register() as result:
        yield result


@pytest.fixture(scope="module")
def everyones(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Served]:
    """One server for all faults of clients: each has to leave it as it was."""
    subject = engines(tmp_path_factory.mktemp("everyones") / "odd")
    impatient = {"connection.HEADERS_S": PATIENCE_S, "connection.BODY_S": PATIENCE_S}
    with serving(
        subject, "--max-body-mb", "1", "--log-requests", environment=environment, constants=impatient
    ) as server:
        yield server


@pytest.fixture
def server(everyones: Served) -> Iterator[Served]:
    """It, which is checked afterwards."""
    yield everyones
    assert everyones.process.poll() is None, everyones.log()
    assert answered(everyones, (GOOD, 7)) == [7]
    until(everyones.ready, within_s=20, what="ready again")
    assert odd(everyones)["waiting"] == 0


# --- clients that send nonsense, or not all ---


def test_a_client_that_sends_slowly_or_only_a_part_is_cut_off_and_others_are_answered(server: Served) -> None:
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
        assert min(closed.values()) > PATIENCE_S / 2
        assert max(closed.values()) < 4 * PATIENCE_S, closed
    until(lambda: len(server.ask("GET", "/v2").body) > 0, within_s=5, what="an answer")


def test_one_byte_at_a_time_is_a_request_too(server: Served) -> None:
    with Raw(server) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in message((GOOD, 3), (GOOD, 5)):
            raw.send(bytes([byte]))
        assert read(raw.answer()) == [3, 5]


def test_a_client_that_leaves_during_its_body_or_before_the_answer_is_forgotten(server: Served) -> None:
    with Raw(server) as raw:
        raw.send(message((GOOD, 1))[:-5])
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(Raw(server))
        slow.send(message((SLEEPS, 1, 255)))  # 2.55 s: longer than both waits below together
        until(lambda: odd(server)["waiting"] == 0, within_s=5, what="the engine has it")
        time.sleep(0.1)
        leaving = [stack.enter_context(Raw(server)) for _ in range(5)]
        for raw in leaving:
            raw.send(message((GOOD, 2)))
        until(lambda: odd(server)["waiting"] == 5, within_s=1.2, what="five that wait")
        for raw in leaving:
            raw.__exit__()
        until(lambda: odd(server)["waiting"] == 0, within_s=1.2, what="none that wait")
        assert read(slow.answer()) == [1]


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


def test_a_body_that_is_longer_than_its_content_length_ends_the_connection_after_the_answer(server: Served) -> None:
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
def test_bytes_that_are_not_http_get_an_error_in_json_or_are_cut_off(server: Served, data: bytes) -> None:
    with Raw(server) as raw:
        raw.send(data)
        raw.socket.settimeout(15)
        try:
            answer = raw.answer()
        except (EOFError, ConnectionError):
            return
        assert 400 <= answer.status < 500
        assert isinstance(answer.json()["error"], str)


def test_endless_headers_are_cut_off_before_they_fill_the_memory(server: Served) -> None:
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


def test_a_client_that_expects_100_continue_gets_it(server: Served) -> None:
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


def test_a_chunked_body_is_read(server: Served) -> None:
    body, more = request((GOOD, 8))
    lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
    with Raw(server) as raw:
        raw.send(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n{lines}Transfer-Encoding: chunked\r\n\r\n".encode())
        for start in range(0, len(body), 7):
            part = body[start : start + 7]
            raw.send(b"%x\r\n" % len(part) + part + b"\r\n")
        raw.send(b"0\r\n\r\n")
        assert read(raw.answer()) == [8]


def test_a_client_that_offers_another_protocol_is_answered_in_http_1(server: Served) -> None:
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
    assert read(server.ask("POST", INFER, gzip.compress(body[:9]) + gzip.compress(body[9:]), packed)) == [9]
    assert server.ask("POST", INFER, gzip.compress(body) + b"junk", packed).status == 400
    assert server.ask("POST", INFER, gzip.compress(b"") * 20_000, packed).status == 400
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
def test_a_bad_request_gets_an_error_that_says_what_is_wrong(everyones: Served, what: str) -> None:
    values = BAD_JSON[what]
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    answer = everyones.ask("POST", INFER, body)
    assert answer.status == 400, answer.body
    assert 5 < len(answer.json()["error"]) < 600


def test_the_server_works_after_bad_requests(server: Served) -> None:
    assert odd(server)["restarts"] == 0


@pytest.mark.parametrize("length", ["-1", "5", "0x10", "1e3", "99999999999999999999", "\u0665", "", "10, 20", "100000"])
def test_a_wrong_length_of_the_json_is_refused(everyones: Served, length: str) -> None:
    body, _ = request((GOOD, 1))
    answer = everyones.ask(
        "POST", INFER, body, {"Inference-Header-Content-Length": length.encode("utf-8").decode("latin-1")}
    )
    assert answer.status == 400, answer.body


@pytest.mark.parametrize("size", [-1, 11, 13, 10**12, 1.5, "12", True, None, []])
def test_a_wrong_size_of_a_tensor_is_refused(everyones: Served, size: object) -> None:
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
    for side, expected in (
        (30_000, "Not an image that suanli can read"),
        (12_000, "12000x12000"),
        (7_200, "7200x7200"),
    ):
        bomb = png(side, side)
        assert len(bomb) < BODY_LIMIT
        before = time.monotonic()
        answer = server.ask("POST", INFER, *elements(bomb))
        assert answer.status == 400
        assert expected in answer.json()["error"]
        result = server.ask("POST", "/predict", bomb, {"Content-Type": "image/png"})
        assert result.status == 400
        assert expected in result.json()["predictions"][0]["error"]
        assert time.monotonic() - before < 5


def test_broken_pictures_get_errors_beside_the_answers_of_good_ones(server: Served) -> None:
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
    for result, (name, (_, label)) in zip(answer.json()["predictions"], files.items(), strict=True):
        assert (result["name"], result["label"]) == (name, label)
        assert (result["error"] is None) == (label is not None)
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
    assert answer.status in (400, 415), answer.body
    assert isinstance(answer.json()["error"], str)
    assert all(result["error"] for result in answer.json().get("predictions", []))  # each file has one of its own


@pytest.mark.parametrize("query", ["top=0", "top=-1", "top=x", "top=", "top=%F0%9D%9F%93", "top=99999999999999999999"])
def test_a_bad_query_is_refused_or_ignored(everyones: Served, query: str) -> None:
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
def test_unknown_paths(everyones: Served, method: str, path: str, status: int) -> None:
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
def test_only_host_names_of_this_machine_are_accepted(everyones: Served, host: str, status: int) -> None:
    with Raw(everyones) as raw:
        raw.send(f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
        result = raw.answer().status
    assert result == status or (status == 421 and result == 400)


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
def test_pages_of_other_sites_are_refused(everyones: Served, origin: str, status: int) -> None:
    with Raw(everyones) as raw:
        raw.send(
            message((GOOD, 1), headers=f"Origin: {origin}\r\n").replace(b"Host: localhost", b"Host: localhost:8000")
        )
        assert raw.answer().status == status


def test_every_line_of_the_log_is_json_whatever_clients_send(server: Served) -> None:
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
        result = list(pool.map(lambda order: answered(server, order), orders))
        for order, answer in zip(orders, result, strict=True):
            assert answer == ([order[1]] if order[0] == GOOD else 500)
        (engine,) = children(server.process.pid)
        before = odd(server)["restarts"]

        slow = pool.submit(answered, server, (SLEEPS, 5, 50))
        time.sleep(0.2)
        orders = [(GOOD, 1), (GOOD, 2), (DIES,), (GOOD, 3)]
        result = list(pool.map(lambda order: answered(server, order), orders))
        assert slow.result() == [5]
    assert result == [[1], [2], 500, [3]], server.events("engine lost")
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


def test_classes_are_what_the_engine_has(everyones: Served) -> None:
    assert odd(everyones)["classes"] == list(CLASSES)
