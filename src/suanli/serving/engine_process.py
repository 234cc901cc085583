"""The process that computes for a server: loads one engine, then answers over shared memory until its socket closes.

    python -m suanli.serving.engine_process DESCRIPTOR-OF-A-SOCKET

It reads no files but the model's and imports only what the engine needs. `worker` is the server's side.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.errors import first_line
from suanli.engines.sandbox import exit_with_parent
from suanli.machine.run_delay import RunDelay
from suanli.serving.policy import Curve
from suanli.serving.shared_memory import (
    REPLY,
    REQUEST,
    EngineInfo,
    EngineOptions,
    Layout,
    Slot,
    Warmup,
    from_line,
    to_line,
)
from suanli.serving.tensors import refuse_unservable
from suanli.serving.thread_choice import ThreadChoice

if TYPE_CHECKING:
    from suanli.core.schema import Arrays
    from suanli.engines.predictor import Predictor

WARM_SIZES = (1, 2, 4, 8, 16, 32, 64)  # batch sizes that are warmed up
WARM_S = 2.0  # of timing them
NICE = 5
SINGLE_BYTES = 1 << 29  # resident memory up to which the engine is loaded once more, for one thread
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _load(options: EngineOptions) -> tuple[Predictor, EngineInfo]:
    from suanli.engines.predictor import load, read_batch_times

    subject = Path(options.subject)
    predictor = load(
        subject,
        engine=options.engine,
        device=options.device,
        threads=options.threads,
        trust_code=options.trust_code,
    )
    preprocess, task = predictor.preprocess, predictor.task
    refuse_unservable(preprocess, task)
    info = EngineInfo(
        engine=predictor.engine,
        precision=predictor.precision,
        threads=predictor.threads,
        preprocess=preprocess.to_json(),
        task=task.name,
        classes=task.classes,
        task_settings=task.settings,
        batches=predictor.batches,
        torch="torch" in sys.modules,
        measured=tuple(read_batch_times(subject, predictor)),
    )
    return predictor, info


def _compute(predictor: Predictor, inputs: Mapping[str, np.ndarray], count: int) -> Arrays:
    """The outputs (B, …) for the first `count` examples. Raises what the engine raises, and ValueError for a wrong
    shape."""
    answers = predictor.answer({name: array[:count] for name, array in inputs.items()})
    for name, column in predictor.task.outputs.items():
        if answers[name].shape != (count, *column.shape):
            raise ValueError(f"{count} inputs got {name}, answers of shape {answers[name].shape}")
    return answers


def _warm(predictor: Predictor, layout: Layout, slots: list[Slot]) -> dict[int, float]:
    """Median seconds of a batch by its size. Each size runs once untimed, since some engines compile for each."""
    inputs, _ = slots[0]
    sizes = [size for size in WARM_SIZES if size < layout.batch] + [layout.batch]
    seconds: dict[int, float] = {}
    spent = 0.0
    for size in sizes:
        if spent + 3 * size * min((s / b for b, s in seconds.items()), default=0.0) > WARM_S:
            break  # a slow model: the server extrapolates to larger batches
        _compute(predictor, inputs, size)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            _compute(predictor, inputs, size)
            times.append(time.perf_counter() - start)
        spent += sum(times)
        seconds[size] = sorted(times)[1]
    return seconds


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:  # not Linux: the peak instead
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _end_with_parent() -> None:
    """On Linux, also ends a process whose library lets no other thread run. The kernel sends SIGHUP when the server
    ends, and the handler is the C library's alarm(), which takes the signal's number, 1, as seconds."""
    with contextlib.suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
        library.signal(signal.SIGHUP, ctypes.cast(library.alarm, ctypes.c_void_p))


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    """None where the server has closed the socket."""
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            return None
        received += part
    return received


def _receive_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            raise SystemExit(0)
        line += part
    return line


def _receive_descriptor(connection: socket.socket) -> int:
    size = array.array("i").itemsize
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_LEN(size))
    return array.array("i", ancillary[0][2])[0]


class _Engine:
    """The engine, and where the user fixed no number of threads the same engine with one thread, which computes while
    other programs use the cores. That one is loaded when it is needed first."""

    def __init__(self, predictor: Predictor, options: EngineOptions, seconds: Mapping[int, float]) -> None:
        """`seconds` of a batch by its size."""
        self._all, self._single, self._options = predictor, predictor, options
        self._loading: threading.Thread | None = None
        has_choice = options.threads is None and predictor.threads > 1 and predictor.device_type == "cpu"
        can_change = has_choice and _resident_bytes() < SINGLE_BYTES
        self._choice = ThreadChoice(Curve(seconds).seconds, RunDelay()) if can_change else None

    def compute(self, inputs: Mapping[str, np.ndarray], count: int) -> Arrays:
        if self._choice is None:
            return _compute(self._all, inputs, count)
        if self._choice.single and self._loading is None:
            self._loading = threading.Thread(target=self._load_single, daemon=True)
            self._loading.start()
        before = time.perf_counter()
        answers = _compute(self._single if self._choice.single else self._all, inputs, count)
        now = time.perf_counter()
        if self._loading is None or not self._loading.is_alive():
            self._choice.add(count, now - before, now)
        return answers

    def _load_single(self) -> None:
        from suanli.engines.predictor import load

        options = self._options
        with contextlib.suppress(Exception):  # then all threads go on
            self._single = load(
                Path(options.subject),
                engine=options.engine,
                device=options.device,
                threads=1,
                trust_code=options.trust_code,
            )


def _serve(connection: socket.socket) -> None:
    options = from_line(_receive_line(connection), EngineOptions)
    predictor, info = _load(options)
    connection.sendall(to_line(info))
    descriptor = _receive_descriptor(connection)
    layout = from_line(_receive_line(connection), Layout)
    slots = layout.arrays(mmap.mmap(descriptor, layout.size_bytes))
    os.close(descriptor)
    seconds = _warm(predictor, layout, slots) | dict(info.measured)
    connection.sendall(to_line(Warmup(seconds=seconds, memory_bytes=_resident_bytes())))
    engine = _Engine(predictor, options, seconds)
    while (request := _receive_exactly(connection, REQUEST.size)) is not None:
        slot, count = REQUEST.unpack(request)
        inputs, outputs = slots[slot]
        start = time.perf_counter()
        reason = b""
        try:
            answers = engine.compute(inputs, count)
            for name, output in outputs.items():
                output[:count] = answers[name]
                if output.dtype.kind == "f" and not np.isfinite(output[:count]).all():
                    raise ValueError("the answer is not a number")
        except Exception as error:  # noqa: BLE001  # the server gets the reason and decides
            reason = f"{type(error).__name__}: {first_line(error, 300)}".encode("utf-8", "replace")
        seconds_taken = time.perf_counter() - start
        connection.sendall(REPLY.pack(slot, len(reason), seconds_taken, _resident_bytes()) + reason)


def main() -> None:
    """Loads an engine and computes until the server closes the socket."""
    from suanli.core.errors import SuanliError

    # While all cores compute, the server must still answer, if only to refuse. With this, at three times the load that
    # the server can take, the 99th percentile of refusals fell from 10.8 to 8.6 ms.
    os.nice(NICE)
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), kwargs={"look_s": 0.3}, daemon=True).start()
    _end_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        _serve(connection)
    except (BrokenPipeError, ConnectionResetError):
        pass
    except SuanliError as error:
        connection.sendall(json.dumps({"error": f"{error.message} {error.fix}".strip()}).encode() + b"\n")
    except Exception as error:  # the server gets the reason
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode() + b"\n")
        raise


if __name__ == "__main__":
    main()
