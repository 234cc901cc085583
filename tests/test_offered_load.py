"""The generator of load against servers that answer, stall, refuse and die in known ways, on real sockets."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suanli import building
from suanli.errors import DataError, UsageError
from suanli.loads import Figures, Load, ServerGone, Stretch, Target, figures, held
from suanli.offered_load import Generator, offer
from suanli.plugins import load as load_plugin
from suanli.saved import save_model
from suanli.serving import protocol
from suanli.types import Recipe
from suanli.verbs._bench_serve import bench_serve, started, table
from suanli.verbs._payloads import payload

BODY = b"x" * 10_000


@dataclass(frozen=True)
class Request:
    number: int  # from 1
    path: bytes


Behaviour = Callable[[asyncio.StreamWriter, Request], Awaitable[None]]


class Server:
    """Reads requests, and does with each what `behave` says, on a port of its own."""

    def __init__(self, behave: Behaviour, *, read_first: bool = True, tls: ssl.SSLContext | None = None) -> None:
        self.behave, self.read_first, self.tls = behave, read_first, tls
        self.requests = self.connections = 0
        self.bodies: list[bytes] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._tasks: set[asyncio.Task[None]] = set()
        ready = threading.Event()
        self._loop.call_soon(ready.set)
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0, limit=1 << 20, ssl=tls)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread.start()
        ready.wait(5)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # transports close

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                size = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                self.requests += 1
                request = Request(self.requests, head.split(b" ")[1])
                if not self.read_first:
                    await self.behave(writer, request)
                self.bodies = [*self.bodies[-3:], await reader.readexactly(size)]
                if self.read_first:
                    await self.behave(writer, request)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort()

    def stop(self) -> None:
        """As if its process died: nothing listens, all connections are reset."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(10)

    def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        self._loop.call_later(0.05, self._loop.stop)


