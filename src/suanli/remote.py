"""One training on several hosts, from one command: starts `suanli.node` on each by ssh, and looks after them.

The machine where the command was given holds the store in which the hosts' agents meet, so it is the one that must
not be lost; the connections go through it anyway. What a host is told goes through the standard input of ssh, as JSON:
the command line that a shell there reads holds nothing but the path of Python. A host that is lost is asked again until
it is back.
"""

from __future__ import annotations

import getpass
import json
import os
import queue
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from suanli import preflight, verdict
from suanli.console import say, warn
from suanli.errors import Interrupted, MachineError, SuanliError, UsageError
from suanli.launch import JOIN_S, LOG_LEVEL, RESTARTS, SHUTDOWN_S
from suanli.rendezvous import LOST, LOST_S, address_toward, first_host, is_here, parsed, serve, word
from suanli.rundir import Run
from suanli.stopping import stop_requests
from suanli.types import Json

SSH = "SUANLI_SSH"  # variable with the command, such as "ssh -F my_config"
ALIVE_S = 5
OPTIONS = {
    "BatchMode": "yes",  # a question would wait for ever
    "ConnectTimeout": 10,
    "ServerAliveInterval": ALIVE_S,
    "ServerAliveCountMax": int(LOST_S) // ALIVE_S,
    "ControlPath": "none",  # a connection of its own, which ends with it
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "LogLevel": "ERROR",
}
HOST = re.compile(r"(?:\w[\w.-]*@)?(?:[A-Za-z0-9][\w.-]*|(?=.*:.*:)[0-9A-Fa-f:][0-9A-Fa-f:.]*)", re.ASCII)
UNREACHED = 255  # ssh's own exit code
BEAT_S, LOOK_S, RETRY_S = 2.0, 0.1, 5.0
PASSED = ("SUANLI_CACHE", "SUANLI_DATA", "OMP_NUM_THREADS")
PASSED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_")
LAST_LINES = 5
QUIET = f"{LOG_LEVEL}=ERROR"  # or torch warns of addresses without names


def named(hosts: str | Sequence[str]) -> list[str]:
    """The hosts, checked. Raises UsageError for what no host is called, before anything is started."""
    found = [part.strip() for part in hosts.split(",")] if isinstance(hosts, str) else list(hosts)
    for host in found:
        if not HOST.fullmatch(host):
            raise UsageError(
                f"No host is called {host!r}.",
                fix="Give names or addresses separated by commas, such as a,b or me@10.0.0.2; ports and keys belong "
                "into ~/.ssh/config.",
            )
    if len(set(found)) < len(found):
        raise UsageError("A host is named twice in --hosts.", fix="--nproc says how many processes each has.")
    return found


def train_on_hosts(
    run: Run,
    hosts: Sequence[str],
    arguments: Sequence[str],
    *,
    nproc: str | int | None,
    device: str,
    least: int,
    rendezvous: str | None = None,
    restarts: int = RESTARTS,
) -> None:
    """Trains `run` on these hosts, as `launch.train_together` does on one, from its newest checkpoint.

    Goes on as long as `least` of them are left. Raises what a host raised that no new start can mend; MachineError
    where one can't be reached or doesn't fit; Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved.
    """
    address, port = _address(hosts, rendezvous)
    store = serve(address, port)
    sign = run.path / f".hosts-{secrets.token_hex(8)}"
    wanted: dict[str, Json] = {
        "folder": str(Path.cwd()),
        "run": str(run.path),
        "sign": str(sign),
        "arguments": list(arguments),
        "nproc": "auto" if nproc is None else nproc,
        "device": device,
        "restarts": restarts,
        "versions": preflight.versions(),
        "environment": {k: v for k, v in os.environ.items() if k in PASSED or k.startswith(PASSED_PREFIXES)},
        "meeting": {"host": address, "port": store.port, "least": least, "most": len(hosts)},
    }
    parts = [_Part(host, not _local(host), wanted | {"name": host}) for host in hosts]
    sign.touch()
    try:
        _Overseer(run, parts, store, least).train()
    finally:
        sign.unlink(missing_ok=True)
        for part in parts:
            part.end()


