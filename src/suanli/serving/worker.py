"""An engine in its own process, so that a crash, a hang or a leak of the engine can't harm the server.

`Worker` is the server's side, on an asyncio loop; `engine_process` is the other side; `shared_memory` has what they
exchange. After the start a batch costs a message of eight bytes there and one of twenty-four back, while the server
writes the next inputs. Not here: what makes a batch (`batching`), when a process is replaced (`model`).
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
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from suanli.core.schema import schema_bytes
from suanli.core.task import Task
from suanli.core.types import Preprocess
from suanli.models.model_folder import build_preprocess, build_task
from suanli.serving.shared_memory import (
    REPLY,
    REQUEST,
    EngineInfo,
    EngineOptions,
    Layout,
    Warmup,
    from_line,
    new_memory,
    to_line,
)

START_S = 180.0  # limit for each step of an engine's start: some compile
OUTPUT_LINES = 40  # last lines of what an engine's libraries print that are kept
SLOTS = 2  # one is computed while the other is filled
SLOT_BYTES = 1 << 26  # at most
MAX_BATCH = 64

Reply = TypeVar("Reply")


class EngineError(Exception):
    """A batch got no answer, but the engine still runs. The message is the reason."""


class EngineDied(EngineError):
    """The engine's process has ended, or had to be ended."""


