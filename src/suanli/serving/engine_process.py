"""The process that computes for a server: loads one engine, then answers over shared memory until its socket closes.

    python -m suanli.serving.engine_process DESCRIPTOR-OF-A-SOCKET

It reads no file but the model's, and only what the engine needs is imported. See `worker` for the side that asks.
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

from suanli.core.errors import first_line
from suanli.core.types import Json
from suanli.engines.sandbox import exit_with_parent
from suanli.serving.shared_memory import REPLY, REQUEST, Layout

if TYPE_CHECKING:
    import numpy as np

    from suanli.engines.predictor import Predictor

WARM_SIZES = (1, 2, 4, 8, 16, 32, 64)  # batch sizes that are warmed up
WARM_S = 2.0  # of timing them
NICE = 5
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _load(options: Mapping[str, Json]) -> tuple[Predictor, dict[str, Json]]:
    from suanli.engines.predictor import load, read_batch_times

    subject = Path(options["subject"])
    chosen = {key: options[key] for key in ("engine", "device", "threads", "trust_code")}
    predictor = load(subject, **chosen)
    preprocess = predictor.preprocess
    about: dict[str, Json] = {
        "engine": predictor.engine,
        "precision": predictor.precision,
        "threads": predictor.threads,
        "preprocess": preprocess.to_json(),
        "classes": list(predictor.classes),
        "row_shape": list(preprocess.row_shape),
        "row_dtype": str(preprocess.row_dtype),
        "torch": "torch" in sys.modules,
        "measured": [list(point) for point in read_batch_times(subject, predictor)],
    }
    return predictor, about


def _compute(predictor: Predictor, rows: np.ndarray) -> np.ndarray:
    """Probabilities (B, K). Raises what the engine raises, and ValueError for another shape."""
    import numpy as np

    found = np.asarray(predictor.probabilities(rows))
    if found.shape != (len(rows), len(predictor.classes)):
        raise ValueError(f"{len(rows)} inputs got answers of shape {found.shape}")
    return found


def _warm(predictor: Predictor, layout: Layout, slots: list[tuple[np.ndarray, np.ndarray]]) -> dict[int, float]:
    """Every batch size once, since some engines compile for each; then a few of each are timed."""
    rows, _ = slots[0]
    sizes = [size for size in WARM_SIZES if size < layout.batch] + [layout.batch]
    seconds: dict[int, float] = {}
    spent = 0.0
    for size in sizes:
        if spent + 3 * size * min((s / b for b, s in seconds.items()), default=0.0) > WARM_S:
            break  # a slow network: larger batches are inferred
        _compute(predictor, rows[:size])
        took = []
        for _ in range(3):
            before = time.perf_counter()
            predictor.probabilities(rows[:size])
            took.append(time.perf_counter() - before)
        spent += sum(took)
        seconds[size] = sorted(took)[1]
    return seconds


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:  # not Linux: the most it ever had
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _end_with_parent() -> None:
    """Linux: for when a library lets no other thread run. The kernel sends SIGHUP when the server is gone, and the
    handler is the C library's alarm(), to which the signal's number, 1, is seconds."""
    with contextlib.suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
        library.signal(signal.SIGHUP, ctypes.cast(library.alarm, ctypes.c_void_p))


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            return None
        found += part
    return found


def _receive_line(connection: socket.socket) -> dict[str, Json]:
    found = b""
    while not found.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            raise SystemExit(0)
        found += part
    values: dict[str, Json] = json.loads(found)
    return values


def _serve(connection: socket.socket) -> None:
    import numpy as np

    predictor, about = _load(_receive_line(connection))
    connection.sendall(json.dumps(about).encode() + b"\n")
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_LEN(array.array("i").itemsize))
    descriptor = array.array("i", ancillary[0][2])[0]
    agreed = _receive_line(connection)
    layout = Layout(
        slots=agreed["slots"],
        batch=agreed["batch"],
        row_shape=tuple(about["row_shape"]),
        row_dtype=about["row_dtype"],
        classes=len(about["classes"]),
    )
    slots = layout.arrays(mmap.mmap(descriptor, layout.size_bytes))
    os.close(descriptor)
    seconds = _warm(predictor, layout, slots) | dict(about["measured"])
    ready = {"seconds": seconds, "memory_bytes": _resident_bytes()}
    connection.sendall(json.dumps(ready).encode() + b"\n")
    while (asked := _receive_exactly(connection, REQUEST.size)) is not None:
        slot, count = REQUEST.unpack(asked)
        rows, answers = slots[slot]
        before = time.perf_counter()
        reason = b""
        try:
            answers[:count] = _compute(predictor, rows[:count])
            if not np.isfinite(answers[:count]).all():
                raise ValueError("the answer is not a number")
        except Exception as error:  # noqa: BLE001  # told to who asked, who decides
            reason = f"{type(error).__name__}: {first_line(error, 300)}".encode("utf-8", "replace")
        took = time.perf_counter() - before
        connection.sendall(REPLY.pack(slot, len(reason), took, _resident_bytes()) + reason)


def main() -> None:
    """Loads an engine and answers until the server closes the socket."""
    from suanli.core.errors import SuanliError

    # On a machine whose cores are all computing, the server must still answer, if only to refuse: measured under three
    # times the capacity, the 99th percentile of refusals fell from 10.8 to 8.6 ms.
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
    except Exception as error:  # a reason for who asked
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode() + b"\n")
        raise


if __name__ == "__main__":
    main()