def _local(host: str) -> bool:
    user, _, _ = host.rpartition("@")
    return (not user or user == getpass.getuser()) and is_here(_hostname(host))


def _ssh() -> list[str]:
    return shlex.split(os.environ.get(SSH, "ssh"))


def _hostname(host: str) -> str:
    """The address behind a name, which may be one of ssh's configuration."""
    try:
        told = subprocess.run([*_ssh(), "-G", "--", host], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(
            f"{_ssh()[0]} can't be asked for {host}: {error}.", fix="Install OpenSSH's client."
        ) from error
    found = re.search(r"^hostname (.+)$", told.stdout, re.MULTILINE)
    return found[1] if found else host.rpartition("@")[2]


def _address(hosts: Sequence[str], rendezvous: str | None) -> tuple[str, int]:
    """Where this machine's store listens. Raises MachineError where no address is known by which hosts reach it."""
    if rendezvous is not None:
        return parsed(rendezvous)
    away = [host for host in hosts if not _local(host)]
    if not away:
        return "127.0.0.1", 0
    for host in away:
        if (found := address_toward(_hostname(host))) is not None:
            return found, 0
    raise MachineError(
        f"This machine can't tell by which of its addresses {away[0]} reaches it.",
        fix="Check the name; or give --rendezvous ADDRESS:PORT with an address of this machine.",
    )


@dataclass
class _Part:
    """One host's process, as seen from here: ssh, or the process itself."""

    host: str
    away: bool
    wanted: dict[str, Json]
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False  # now
    took_part: bool = False  # ever
    done: bool = False
    error: dict[str, Json] | None = None
    again_at: float = 0.0
    said: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    def start(self, lines: queue.SimpleQueue[tuple[str, str]]) -> None:
        self.ready, self.error = False, None
        self.said.clear()
        self.process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes to this process, which passes it on
        )
        self._readers = [
            threading.Thread(target=self._answers, args=(self.process,), daemon=True),
            threading.Thread(target=self._lines, args=(self.process, lines), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.write(json.dumps(self.wanted))

    def _command(self) -> list[str]:
        path = os.environ.get("PYTHONPATH")
        node = ["env", QUIET, *([f"PYTHONPATH={path}"] if path else []), sys.executable, "-m", "suanli.node"]
        if not self.away:
            return node
        options = [f"-o{name}={value}" for name, value in OPTIONS.items()]
        return [*_ssh(), "-T", *options, "--", self.host, f"exec {shlex.join(node)}"]

    def write(self, line: str) -> None:
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError, ValueError):
                self.process.stdin.write(f"{line}\n".encode())
                self.process.stdin.flush()

    def _answers(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):
                told = json.loads(line)
                self.ready = self.ready or bool(told.get("ready"))
                self.took_part = self.took_part or self.ready
                self.error = told.get("error", self.error)

    def _lines(self, process: subprocess.Popen[bytes], lines: queue.SimpleQueue[tuple[str, str]]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.decode(errors="replace").rstrip()
            self.said.append(text)
            if self.ready:  # before, it becomes part of an error
                lines.put((self.host, text))

    def ended(self) -> int | None:
        """The exit code, once all that it said has been read."""
        if self.process is None or self.process.poll() is None:
            return None
        for reader in self._readers:
            reader.join(2)
        return self.process.returncode

    def end(self) -> None:
        """Lets go of the process: what is left of it on the host sees that, and ends."""
        if self.process is None:
            return
        with suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        self.process = None


class _Overseer:
    def __init__(self, run: Run, parts: Sequence[_Part], store: TCPStore, least: int) -> None:
        self.run, self.parts, self.store, self.least = run, parts, store, least
        self.lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.first: str | None = None
        self.problem: SuanliError | None = None

    def train(self) -> None:
        say(f"training on {', '.join(part.host for part in self.parts)}")
        for part in self.parts:
            part.start(self.lines)
        beat_at, alone_since = 0.0, time.monotonic()
        with stop_requests() as stop:
            while self.problem is None and not any(part.done for part in self.parts):
                time.sleep(LOOK_S)
                now = time.monotonic()
                if stop.by is not None:
                    self._stop(stop.by)
                    return
                if now - beat_at > BEAT_S:
                    beat_at = now
                    self._beat()
                self._tell()
                for part in self.parts:
                    self._look(part, now)
                if any(part.process is not None and (part.ready or not part.took_part) for part in self.parts):
                    alone_since = now
                elif now - alone_since > JOIN_S:
                    raise MachineError("No host can be reached any more.", fix=self._go_on())
            self._wait_for_all()
        if (found := word(self.store)) is not None:
            raise verdict.error(found)
        if self.problem is not None:
            raise self.problem

    def _go_on(self) -> str:
        return f"To go on from the last checkpoint: suanli train {self.run.path}, with --hosts as before."

    def _beat(self) -> None:
        for part in self.parts:
            part.write(".")
        with suppress(*LOST):
            self.first = first_host(self.store, [p.host for p in self.parts if p.process and p.ready]) or self.first

    def _tell(self) -> None:
        """What hosts said. The one with the first process speaks for all, others by name."""
        with suppress(queue.Empty):
            while True:
                host, line = self.lines.get_nowait()
                print(line if host == self.first else f"{host}: {line}", file=sys.stderr, flush=True)

    def _look(self, part: _Part, now: float) -> None:
        if part.process is None:
            if now > part.again_at:
                part.start(self.lines)
            return
        code = part.ended()
        if code is None:
            return
        part.done = code == 0
        if part.done:
            return
        known = [line for line in part.said if line.strip()]
        why = known[-1] if known else f"exit code {code}"
        others = sum(p is not part and p.process is not None for p in self.parts)
        if part.error is not None and part.took_part and not part.ready and others >= self.least:
            self._lost(part, str(part.error["message"]))  # it came back as another one than it was
        elif part.error is not None:
            self.problem = verdict.error(part.error)
        elif part.took_part:
            self._lost(part, "the connection broke" if code == UNREACHED else f"it ended with exit code {code}")
        elif code == UNREACHED:
            if others >= self.least:
                self._lost(part, why)
            else:
                self.problem = MachineError(
                    f"{part.host} can't be reached (exit code {code} of ssh): {why.rstrip('.')}.",
                    fix=f"`ssh {part.host} true` must work without a question: a key, and the host in known_hosts.",
                )
        else:
            self.problem = MachineError(
                f"suanli can't be started on {part.host} (exit code {code}): {why.rstrip('.')}.",
                fix=f"It must be installed there at the same path: {sys.executable}.",
            )

    def _lost(self, part: _Part, why: str) -> None:
        if part.again_at == 0.0 or part.ready:
            warn(f"{part.host} is lost: {why.rstrip('.')}. It is asked again until it is back.")
        part.end()
        part.again_at = time.monotonic() + RETRY_S

    def _stop(self, number: int) -> None:
        for part in self.parts:
            part.write(f"stop {number}")
        self._wait_for_all()
        told = [part.error for part in self.parts if part.error is not None]
        if told:
            raise verdict.error(told[0])
        raise Interrupted("Stopped.", fix=self._go_on())

    def _wait_for_all(self) -> None:
        """Until every host's process has ended; those that don't are ended."""
        end = time.monotonic() + SHUTDOWN_S + LOST_S
        if self.problem is not None:
            for part in self.parts:
                part.write("stop 15")
        while time.monotonic() < end and any(p.process is not None and p.ended() is None for p in self.parts):
            self._beat()
            self._tell()
            time.sleep(LOOK_S)
        self._tell()
        for part in self.parts:
            if self.problem is None and part.error is not None:
                self.problem = verdict.error(part.error)
