"""Servers as processes: starting, stopping, and measuring them. Linux only: it reads /proc."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    pids = [pid]
    for one in pids:  # it grows during the loop
        pids += parents.get(one, [])
    return pids


def memory_bytes(pid: int) -> int:
    """Of all processes together; pages that they share count once."""
    total = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def send(pid: int, number: signal.Signals) -> None:
    for one in tree(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)


def free_port() -> int:
    """The first of three free ones in a row."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for more in (1, 2):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + more))
                return port


def peer(
    python: Path | str, script: str, path: str, **environment: str
) -> contextlib.AbstractContextManager[tuple[int, int]]:
    """Runs a script of this folder with arguments, the last of them a port. Yields the port and the process, once
    `path` is answered with 200."""
    name, *arguments = script.split()
    return running([str(python), str(HERE / name), *arguments], path, environment)


def served(model: Path, *options: str) -> contextlib.AbstractContextManager[tuple[int, int]]:
    """Runs `suanli serve` on a model. Yields its port and its process, once it is ready."""
    command = [sys.executable, "-m", "suanli", "serve", str(model), *options, "--port"]
    return running(command, "/v2/health/ready", {})


@contextlib.contextmanager
def running(command: Sequence[str], path: str, environment: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    port = free_port()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, str(port)], stdout=output, stderr=output, env=os.environ | dict(environment)
        )
        try:
            until = time.monotonic() + 120
            while not answers(port, path):
                if time.monotonic() > until or process.poll() is not None:
                    output.seek(0)
                    sys.exit(f"{' '.join(command)} did not start:\n{output.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            for one in reversed(tree(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            process.wait()


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def has(python: Path | None, package: str) -> bool:
    if python is None:
        return False
    result = subprocess.run([str(python), "-c", f"import {package}"], capture_output=True, check=False)
    return result.returncode == 0


class MemoryWatch:
    """The memory of a server, once a second, while the block runs."""

    def __init__(self, pid: int) -> None:
        self.pid, self.values = pid, [memory_bytes(pid)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(1.0):
            self.values.append(memory_bytes(self.pid))

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.values.append(memory_bytes(self.pid))
