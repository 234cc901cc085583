"""An engine in a process of its own: what throws, hangs or leaks there is lost there.

`Worker` is the side that asks, on an asyncio loop; `engine_process` is the one that is asked. At first they agree in
JSON, one line each, how large the memory is that both have; then eight bytes ask and twenty-four answer, while the next
rows are written. What this doesn't do: decide what is batched (see `batching`), or when a process is replaced (see
`model`).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core.types import Json
from suanli.serving.shared_memory import REPLY, REQUEST, Layout, new_memory

if TYPE_CHECKING:
    import numpy as np

START_S = 180.0  # that an engine may take to come up: some compile
SAID_KEPT = 40  # last lines of what its libraries print


class EngineError(Exception):
    """A batch that got no answer; the engine is still there. The message is the reason."""


class EngineDied(EngineError):
    """The process is gone, or had to be ended."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine said of itself once it was loaded."""

    engine: str
    precision: str
    threads: int
    preprocess: Mapping[str, Json]
    classes: tuple[str, ...]
    row_shape: tuple[int, ...]
    row_dtype: str
    torch: bool  # it computes with torch, so that pictures are resized by torch too
    measured: tuple[tuple[int, float], ...]  # batch sizes and seconds that optimize measured; may be empty


class Worker:
    """One process with one engine. `start`, `attach`, then `compute`; after EngineDied only `close` is left."""

    def __init__(self, subject: Path, *, engine: str, device: str, threads: int | None, trust_code: bool) -> None:
        self._options: dict[str, Json] = {
            "subject": str(subject),
            "engine": engine,
            "device": device,
            "threads": threads,
            "trust_code": trust_code,
        }
        self.slots: list[tuple[np.ndarray, np.ndarray]] = []  # rows and probabilities of each
        self.memory_bytes = 0  # of the process, as it said last
        self.said: deque[str] = deque(maxlen=SAID_KEPT)
        self.on_exit: Callable[[Worker, str], None] | None = None  # is called when the process ends by itself
        self._waiting: dict[int, asyncio.Future[float]] = {}
        self._pending = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reading = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> EngineInfo:
        """Brings the process up and loads the engine. Raises EngineDied with the reason."""
        try:
            self._begin()
        except OSError as error:  # no process, no memory, no descriptor to be had
            raise EngineDied(f"the engine's process can't be started ({error.strerror or error})") from error
        values = await self._agree(self._options)
        values["classes"], values["row_shape"] = tuple(values["classes"]), tuple(values["row_shape"])
        values["measured"] = tuple((int(batch), float(s)) for batch, s in values["measured"])
        return EngineInfo(**values)

    def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        paths = os.pathsep.join(p for p in sys.path if p)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "suanli.serving.engine_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": paths},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the server's to handle; and what it started ends with it
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        asyncio.get_running_loop().add_reader(self._process.stdout.fileno(), self._hear)

    async def attach(self, layout: Layout) -> dict[int, float]:
        """Shares memory and warms up. Seconds that each batch size took; where optimize measured, its figures. Raises
        EngineDied with the reason."""
        assert self._socket is not None
        try:
            memory = self._share(self._socket, layout.size_bytes)
        except ConnectionError:
            raise EngineDied(self._why_ended()) from None
        except OSError as error:
            raise EngineDied(
                f"no memory can be shared with the engine's process ({error.strerror or error})"
            ) from error
        values = await self._agree({"slots": layout.slots, "batch": layout.batch})
        self.slots = layout.arrays(memory)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._receive)
        self._reading = True
        self.memory_bytes = values["memory_bytes"]
        return {int(batch): float(s) for batch, s in values["seconds"].items()}

    @staticmethod
    def _share(connection: socket.socket, size_bytes: int) -> mmap.mmap:
        descriptor = new_memory(size_bytes)
        try:
            memory = mmap.mmap(descriptor, size_bytes)
            connection.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))])
        finally:
            os.close(descriptor)
        return memory

    async def _agree(self, values: Mapping[str, Json]) -> dict[str, Json]:
        """A line there, a line back."""
        loop = asyncio.get_running_loop()
        assert self._socket is not None
        line = b""
        try:
            async with asyncio.timeout(START_S):
                await loop.sock_sendall(self._socket, json.dumps(values).encode() + b"\n")
                while not line.endswith(b"\n"):
                    part = await loop.sock_recv(self._socket, 1 << 16)
                    if not part:
                        raise EngineDied(self._why_ended())
                    line += part
        except TimeoutError:
            raise EngineDied(f"the engine did not come up in {START_S:.0f} s") from None
        except ConnectionError:
            raise EngineDied(self._why_ended()) from None
        reply: dict[str, Json] = json.loads(line)
        if "error" in reply:
            raise EngineDied(reply["error"])
        return reply

    def compute(self, slot: int, rows: int) -> asyncio.Future[float]:
        """Seconds that the engine took for the first rows of a slot, whose answers are there then. The future raises
        EngineError or EngineDied."""
        future = asyncio.get_running_loop().create_future()
        if self._socket is None:  # it ended a moment ago, and who asks hasn't been told yet
            future.set_exception(EngineDied("the engine was stopped"))
            return future
        self._waiting[slot] = future
        try:
            self._socket.send(REQUEST.pack(slot, rows))  # eight bytes always fit: there are few slots
        except OSError:
            self._handle_exit()
        return future

    async def idle(self) -> None:
        """Returns when nothing is being computed."""
        while self._waiting:
            await asyncio.sleep(0.01)

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            part = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._handle_exit()
            return
        self._pending += part
        while len(self._pending) >= REPLY.size:
            slot, length, seconds, self.memory_bytes = REPLY.unpack_from(self._pending)
            if len(self._pending) < REPLY.size + length:
                return
            reason = self._pending[REPLY.size : REPLY.size + length]
            self._pending = self._pending[REPLY.size + length :]
            future = self._waiting.pop(slot, None)
            if future is None or future.done():
                continue
            if length:
                future.set_exception(EngineError(reason.decode(errors="replace")))
            else:
                future.set_result(seconds)

    def _handle_exit(self) -> None:
        reason = self._why_ended()
        self.close(reason)
        if self.on_exit is not None:
            self.on_exit(self, reason)

    def _hear(self) -> None:
        """What libraries print: its last lines are kept for the log and as a reason."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            part = os.read(self._process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if part:
            self.said.extend(line.strip()[:500] for line in part.decode(errors="replace").splitlines() if line.strip())
        else:
            asyncio.get_running_loop().remove_reader(self._process.stdout.fileno())

    def _why_ended(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        self._hear()
        code = self._process.poll()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"the engine's process crashed ({signal.Signals(-code).name})"
        return f"the engine's process ended ({self.said[-1][:200] if self.said else f'exit code {code}'})"

    def close(self, reason: str = "the engine was stopped") -> None:
        """Ends the process and what it started; batches that wait for it raise EngineDied."""
        loop = asyncio.get_running_loop()
        if self._socket is not None:
            if self._reading:
                loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket, self._reading = None, False
        if self._process is not None:
            assert self._process.stdout is not None
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            loop.remove_reader(self._process.stdout.fileno())
            self._process.stdout.close()
            self._process = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(EngineDied(reason))
