"""bench --serve: what a server answers, refuses and takes, against the load that it is offered.

First a closed loop finds the capacity; then loads from a tenth of it to a third above it are offered, open-loop, by
turns in several rounds. Leaves load.html and load.json. The subject is the address of a running server that speaks the
Open Inference Protocol, or a model, for which `suanli serve` is started on a free port of this machine and ended
afterwards. Nothing is sent anywhere else. What this doesn't do: judge answers, or tune the server.
"""

from __future__ import annotations

import contextlib
import http.client
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import IO, TYPE_CHECKING

from suanli import hardware
from suanli.console import Progress
from suanli.errors import DataError, UsageError
from suanli.loads import Figures, Load, ServerGone, Stretch, Target, address, figures, held
from suanli.offered_load import Generator
from suanli.reporting import charts, load_views
from suanli.rundir import RUNS, next_folder, now, refuse_occupied
from suanli.storage import atomic_file, write_json, writing
from suanli.types import AnyPath, Json
from suanli.verbs._payloads import Asked, key_headers, payload
from suanli.verbs.report import pages

if TYPE_CHECKING:
    from rich.console import Group

SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3)  # of the capacity
ROUNDS = 3
WARM_UP = 0.5  # of a turn
LEAST_S = 3.0  # for all turns
CONNECTIONS = 256  # of an open loop: enough that it is the server that refuses
TIMEOUT_S = 10.0
START_S = 120.0  # for a server to be ready
STOP_S = 20.0  # for it to end


@dataclass(frozen=True, kw_only=True)
class UnderLoad:
    """What was found, and where it lies."""

    path: Path
    about: Mapping[str, Json]
    capacity: Figures
    loads: tuple[Figures, ...]

    def to_json(self) -> dict[str, Json]:
        best = held(self.loads)
        return {
            **self.about,
            "run": str(self.path),
            "capacity_per_s": self.capacity.answered_per_s,
            "held_per_s": best and best.offered_per_s,
            "capacity": self.capacity.to_json(),
            "loads": [one.to_json() for one in self.loads],
        }


def bench_serve(
    subject: AnyPath,
    *,
    seconds: float = 30.0,
    clients: int = 32,
    rows: int = 1,
    files: Sequence[AnyPath] = (),
    out: AnyPath | None = None,
) -> UnderLoad:
    """Offer loads to `subject`, about `seconds` long in all, and write load.html and load.json into `out`.

    `subject` is http://host:port, with /v2/models/NAME behind it where a server has several, or what `suanli serve`
    takes. `clients` ask in the closed loop that finds the capacity. Every request has `rows` inputs, made up, or in
    turn one of `files` as it is. The key of a server that needs one is read from $SUANLI_API_KEY.
    Raises UsageError for options that can't be, ServerGone for a server that isn't there or goes, DataError for
    one that refuses what it is asked.
    """
    if not LEAST_S <= seconds <= 3600:
        raise UsageError(f"{seconds:g} s can't be used.", fix=f"Give {LEAST_S:g} to 3600 seconds.")
    if out is not None:
        refuse_occupied(Path(out).expanduser())
    headers = key_headers()
    with _server(subject) as url:
        asked = payload(url, headers, rows=rows, files=files)
        target = Target.of(asked.url, asked.bodies, asked.headers)
        capacity, loads = _measured(target, seconds, clients)
    local = _is_loopback(address(url).hostname or "")
    about = _about(subject, asked, clients, local)
    name = f"{asked.model}-load"
    path = next_folder(RUNS, name) if out is None else Path(out).expanduser()
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    found = UnderLoad(path=path, about=about, capacity=capacity, loads=loads)
    write_json(path / "load.json", found.to_json())
    shown = (
        pages()
        .get_template("load.html")
        .render(page=load_views.page(about, capacity, loads), about=about, frame=charts)
    )
    with atomic_file(path / "load.html") as stream:
        stream.write(shown.encode())
    return found


