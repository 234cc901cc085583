"""Load from h2load, which logs every request: the package nghttp2-client of Debian and Ubuntu, nghttp2 of Homebrew."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from suanli.core.types import Json
from suanli.machine.timing import percentile

CONNECTIONS = 256  # at most, of an open loop
GRPC = {"content-type": "application/grpc", "te": "trailers"}


@dataclass(frozen=True, kw_only=True)
class Target:
    url: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers within some seconds. h2load doesn't read the status of gRPC: there, every answer counts as
    accepted."""

    seconds: float
    accepted_ms: Sequence[float]
    refused_ms: Sequence[float]
    failed: int

    @property
    def per_s(self) -> float:
        return len(self.accepted_ms) / self.seconds

    @property
    def p99_ms(self) -> float:
        return percentile(self.accepted_ms, 0.99) if self.accepted_ms else math.inf

    @property
    def refused_p99_ms(self) -> float | None:
        return percentile(self.refused_ms, 0.99) if self.refused_ms else None

    def to_json(self) -> Json:
        values = {name: getattr(self, name) for name in ("seconds", "per_s", "p99_ms", "refused_p99_ms", "failed")}
        return values | {"accepted": len(self.accepted_ms), "refused": len(self.refused_ms)}


def closed(target: Target, clients: int, seconds: float) -> Answers:
    """A closed loop: each client sends its next request when it has the answer to the last."""
    return _run(target, ["-c", str(clients), "-D", f"{round(1000 * seconds)}ms", "--warm-up-time", "500ms"], seconds)


def offered(target: Target, per_s: float, seconds: float) -> Answers:
    """An open loop: requests at even intervals of whole milliseconds, several at once where that is too slow.
    Connections open one after the other and keep their own pace, so that they don't all send at the same moment."""
    every_ms = max(1, math.floor(1000 / per_s))
    at_once = math.ceil(per_s * every_ms / 1000)
    per_s = 1000 * at_once / every_ms
    connections = max(1, min(CONNECTIONS, int(per_s * seconds)))
    count = connections * max(1, round(per_s * seconds / connections))
    pace = ["-r", str(at_once), "--rate-period", f"{every_ms}ms", "--rps", f"{per_s / connections:.6f}"]
    return _run(target, ["-c", str(connections), "-n", str(count), *pace], seconds, count)


def _run(target: Target, options: Sequence[str], seconds: float, count: int | None = None) -> Answers:
    if shutil.which("h2load") is None:
        sys.exit("h2load is missing. Install it: apt-get install nghttp2-client, or brew install nghttp2.")
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(target.body)
        headers = [word for name, value in target.headers.items() for word in ("-H", f"{name}: {value}")]
        command = ["h2load", *options, "-d", str(body), "--log-file", str(log), *headers, target.url]
        if target.headers != GRPC:
            command.insert(1, "--h1")
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + 4 * seconds)
        lines = log.read_text().splitlines() if log.exists() else []
    rows = [[int(value) for value in line.split("\t")[:3]] for line in lines]  # start in µs, status, µs
    if done.returncode or not rows:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    accepted = [us / 1000 for _, status, us in rows if status == 200]
    refused = [us / 1000 for _, status, us in rows if status == 503]
    if count is not None:
        seconds = (max(start + us for start, _, us in rows) - min(start for start, _, _ in rows)) / 1e6
    # h2load logs status 0 for a request that was under way when its warm-up ended: its answer isn't known.
    failed = (count or sum(status != 0 for _, status, _ in rows)) - len(accepted) - len(refused)
    return Answers(seconds=seconds, accepted_ms=accepted, refused_ms=refused, failed=failed)
