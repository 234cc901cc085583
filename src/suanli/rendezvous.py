"""Where the hosts that train one run meet, and who of them is still there.

Torch's elastic agents, one a host, agree through a store on who takes part. They don't notice a host that is cut off:
to TCP, silence is a slow answer for a quarter of an hour. So each agent tells a beat through the same store. Where a
beat stops, the others start anew without that host; an agent that can't reach the store ends, with its processes.
An error that no new start can mend travels the same way, and ends all.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import re
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist
from torch._C._distributed_c10d import TCPStore

from suanli import verdict
from suanli.console import duration, warn
from suanli.errors import LostProcess, MachineError, StorageError, UsageError, first_line
from suanli.storage import atomic_file
from suanli.types import Json

PORT = 29400  # as torchrun's
BEAT_S = 1.0
LOST_S = 25.0  # without a beat: longer than TCP needs to get over an interruption of ten seconds
CONNECT_S = 60.0  # for the store to be there
ANSWER_S = 60.0  # for the store to answer
LEAVE_S = 10.0  # for the others, before the store goes
LOST = (ValueError, RuntimeError, TimeoutError, dist.DistError)  # what a store raises that is gone
INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where hosts meet, and how many nodes it takes: a node is a host with its processes."""

    host: str
    port: int
    least: int
    most: int
    here: bool  # whether this process holds the store

    @classmethod
    def at(cls, endpoint: str, least: int | None, most: int | None) -> Rendezvous:
        """From HOST:PORT and the numbers of nodes that are given. Raises UsageError."""
        host, port = parsed(endpoint)
        if most is None or most < 1:
            raise UsageError("--rendezvous needs --max-nodes.", fix="Give the number of nodes that train together.")
        return cls(host=host, port=port, least=checked(least, most), most=most, here=is_here(host))


def checked(least: int | None, most: int) -> int:
    """The least number of nodes; by default all. Raises UsageError."""
    if least is not None and not 1 <= least <= most:
        raise UsageError(f"--min-nodes can't be {least}.", fix=f"Give 1 to {most}.")
    return most if least is None else least


def parsed(endpoint: str) -> tuple[str, int]:
    """ "host", "host:29400" or "[::1]:29400". Raises UsageError."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::(\d{1,5}))?", endpoint, re.ASCII)
    port = int(found[3] or PORT) if found else -1
    host = (found[1] or found[2]) if found else ""
    if not 0 <= port < 1 << 16 or host.startswith("-"):
        raise UsageError(f"--rendezvous can't be {endpoint!r}.", fix="Give HOST:PORT, such as node1:29400.")
    return host, port


# --- addresses ---


def addresses(host: str) -> list[str]:
    """What a name means here; nothing, where it means nothing."""
    with suppress(OSError, UnicodeError):
        return [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return []


def is_here(host: str) -> bool:
    """Whether a name or an address is this machine's."""
    return host == socket.gethostname() or any(map(_bindable, addresses(host)))


def _bindable(address: str) -> bool:
    with suppress(OSError), socket.socket(_family(address), socket.SOCK_STREAM) as made:
        made.bind((address, 0))
        return True
    return False


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def address_toward(host: str) -> str | None:
    """The address of this machine from which packets go to `host`; None: there is no way, or none that leaves it."""
    for address in addresses(host):
        with suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as made:
            made.connect((address, 9))  # sends nothing
            own = str(made.getsockname()[0])
            if not own.startswith("127.") and own != "::1":
                return own
    return None


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address; None where it can't be told."""
    try:
        import fcntl
    except ImportError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(made.fileno(), INTERFACE_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


# --- the store ---


def serve(address: str, port: int = 0) -> TCPStore:
    """A store that lives in this process, on this address alone. Raises MachineError where the port is taken."""
    try:
        listening = socket.create_server((address, port), family=_family(address))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise MachineError(
            f"Port {port} of {address} is in use." if taken else f"Can't listen on {address}: {error.strerror}.",
            fix="Give another one: --rendezvous HOST:PORT.",
        ) from error
    number = listening.getsockname()[1]
    return TCPStore(
        address,
        number,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=ANSWER_S),
        master_listen_fd=listening.detach(),
    )


def connect(host: str, port: int, within_s: float = CONNECT_S) -> TCPStore:
    """The store of another process. Raises MachineError where none answers."""
    found: queue.SimpleQueue[TCPStore | Exception] = queue.SimpleQueue()

    def ask() -> None:
        end = time.monotonic() + within_s
        while True:
            try:
                socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
                timeout = timedelta(seconds=ANSWER_S)
                found.put(TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout))
                return
            except (OSError, *LOST) as error:
                if time.monotonic() > end:
                    found.put(error)
                    return
                time.sleep(0.5)

    # It waits without end for the answer of a server that is none of torch's.
    threading.Thread(target=ask, name="suanli-connect", daemon=True).start()
    try:
        answer = found.get(timeout=within_s + 5)
    except queue.Empty:
        answer = TimeoutError("what listens there doesn't answer")
    if isinstance(answer, Exception):
        raise MachineError(
            f"There is no rendezvous at {host}:{port}: {first_line(answer, 200)}.",
            fix="Check that the first node has been started, that this host reaches it, and which port it uses.",
        ) from answer
    return answer


