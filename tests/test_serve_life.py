"""The life of a server: starting, keys, signals, overload, and models that change while they are asked."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostile import (
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
    register,
    request,
)
from served import Served, serving, until
from suanli.cli import main
from suanli.core.errors import DataError, UsageError
from suanli.verbs.serve import serve
from wire import INFER, Raw, answered, children, descriptors, file_of, is_there, message, odd, read

LOOK_S = 0.4  # between two looks at a folder of models; else a second
LOOKS = {"repository.LOOK_S": LOOK_S}


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with register() as result:
        yield result


def test_readiness_while_a_model_comes_up(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = engines(tmp_path / "odd", load="time.sleep(1)")
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
        end = time.monotonic() + 2.5

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


def test_waiting_connections_make_room_and_busy_ones_do_not(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = engines(tmp_path / "odd", batch_ms=10)
    with serving(subject, environment=environment, constants={"connection.MAX_CONNECTIONS": 4}) as server:
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(contextlib.closing(server.connection())) for _ in range(9)]
            for connection in waiting:
                connection.request("GET", "/v2/health/live")
                assert connection.getresponse().read() == b'{"live": true}'
            assert server.ask("GET", "/v2/health/live").status == 200
            assert waiting[0].sock.recv(1) == b""  # closed: it had waited longest
            waiting[-1].request("GET", "/v2/health/live")
            assert waiting[-1].getresponse().status == 200
        busy = [Raw(server) for _ in range(4)]
        with contextlib.ExitStack() as stack:
            for number, one in enumerate(busy):
                stack.enter_context(one).send(message((SLEEPS, number, 100)))
            until(lambda: server.ask("GET", "/v2/health/live").status == 503, within_s=5, what="too many in use")
            refused = server.ask("GET", "/v2/health/live")
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert "too many connections" in refused.json()["error"]
            assert [read(one.answer()) for one in busy] == [[number] for number in range(4)]
        until(lambda: server.ask("GET", "/v2/health/live").status == 200, within_s=5, what="room again")


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


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str], environment: dict[str, str]) -> Callable[..., tuple[int, str]]:  # noqa: ARG001
    """Exit code and output of a server that can't start."""

    def started(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["serve", *words, "--log", "json"])
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, " ".join((output.out + output.err).split())

    return started


Start = Callable[..., tuple[int, str]]


def test_a_port_in_use_is_an_error(tmp_path: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, output = start(str(engines(tmp_path / "odd")), "--port", str(port))
    assert code == 4, output
    assert f"Port {port}" in output


def test_a_folder_without_a_model_is_an_error(tmp_path: Path, start: Start) -> None:
    (tmp_path / "models" / "notes").mkdir(parents=True)
    code, output = start(str(tmp_path / "models"), "--port", "0")
    assert code == 3, output
    assert "models" in output
    with pytest.raises(DataError, match="nothing"):
        serve(tmp_path / "nothing", port=0)


def test_an_engine_that_does_not_come_up_is_an_error(tmp_path: Path, start: Start) -> None:
    subject = engines(tmp_path / "odd", load="raise ValueError('no luck today')")
    code, output = start(str(subject), "--port", "0")
    assert code == 4, output
    assert "no luck today" in output


def certificate(place: Path, name: str) -> tuple[Path, Path]:
    """A certificate and its key, for a day."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the command openssl")
    key, cert = place / f"{name}.key", place / f"{name}.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True, timeout=60)
    return cert, key


def test_tls(tmp_path: Path, environment: dict[str, str], start: Start) -> None:
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
    code, output = start(str(subject), "--port", "0", "--tls-cert", str(cert), "--tls-key", str(other))
    assert code == 2, output


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


@pytest.mark.parametrize("source", ["file", "environment"])
def test_an_api_key(tmp_path: Path, environment: dict[str, str], source: str) -> None:
    key = "correct-horse_7"
    (tmp_path / "key").write_text(key + "\n")
    options = ("--api-key-file", str(tmp_path / "key")) if source == "file" else ()
    more = {} if source == "file" else {"SUANLI_API_KEY": key}
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
def test_an_invalid_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match="API key"):
        serve(tmp_path, port=0, api_key_file=tmp_path / "key")


# --- models that change ---


def test_models_are_replaced_under_load_without_a_lost_request(tmp_path: Path, environment: dict[str, str]) -> None:
    """Three times because somebody asks for it, twice because the folder has changed."""
    folder = tmp_path / "models" / "odd"
    engines(folder)
    with serving(tmp_path / "models", environment=environment, constants=LOOKS) as server:
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
    """What is new, broken, repaired and removed; a model that can't be loaded changes nothing."""
    models = tmp_path / "models"
    engines(models / "odd" / "1")
    with serving(models, environment=environment, constants=LOOKS) as server:

        def index() -> dict[tuple[str, str], str]:
            result = server.ask("POST", "/v2/repository/index").json()
            return {(entry["name"], entry["version"]): entry["state"] for entry in result}

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

        # A new one that is broken has an error; the others stay.
        (models / "worse").mkdir()
        (models / "worse" / "model.json").write_text('{"format": 1}')
        until(lambda: index().get(("worse", "1")) == "UNAVAILABLE", within_s=30, what="a broken one")
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("POST", "/v2/models/worse/infer", *request((GOOD, 0))).status in (404, 503)
        assert answered(server, (GOOD, 0)) == [2]
        shutil.rmtree(models / "worse")

        # Repaired, unloaded, loaded and removed.
        engines(models / "even", offset=6)
        until(
            lambda: read(server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0)))) == [6],
            within_s=30,
            what="the repaired one",
        )
        until(server.ready, within_s=10, what="ready")
        assert server.ask("POST", "/v2/repository/models/even/unload").status == 200
        assert server.ask("POST", "/v2/models/even/infer", *request((GOOD, 0))).status == 404
        assert ("even", "1") not in index() or index()["even", "1"] == "UNAVAILABLE"
        assert server.ask("POST", "/v2/repository/models/even/unload").status == 404
        time.sleep(3 * LOOK_S)  # it doesn't come back by itself
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
    with serving(models, environment=environment, constants=LOOKS) as server:
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
            loads = [pool.submit(server.ask, "POST", "/v2/repository/models/odd/load") for _ in range(4)]
            assert [one.result().status for one in loads] == [200] * 4
        until(lambda: len(children(server.process.pid)) == 1, within_s=10, what="one engine")
        assert answered(server, (GOOD, 0)) == [0]


def test_models_stay_loaded_while_their_folder_is_missing_for_a_moment(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Who copies a new model over an old one may remove that first."""
    models = tmp_path / "models"
    engines(models / "odd")
    engines(tmp_path / "next", offset=1)
    with serving(models, environment=environment, constants=LOOKS) as server:
        clients = Clients(server, 2, lambda _: (GOOD, 0))
        for turn in range(2):
            until(lambda: clients.count("answered") > 0, within_s=10, what="an answer")
            shutil.rmtree(models / "odd")
            time.sleep(0.5 * LOOK_S)  # less than two looks
            shutil.copytree(tmp_path / "next", models / "odd")
            time.sleep(0.3 * turn * LOOK_S)
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
def test_crashes_overload_and_clients_that_leave_all_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
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