def _measured(target: Target, seconds: float, clients: int) -> tuple[Figures, tuple[Figures, ...]]:
    """The closed loop's figures, and those of each load, lowest first."""
    turn_s = seconds / (ROUNDS * (len(SHARES) + 1) + 1 + WARM_UP)
    closed = Load(rate_per_s=None, connections=clients, seconds=turn_s, timeout_s=TIMEOUT_S)
    connections = max(CONNECTIONS, clients)
    with Generator(target) as generator, Progress("Load", seconds) as progress:
        generator.offer(replace(closed, seconds=WARM_UP * turn_s))
        first = generator.offer(closed)
        _refuse_silent(first)
        rate = first.answered_per_s
        closed_rounds: list[Stretch] = [first]
        rounds: dict[float, list[Stretch]] = {share: [] for share in SHARES}
        done = (1 + WARM_UP) * turn_s
        for number in range(ROUNDS):
            for place, share in enumerate(SHARES if number % 2 == 0 else SHARES[::-1]):
                load = Load(
                    rate_per_s=max(share * rate, 1 / turn_s),
                    connections=connections,
                    seconds=turn_s,
                    seed=number * len(SHARES) + place,
                    timeout_s=TIMEOUT_S,
                )
                rounds[share].append(generator.offer(load))
                done += turn_s
                progress.update(done, f"{share:.0%} of {rate:,.0f}/s")
            closed_rounds.append(generator.offer(closed))
            done += turn_s
    return figures(closed_rounds), tuple(figures(rounds[share]) for share in SHARES)


def _refuse_silent(stretch: Stretch) -> None:
    """Raises DataError for a server that answers nothing."""
    if stretch.accepted_us:
        return
    why = ", ".join(f"{count:,} × {error}" for error, count in stretch.errors.items())
    refused = f"{len(stretch.refused_us):,} refused" if stretch.refused_us else ""
    told = ", ".join(part for part in (why, refused) if part) or f"nothing came within {stretch.seconds:.2g} s"
    raise DataError(
        f"The server answers nothing ({told}). {stretch.said}".rstrip(),
        fix="See what it says to one request, or give it more time with --seconds.",
    )


def _about(subject: AnyPath, asked: Asked, clients: int, local: bool) -> dict[str, Json]:
    shown = asked.url if str(subject).startswith(("http://", "https://")) else str(subject)
    return {
        "subject": shown,
        "model": asked.model,
        "version": asked.version,
        "platform": asked.platform,
        "engine": asked.engine,
        "precision": asked.precision,
        "request": asked.told,
        "request_bytes": max(len(body) for body in asked.bodies),
        "clients": clients,
        "connections": max(CONNECTIONS, clients),
        "arrivals": "poisson",
        "local": local,
        "cpu": hardware.cpu_name(),
        "cores": hardware.cores(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "time": now(),
    }


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- the server ---


@contextlib.contextmanager
def _server(subject: AnyPath) -> Iterator[str]:
    """The address of the server, or of a model in it; one that is started here ends with the block."""
    if str(subject).startswith(("http://", "https://")):
        yield str(subject)
        return
    if not Path(subject).expanduser().exists():
        raise DataError(
            f"There is nothing at {subject}.", fix="Give a run, a model folder, or an address: http://host:port."
        )
    with started(subject) as (url, _):
        yield url


@contextlib.contextmanager
def started(subject: AnyPath, *options: str) -> Iterator[tuple[str, int]]:
    """`suanli serve` on a free port of the loopback interface, in a process of its own: its address and its process,
    once it is ready. Raises ServerGone where it ends or isn't ready in time, with the last that it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "suanli", "serve", str(Path(subject).expanduser()), "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, *options], stdout=said, stderr=said)
        try:
            _wait(process, port, said)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> None:
    """Until the server is ready."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if _ready(port):
            return
        time.sleep(0.05)
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    why = "ended" if process.poll() is not None else f"isn't ready after {START_S:.0f} s"
    raise ServerGone(
        f"suanli serve {why}. {lines[-1].strip()[:300] if lines else ''}".rstrip(),
        fix="Start it by itself to see more: suanli serve.",
    )


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# --- for people -----------------------------------------------------------------------------


def table(found: UnderLoad) -> Group:
    """One row a load, and what it comes to."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, 1), pad_edge=False)
    columns, rows = load_views.plain_table(found.capacity, found.loads)
    for column in columns:
        shown.add_column(column, justify="right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    about = found.about
    engine = " ".join(str(about[key]) for key in ("engine", "precision") if about[key])
    title = ", ".join(part for part in (f"{about['model']}", engine, str(about["request"])) if part)
    remarks = load_views.warnings([found.capacity, *found.loads])
    return Group(
        Text(title, style="bold"),
        "",
        shown,
        "",
        *(Text(sentence) for sentence in load_views.sentences(found.capacity, found.loads)),
        *(Text.assemble(("warning: ", "yellow"), remark) for remark in remarks),
        "",
        f"Page:    {found.path / 'load.html'}",
        f"Figures: {found.path / 'load.json'}",
    )