async def start_worker(
    subject: Path, *, engine: str, device: str, threads: int | None, trust_code: bool, max_batch: int = MAX_BATCH
) -> Worker:
    """Starts a process, loads the engine there, shares memory with it and lets it warm up. Raises EngineDied with the
    reason, and then no process is left."""
    options = EngineOptions(subject=str(subject), engine=engine, device=device, threads=threads, trust_code=trust_code)
    process = _Process()
    try:
        info = await process.exchange(to_line(options), EngineInfo)
        preprocess = build_preprocess(info.preprocess)
        task = build_task(info.task, info.classes, info.task_settings)
        largest = max(schema_bytes(preprocess.inputs), schema_bytes(task.outputs), 1)
        batch = max(1, min(max_batch, SLOT_BYTES // largest)) if info.batches else 1
        layout = Layout(slots=SLOTS, batch=batch, inputs=preprocess.inputs, outputs=task.outputs)
        memory = process.share_memory(layout.size_bytes)
        warmup = await process.exchange(to_line(layout), Warmup)
        return Worker(process, info, preprocess, task, layout, memory, warmup)
    except BaseException:
        process.close()
        raise


class Worker:
    """A warm engine in its own process, as `start_worker` returns it. After EngineDied only `close` has an effect."""

    def __init__(
        self,
        process: _Process,
        info: EngineInfo,
        preprocess: Preprocess,
        task: Task,
        layout: Layout,
        memory: mmap.mmap,
        warmup: Warmup,
    ) -> None:
        self.info, self.preprocess, self.task, self.layout = info, preprocess, task, layout
        self.seconds = warmup.seconds  # of a batch by its size
        self.slots = layout.arrays(memory)
        self.memory_bytes = warmup.memory_bytes  # resident memory of the process, as last reported
        self.on_exit: Callable[[Worker, str], None] | None = None  # called when the process ends by itself
        self._process = process
        self._waiting: dict[int, asyncio.Future[float]] = {}  # by slot
        self._pending = b""  # received, but not yet a whole reply
        asyncio.get_running_loop().add_reader(process.socket.fileno(), self._receive)

    @property
    def pid(self) -> int:
        return self._process.pid

    def compute(self, slot: int, count: int) -> asyncio.Future[float]:
        """Computes the first `count` examples of a slot; when the future is done, their outputs are in the slot. Its
        result is the seconds that the engine took. It raises EngineError or EngineDied."""
        future = asyncio.get_running_loop().create_future()
        if self._process.is_closed:  # it ended a moment ago, and the caller doesn't know yet
            future.set_exception(EngineDied("the engine was stopped"))
            return future
        self._waiting[slot] = future
        try:
            self._process.socket.send(REQUEST.pack(slot, count))  # eight bytes always fit: there are few slots
        except OSError:
            self._handle_exit()
        return future

    async def idle(self) -> None:
        """Returns when nothing is being computed."""
        while self._waiting:
            await asyncio.sleep(0.01)

    def close(self, reason: str = "the engine was stopped") -> None:
        """Ends the process and what it started; batches that wait for it raise EngineDied."""
        self._process.close()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(EngineDied(reason))

    def _receive(self) -> None:
        try:
            part = self._process.socket.recv(1 << 16)
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
        reason = self._process.exit_reason()
        self.close(reason)
        if self.on_exit is not None:
            self.on_exit(self, reason)


class _Process:
    """The process of an engine: starts at once; `socket` leads to it, and what it prints is kept for `exit_reason`."""

    def __init__(self) -> None:
        """Raises EngineDied where there is no process, memory or file descriptor to be had."""
        self.is_closed = False
        self._output: deque[str] = deque(maxlen=OUTPUT_LINES)
        try:
            self.socket, theirs = socket.socketpair()
            with theirs, contextlib.ExitStack() as on_error:
                on_error.callback(self.socket.close)
                self._popen = self._spawn(theirs.fileno())
                on_error.pop_all()
        except OSError as error:
            raise EngineDied(f"the engine's process can't be started ({error.strerror or error})") from error
        self.socket.setblocking(False)
        self.pid = self._popen.pid
        assert self._popen.stdout is not None
        self._stdout = self._popen.stdout
        os.set_blocking(self._stdout.fileno(), False)
        asyncio.get_running_loop().add_reader(self._stdout.fileno(), self._read_output)

    @staticmethod
    def _spawn(descriptor: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "suanli.serving.engine_process", str(descriptor)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            pass_fds=(descriptor,),
            start_new_session=True,  # the server handles Ctrl-C; and `close` ends what the process started, too
        )

    async def exchange(self, line: bytes, kind: type[Reply]) -> Reply:
        """Sends a line and returns the reply to it. Raises EngineDied with the reason."""
        loop = asyncio.get_running_loop()
        reply = b""
        try:
            async with asyncio.timeout(START_S):
                await loop.sock_sendall(self.socket, line)
                while not reply.endswith(b"\n"):
                    part = await loop.sock_recv(self.socket, 1 << 16)
                    if not part:
                        raise EngineDied(self.exit_reason())
                    reply += part
        except TimeoutError:
            raise EngineDied(f"the engine did not come up in {START_S:.0f} s") from None
        except ConnectionError:
            raise EngineDied(self.exit_reason()) from None
        error = json.loads(reply).get("error")
        if error is not None:
            raise EngineDied(error)
        return from_line(reply, kind)

    def share_memory(self, size_bytes: int) -> mmap.mmap:
        """New memory, whose descriptor is sent to the process. Raises EngineDied."""
        try:
            descriptor = new_memory(size_bytes)
            try:
                memory = mmap.mmap(descriptor, size_bytes)
                rights = array.array("i", [descriptor])
                self.socket.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            finally:
                os.close(descriptor)
        except ConnectionError:
            raise EngineDied(self.exit_reason()) from None
        except OSError as error:
            raise EngineDied(
                f"no memory can be shared with the engine's process ({error.strerror or error})"
            ) from error
        return memory

    def exit_reason(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(0.2)
        self._read_output()
        code = self._popen.poll()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"the engine's process crashed ({signal.Signals(-code).name})"
        return f"the engine's process ended ({self._output[-1][:200] if self._output else f'exit code {code}'})"

    def close(self) -> None:
        """Ends the process and all that it started."""
        if self.is_closed:
            return
        self.is_closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.socket.fileno())
        self.socket.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        loop.remove_reader(self._stdout.fileno())
        self._stdout.close()

    def _read_output(self) -> None:
        """Keeps the last lines of what the engine's libraries print."""
        try:
            part = os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if part:
            lines = (line.strip()[:500] for line in part.decode(errors="replace").splitlines())
            self._output.extend(line for line in lines if line)
        else:
            asyncio.get_running_loop().remove_reader(self._stdout.fileno())