def answer(status: int = 200, body: bytes = b"{}", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def after(delay_s: float, reply: bytes | None = None) -> Behaviour:
    async def behave(writer: asyncio.StreamWriter, _: Request) -> None:
        await asyncio.sleep(delay_s)
        writer.write(reply or answer())

    return behave


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made = []

    def start(behave: Behaviour, **options: object) -> Server:
        made.append(Server(behave, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for server in made:
        server.stop()


def target(server: Server) -> Target:
    return Target.of(f"{server.url}/infer?x=1", [BODY], {"X-Kind": "test"})


def closed(seconds: float = 0.5, clients: int = 8, **more: float) -> Load:
    return Load(rate_per_s=None, connections=clients, seconds=seconds, **more)  # type: ignore[arg-type]


def even(rate_per_s: float, seconds: float = 0.5, connections: int = 32, **more: float) -> Load:
    return Load(rate_per_s=rate_per_s, connections=connections, seconds=seconds, arrivals="even", **more)  # type: ignore[arg-type]


# --- how it counts ---


def test_a_closed_loop_asks_again_once_it_is_answered(serve: Callable[..., Server]) -> None:
    server = serve(after(0.02))
    found = offer(target(server), closed())
    assert found.offered == server.requests == len(found.accepted_us)
    assert 60 <= found.offered <= 8 * (0.5 / 0.02 + 1)  # 8 clients; a busy machine may answer fewer
    assert server.connections == 8
    assert min(found.accepted_us) >= 20_000
    assert server.bodies[-1] == BODY
    assert not found.errors


def test_an_open_loop_asks_when_it_is_due(serve: Callable[..., Server]) -> None:
    server = serve(after(0.03))
    found = offer(target(server), even(100))
    assert found.offered == server.requests == len(found.accepted_us) == 49
    assert min(found.accepted_us) >= 30_000
    assert 0.5 < found.answered_s < 3  # the last was due at 490 ms, and is counted, too
    assert found.answered_per_s == 49 / found.answered_s
    assert found.waited == 0


def test_a_stall_shows_in_all_that_were_due_meanwhile(serve: Callable[..., Server]) -> None:
    """The point of an open loop: a server that stands still for half a second."""

    def stalling() -> Behaviour:
        async def behave(writer: asyncio.StreamWriter, request: Request) -> None:
            if request.number == 20:
                time.sleep(0.5)  # everybody waits
            writer.write(answer())

        return behave

    found = offer(target(serve(stalling())), even(100, seconds=1.0, connections=4))
    one = figures([found])
    assert sum(us > 50_000 for us in found.accepted_us) > 40
    assert one.p99_ms is not None
    assert one.p99_ms > 450
    assert one.waited > 30  # four connections were soon taken
    other = offer(target(serve(stalling())), closed(seconds=1.0, clients=1))
    assert sum(us > 400_000 for us in other.accepted_us) == 1  # a closed loop hides it: nobody asked


def test_a_request_that_finds_no_connection_waits_and_that_counts(serve: Callable[..., Server]) -> None:
    found = offer(target(serve(after(0.02))), even(100, connections=1))
    assert found.offered == len(found.accepted_us) == 49
    assert found.waited > 30
    assert max(found.accepted_us) > 400_000  # 49 requests of 20 ms one after another, the last due at 490 ms
    assert found.answered_per_s <= 50  # as fast as it goes, though that took longer than the load


def test_refusals_and_failures_are_counted_apart(serve: Callable[..., Server]) -> None:
    replies = [answer(), answer(503, b"full", "Retry-After: 1\r\n"), answer(503, b""), answer(400, b'{"error": "no"}')]

    async def behave(writer: asyncio.StreamWriter, request: Request) -> None:
        writer.write(replies[request.number % 4])

    found = offer(target(serve(behave)), even(82))  # 40 requests
    assert len(found.accepted_us) == 10
    assert len(found.refused_us) == len(found.refused_sent_us) == 20
    assert found.without_retry_after == 10
    assert found.errors == {"HTTP 400": 10}
    assert found.said == '{"error": "no"}'
    one = figures([found, found])
    assert (one.requests, one.rounds, one.seconds) == (80, 2, 1.0)
    assert (one.refused_per_s, one.errors_per_s) == (40, 20)
    assert 15 <= one.answered_per_s <= 20  # one that was due last may have come too late


def test_a_refused_client_of_a_closed_loop_pauses(serve: Callable[..., Server]) -> None:
    server = serve(after(0, answer(503, b"", "Retry-After: 1\r\n")))
    found = offer(target(server), closed(clients=1))
    assert 10 <= len(found.refused_us) == found.offered == server.requests <= 51


# --- what servers do ---


def test_answers_come_in_any_pieces(serve: Callable[..., Server]) -> None:
    reply = answer(body=b"y" * 5000, extra="X-Kind: a\r\ncontent-type: b\r\n")

    async def behave(writer: asyncio.StreamWriter, request: Request) -> None:
        for at in (0, 1, 20 + request.number, 200, 2000):
            later = next(n for n in (1, 20 + request.number, 200, 2000, len(reply)) if n > at)
            writer.write(reply[at:later])
            await writer.drain()
            await asyncio.sleep(0.001)

    found = offer(target(serve(behave)), even(100))
    assert len(found.accepted_us) == 49
    assert not found.errors


def test_a_server_that_closes_each_connection_is_asked_over_new_ones(serve: Callable[..., Server]) -> None:
    async def behave(writer: asyncio.StreamWriter, _: Request) -> None:
        writer.write(answer(extra="Connection: close\r\n"))
        await writer.drain()
        writer.close()

    server = serve(behave)
    found = offer(target(server), even(100, connections=2))
    assert len(found.accepted_us) == 49
    assert server.connections >= 49
    assert not found.errors


def test_a_server_that_closes_idle_connections_is_no_error(serve: Callable[..., Server]) -> None:
    async def behave(writer: asyncio.StreamWriter, _: Request) -> None:
        writer.write(answer())
        asyncio.get_running_loop().call_later(0.02, writer.close)

    found = offer(target(serve(behave)), even(10, connections=1))
    assert len(found.accepted_us) == 4
    assert not found.errors


def test_a_refusal_may_come_before_the_body_is_read(serve: Callable[..., Server]) -> None:
    server = serve(after(0, answer(503, b"", "Retry-After: 1\r\n")), read_first=False)
    large = Target.of(server.url, [b"z" * 3_000_000])
    found = offer(large, even(50, connections=4))
    assert len(found.refused_us) == 24
    assert not found.errors
    assert server.connections == 4  # it goes on with the same ones


def test_requests_without_an_answer_are_given_up(serve: Callable[..., Server]) -> None:
    server = serve(after(60))
    started = time.perf_counter()
    found = offer(target(server), even(100, seconds=0.3, connections=4, timeout_s=0.4))
    assert time.perf_counter() - started < 3
    assert found.errors == {"no answer in time": 29}


def test_what_is_no_http_is_an_error_and_ends(serve: Callable[..., Server]) -> None:
    found = offer(target(serve(after(0, b"SSH-2.0-nothing\r\n\r\n"))), even(50, seconds=0.2))
    assert found.errors == {"no HTTP answer with Content-Length": 9}
    unknown = answer().replace(b"Content-Length: 2\r\n", b"")
    found = offer(target(serve(after(0, unknown))), even(50, seconds=0.2))
    assert found.errors == {"no HTTP answer with Content-Length": 9}


def test_a_server_that_dies_midway_is_told_at_once(serve: Callable[..., Server]) -> None:
    server = serve(after(0.001))
    threading.Timer(0.3, server.stop).start()
    started = time.perf_counter()
    with pytest.raises(ServerGone, match=r"was gone after \d+ answers"):
        offer(target(server), even(100, seconds=30))
    assert time.perf_counter() - started < 10


def test_a_server_that_is_not_there(serve: Callable[..., Server]) -> None:
    server = serve(after(0))
    server.stop()
    with pytest.raises(ServerGone, match="No connection"):
        offer(target(server), closed())


def test_tls(serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl, which makes a certificate")
    made = [
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    command = [
        "openssl",
        "req",
        "-x509",
        *made,
        "-keyout",
        str(tmp_path / "key.pem"),
        "-out",
        str(tmp_path / "cert.pem"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def behave(writer: asyncio.StreamWriter, request: Request) -> None:
        last = request.number % 5 == 0
        writer.write(answer(body=b"y" * 100_000, extra="Connection: close\r\n" if last else ""))
        await writer.drain()
        if last:
            writer.close()

    server = serve(behave, tls=context)
    with pytest.raises(ServerGone, match="certificate"):
        offer(target(server), closed())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    found = offer(target(server), even(60, connections=2))
    assert len(found.accepted_us) == 29
    assert not found.errors


# --- in a process of its own ---


def test_the_process_measures_the_same(serve: Callable[..., Server]) -> None:
    server = serve(after(0.02))
    with Generator(target(server)) as generator:
        first, second = generator.offer(even(100)), generator.offer(closed(seconds=0.2))
        assert first.offered == 49
        assert min(first.accepted_us) >= 20_000
        assert len(second.accepted_us) == second.offered
        assert first.offered + second.offered == server.requests
        assert server.connections == 32  # they stay open
        server.stop()
        with pytest.raises(ServerGone, match="No connection"):
            generator.offer(even(100))


# --- figures ---


@given(rate=st.floats(1, 2000), seconds=st.floats(0.01, 2), seed=st.integers(0, 9))
def test_moments_are_in_order_and_in_time(rate: float, seconds: float, seed: int) -> None:
    for arrivals in ("even", "poisson"):
        load = Load(rate_per_s=rate, connections=1, seconds=seconds, arrivals=arrivals, seed=seed)  # type: ignore[arg-type]
        moments = list(load.moments(5.0))
        assert moments == sorted(moments) == list(load.moments(5.0))
        assert all(5.0 < moment < 5.0 + seconds for moment in moments)
        if arrivals == "even":
            assert abs(len(moments) - rate * seconds) <= 1
        else:
            assert abs(len(moments) - rate * seconds) <= 6 * (rate * seconds) ** 0.5 + 6


@pytest.mark.parametrize(
    "values",
    [{"rate_per_s": 0.0}, {"rate_per_s": 1e9}, {"connections": 0}, {"connections": 10**6}, {"seconds": 0.0},
     {"seconds": float("nan")}, {"seconds": 1e9}, {"timeout_s": 0.0}],
)  # fmt: skip
def test_loads_that_cannot_be(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Load(**({"rate_per_s": 10.0, "connections": 1, "seconds": 1.0} | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://a", "http://", "http://a:b", "http://a:0", "http://[1", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError):
        Target.of(url, [b""])


def stretch(offered: int, accepted_us: list[int], refused: int = 0, lag_ms: float = 0.1) -> Stretch:
    return Stretch(
        rate_per_s=float(offered),
        seconds=1.0,
        offered=offered,
        answered_s=1.0,
        accepted_us=accepted_us,
        refused_us=[2000] * refused,
        refused_sent_us=[1000] * refused,
        without_retry_after=0,
        errors={},
        said="",
        waited=0,
        lag_ms_p99=lag_ms,
        lag_ms_max=lag_ms,
        cpu_share=0.2,
    )


def test_figures_of_rounds() -> None:
    found = figures([stretch(100, [1000 * n for n in range(1, 101)]), stretch(100, [1000] * 98, refused=2)])
    assert found.requests == 200
    assert found.offered_per_s == 100
    assert found.answered_per_s == 99
    assert found.p50_ms == pytest.approx(2, abs=1)
    assert found.max_ms == 100
    assert found.refused_p99_ms == 2
    assert found.refused_sent_p99_ms == 1
    assert not found.limited
    assert figures([stretch(10, [1000] * 10, lag_ms=50)]).limited


def test_figures_of_nothing_that_was_answered() -> None:
    found = figures([stretch(10, [])])
    assert found.p50_ms is found.p99_ms is found.refused_max_ms is None
    assert held([found]) is None


def test_held_is_the_last_before_the_first_that_is_not() -> None:
    def load(rate: int, ms: int, refused: int = 0) -> Figures:
        return figures([stretch(rate, [1000 * ms] * (rate - refused), refused)])

    low, middle, slow, high = load(10, 5), load(50, 10), load(70, 11), load(90, 5)
    assert held([low, middle, slow, high]) == middle
    assert held([high, middle, low]) == high
    assert held([low, load(50, 5, refused=2), high]) == low


# --- requests, and the verb ---


@pytest.fixture
def model(serve: Callable[..., Server]) -> Server:
    """Speaks as much of the protocol as is asked, and has one model."""
    about = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}], "versions": ["2"]}
    replies = {
        b"/v2/repository/index": [{"name": "a b", "state": "READY"}, {"name": "c", "state": "UNAVAILABLE"}],
        b"/v2/models/a%20b": about | {"platform": "test"},
        b"/v2/models/text": {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}]},
        b"/v2/models/open": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]},
        b"/v2/models/real": {"inputs": [{"name": "x", "datatype": "FP16", "shape": [2, 3]}]},
        b"/v2/models/two": {"inputs": []},
    }

    async def behave(writer: asyncio.StreamWriter, request: Request) -> None:
        if request.path.endswith(b"/infer"):
            await asyncio.sleep(0.004)
            writer.write(answer(503, b"", "Retry-After: 1\r\n") if request.number % 200 == 0 else answer())
        elif request.path in replies:
            writer.write(answer(body=json.dumps(replies[request.path]).encode()))
        else:
            writer.write(answer(404, b"what?"))

    return serve(behave)


def parsed(asked: object) -> list[protocol.InferRequest]:
    bodies, headers = asked.bodies, asked.headers  # type: ignore[attr-defined]
    return [protocol.parse(body, int(headers[protocol.HEADER_LENGTH])) for body in bodies]


def test_requests_of_pixels(model: Server) -> None:
    asked = payload(model.url, {"X-Key": "k"}, rows=3, files=[])
    assert (asked.model, asked.version, asked.platform, asked.engine) == ("a b", "2", "test", None)
    assert asked.url == f"{model.url}/v2/models/a%20b/infer"
    assert asked.headers["X-Key"] == "k"
    requests = parsed(asked)
    assert len(set(asked.bodies)) == len(requests) == 16
    for request in requests:
        (tensor,) = request.inputs
        assert (tensor.name, tensor.datatype, tensor.shape) == ("image", "UINT8", (3, 8, 8, 3))
        assert request.binary_output
    assert len(np.unique(requests[0].inputs[0].data)) > 100
    assert payload(model.url, {}, rows=3, files=[]).bodies == asked.bodies


def test_requests_of_texts_and_numbers(model: Server) -> None:
    (tensor,) = parsed(payload(f"{model.url}/v2/models/text", {}, rows=2, files=[]))[0].inputs
    assert tensor.shape == (2,)
    assert all(text.decode().isascii() and len(text) > 50 for text in tensor.data)
    (tensor,) = parsed(payload(f"{model.url}/v2/models/real", {}, rows=1, files=[]))[0].inputs
    assert tensor.data.dtype == np.float16  # type: ignore[union-attr]
    assert tensor.shape == (2, 3)


def test_requests_of_files(model: Server, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]) * (number + 1))
    (tmp_path / "notes.txt").write_text("no picture")
    requests = parsed(payload(model.url, {}, rows=2, files=[tmp_path]))
    assert [request.inputs[0].data for request in requests] == [[b"\0", b"\1\1"], [b"\2\2\2", b"\0"]]
    with pytest.raises(DataError, match="can't be read"):
        payload(model.url, {}, rows=1, files=[tmp_path / "none.png"])


@pytest.mark.parametrize(
    ("path", "rows", "error"),
    [("/v2/models/none", 1, DataError), ("/v2/models/two", 1, DataError), ("/other", 1, UsageError),
     ("/v2/models/open", 1, UsageError), ("/v2/models/real", 3, UsageError), ("", 0, UsageError)],
)  # fmt: skip
def test_models_that_cannot_be_asked(model: Server, path: str, rows: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        payload(model.url + path, {}, rows=rows, files=[])


@pytest.mark.slow
def test_the_verb_leaves_a_page_and_figures(model: Server, tmp_path: Path) -> None:
    out = tmp_path / "load"
    found = bench_serve(model.url, seconds=4, clients=4, out=out)
    saved = json.loads((out / "load.json").read_text())
    assert saved == json.loads(json.dumps(found.to_json()))
    assert 200 < found.capacity.answered_per_s < 1000  # 4 clients, 4 ms
    offered = [load["offered_per_s"] for load in saved["loads"]]
    assert len(offered) == 8
    assert 0.03 < offered[0] / found.capacity.answered_per_s < 0.2
    assert 1 < offered[-1] / found.capacity.answered_per_s < 1.7
    page = (out / "load.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace(model.url, "")
    from rich.console import Console

    console = Console(width=120, file=io.StringIO())
    console.print(table(found))
    assert "offered/s" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UsageError):
        bench_serve(model.url, seconds=4, out=out)  # it is taken


def test_subjects_and_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at"):
        bench_serve(tmp_path / "none", out=tmp_path / "out")
    with pytest.raises(UsageError):
        bench_serve("http://127.0.0.1:1", seconds=0.1)
    with pytest.raises(ServerGone):
        bench_serve("http://127.0.0.1:1", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_is_served_for_it_and_the_server_ends(tmp_path: Path) -> None:
    kind = load_plugin("preprocess", "image")
    preprocess = kind(height=16, width=16, channels=3)
    recipe = Recipe(name="test", model="speednet")
    module = building.build(recipe, preprocess, 3)
    folder = tmp_path / "small"
    save_model(folder, module, recipe=recipe, preprocess=preprocess, classes=("a", "b", "c"), data={})
    with started(folder) as (url, pid):
        asked = payload(url, {}, rows=2, files=[])
        assert (asked.model, asked.engine, asked.told) == ("small", "eager", "UINT8 [2, 16, 16, 3]")
        found = offer(Target.of(asked.url, asked.bodies, asked.headers), closed(clients=2))
        assert found.accepted_us
        assert not found.errors
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ServerGone, match=r"suanli serve ended\. .*model\.json"), started(tmp_path):
        pass
