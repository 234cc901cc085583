"""`suanli serve` in a process of its own, for tests that ask it as others would: over a socket.

    with serving(digits_run(tmp_path_factory), "--grpc-port", "0") as server:
        assert server.ask("GET", "/v2").json()["name"] == "suanli"

Whatever happens, the process and those that it started are gone in the end, and nothing waits without a limit.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import suanli

START = """
import importlib, json, sys
from suanli.cli import main
for name, value in json.loads(sys.argv.pop(1)).items():
    module, _, constant = name.partition(".")
    module = importlib.import_module(f"suanli.serving.{module}")
    assert hasattr(module, constant), name
    setattr(module, constant, value)
main()
"""
SERVING = re.compile(r"Serving on (https?)://(\S+):(\d+)(?:\s+and\s+gRPC\s+on\s+\S+:(\d+))?")
REPLY_S = 60.0


def digits_run(factory: pytest.TempPathFactory, *, epochs: int = 3) -> Path:
    """A run on handwritten digits (8x8, grey), trained once in a session, whichever module and whichever of the
    processes that run tests asks first; its data stays in `cache` beside it. Copy it to write into it."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"digits-{epochs}"
    run = place / "digits"
    place.mkdir(exist_ok=True)
    with FileLock(place / "lock"):
        if not (run / "model" / "model.json").exists():
            suanli.train("digits", epochs=epochs, speedups="none", threads=1, out=run, cache_dir=place / "cache")
    return run


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A server that is running."""

    process: subprocess.Popen[bytes]
    url: str  # "http://127.0.0.1:PORT"
    host: str
    port: int
    grpc_port: int | None
    log_file: Path

    def log(self) -> str:
        """What it has said so far, on standard output and standard error."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def events(self, what: str) -> list[dict[str, Any]]:
        """The lines of its log about one event."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == what]

    def connection(self) -> http.client.HTTPConnection:
        if self.url.startswith("https"):
            anyone = ssl.create_default_context()
            anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
            return http.client.HTTPSConnection(self.host, self.port, timeout=REPLY_S, context=anyone)
        return http.client.HTTPConnection(self.host, self.port, timeout=REPLY_S)

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request over a connection of its own."""
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, dict(headers or {}))
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())

    def ready(self) -> bool:
        try:
            return self.ask("GET", "/v2/health/ready").status == 200
        except OSError:
            return False


def until(true: Callable[[], bool], *, within_s: float, what: str, every_s: float = 0.02) -> None:
    """Waits until it is true. Fails with `what` when it doesn't become so in time."""
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"not within {within_s:g} s: {what}")
        time.sleep(every_s)


@contextlib.contextmanager
def serving(
    subject: Path | str,
    *options: str,
    environment: Mapping[str, str] | None = None,
    constants: Mapping[str, float] | None = None,
    ready: bool = True,
    ready_within_s: float = 90.0,
    end_within_s: float = 60.0,
    exit_code: int | None = 0,
) -> Iterator[Served]:
    """A server of `subject` on a free port of the loopback address, with more options of `suanli serve`. `constants`
    are set in its process, so that tests wait less: {"repository.LOOK_S": 0.2}.

    Waits until it is ready, or with `ready=False` until it listens. Ends it with SIGTERM, unless the test has ended it
    already, and checks its exit code (None: any). Its processes are killed if they don't end.
    """
    with tempfile.TemporaryDirectory(prefix="served-") as place:
        log = Path(place) / "log.txt"
        known = os.environ | {"SUANLI_CACHE": str(Path(place) / "cache"), "NO_COLOR": "1", "COLUMNS": "200"}
        known.pop("SUANLI_API_KEY", None)
        command = [sys.executable, "-c", START, json.dumps(dict(constants or {})), "serve", str(subject)]
        command += ["--port", "0", "--log", "json", *options]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=known | dict(environment or {}),
                start_new_session=True,  # so that all of its processes can be found and ended
            )
        try:
            served = _listening(process, log, ready_within_s)
            if ready:
                until(
                    lambda: process.poll() is not None or served.ready(),
                    within_s=ready_within_s,
                    what=f"ready\n{served.log()}",
                )
                assert process.poll() is None, served.log()
            yield served
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(end_within_s)
            except subprocess.TimeoutExpired:
                pytest.fail(f"the server didn't end within {end_within_s:g} s of SIGTERM\n{served.log()}")
            assert exit_code is None or code == exit_code, served.log()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _listening(process: subprocess.Popen[bytes], log: Path, within_s: float) -> Served:
    """Waits until the server says where it listens."""
    matches: list[re.Match[str]] = []

    def listens() -> bool:
        text = log.read_text(encoding="utf-8", errors="replace")
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}\n{text}")
        matches.extend(SERVING.finditer(text))
        return bool(matches)

    until(listens, within_s=within_s, what="a server that listens")
    scheme, host, port, grpc = matches[0].groups()
    bare = host.strip("[]")
    return Served(process, f"{scheme}://{host}:{port}", bare, int(port), None if grpc is None else int(grpc), log)