def word(store: TCPStore) -> dict[str, Json] | None:
    """The error that ends all: what a process on any host has left."""
    return json.loads(store.get("verdict")) if store.check(["verdict"]) else None


def first_host(store: TCPStore, present: Collection[str]) -> str | None:
    """The name of the node, of those that are present, with the first process."""
    if not store.check(["members"]):
        return None
    beats = [_beat(store, name) for name in _members(store)]
    first = [beat["name"] for beat in beats if beat and beat["rank"] == 0 and not beat["left"]]
    return next((name for name in first if name in present), None)


def _members(store: TCPStore) -> list[str]:
    return store.get("members").decode().split()


def _beat(store: TCPStore, member: str) -> dict[str, Json] | None:
    key = f"member/{member}"
    return json.loads(store.get(key)) if store.check([key]) else None


class Members:
    """This node among the others, from `start` to `leave`.

    `group` gives who its processes train with, as (a name for all of them, this node's place), and `workers` their
    numbers; both are asked from another thread. `file` is that of their word.
    """

    def __init__(
        self,
        store: TCPStore,
        name: str,
        file: Path,
        group: Callable[[], tuple[str, int | None]],
        workers: Callable[[], Sequence[int]],
    ) -> None:
        self._store, self._name, self._file, self._group, self._workers = store, name, file, group, workers
        self._own = uuid.uuid4().hex
        self._beats = 0
        self._answered = time.monotonic()
        self._seen: dict[str, tuple[int, float]] = {}  # beats of each other, and when they last grew
        self._lost: set[str] = set()
        self._leaving = threading.Event()
        self._talking = threading.Thread(target=self._talk, name="suanli-beats", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="suanli-link", daemon=True)

    def start(self) -> None:
        self._tell()
        self._store.append("members", f"{self._own} ")  # type: ignore[attr-defined]  # the stub lacks it
        self._talking.start()
        self._watching.start()

    def leave(self, *, last: bool = False) -> None:
        """After the last start. `last`: the store goes with this node, so it waits for the others."""
        self._leaving.set()
        self._talking.join(LOST_S)
        end = time.monotonic() + LEAVE_S
        with suppress(*LOST):
            while last and self._others_here() and time.monotonic() < end:
                time.sleep(BEAT_S / 4)

    def _others_here(self) -> bool:
        beats = {name: _beat(self._store, name) for name in _members(self._store)}
        return any(b and not b["left"] for name, b in beats.items() if name not in {self._own, *self._lost})

    def _talk(self) -> None:
        """With the store; it may wait there for long."""
        with suppress(*LOST):
            while not self._leaving.wait(BEAT_S):
                self._tell()
                self._relay()
                self._look()
                self._answered = time.monotonic()
            self._relay()
            self._tell()

    def _watch(self) -> None:
        while not self._leaving.wait(BEAT_S):
            silent_s = time.monotonic() - self._answered
            if silent_s > LOST_S:
                print(
                    f"suanli: {self._name} is cut off: the rendezvous hasn't answered for {duration(silent_s)}.",
                    file=sys.stderr,
                    flush=True,
                )
                end_now(self._workers(), self._file.parent)

    def _tell(self) -> None:
        group, rank = self._group()
        self._beats += 1
        beat = {"name": self._name, "beats": self._beats, "group": group, "rank": rank, "left": self._leaving.is_set()}
        self._store.set(f"member/{self._own}", json.dumps(beat))

    def _relay(self) -> None:
        """The word of a process here to the other hosts, or theirs to here."""
        here = verdict.read(self._file)
        there = self._store.check(["verdict"])
        if here is not None and not there:
            self._store.set("verdict", json.dumps(here))
        elif there and here is None:
            with suppress(OSError, StorageError), atomic_file(self._file) as stream:
                stream.write(self._store.get("verdict"))

    def _look(self) -> None:
        now = time.monotonic()
        group, _ = self._group()
        for member in _members(self._store):
            beat = None if member in {self._own, *self._lost} else _beat(self._store, member)
            if beat is None or beat["left"]:
                continue
            beats, since = self._seen.get(member, (0, now))
            if beat["beats"] != beats:
                self._seen[member] = (beat["beats"], now)
            elif now - since > LOST_S:
                self._lost.add(member)
                if group and beat["group"] == group:
                    warn(f"{beat['name']} hasn't been heard of for {duration(now - since)}: the others start anew.")
                    kill(self._workers())


def kill(workers: Sequence[int]) -> None:
    """At once, with whatever they have started."""
    for number in workers:
        with suppress(OSError):
            os.killpg(number, signal.SIGKILL)


def end_now(workers: Sequence[int], folder: Path) -> None:
    """This process and its workers, from any thread. A collective that has lost its host can't be ended otherwise."""
    import shutil

    kill(workers)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(LostProcess.exit_code)
