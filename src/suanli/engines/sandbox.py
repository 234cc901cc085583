"""An engine in a process of its own: what crashes, hangs or leaks there is lost there, and its memory is its own.

`Sandbox` is the side that asks; `python -m suanli.engines.sandbox`, or another module that calls `serve`, answers.
Requests and replies are JSON objects, one a line, on the process's standard input and output; arrays lie in .npy files.
What libraries print goes to a file, whose last line tells why a process ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from suanli.core.types import Device, EngineInputs, Json, LoadedEngine, Placement

START_S = 60.0  # a process may take to come up and to import what it needs, beside its work
TIMES_KEPT = 5000


class SandboxError(Exception):
    """A process that is gone, or that couldn't do what it was asked for. The message is a reason, for a table."""


class Sandbox:
    """One process. A context manager; after SandboxError by a crash or the clock it is gone."""

    def __init__(
        self,
        scratch: Path | None = None,
        *,
        module: str = "suanli.engines.sandbox",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`scratch` is where libraries put their own files, which they don't clear when they are ended. `module` is
        what the process runs, a call of `serve`; `environment` are variables that it has besides."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        paths = [p for p in sys.path if p]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | _places(scratch) | dict(environment or {}),
            start_new_session=True,  # its compilers end with it
        )
        self._pending = b""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, limit_s: float, do: str, **request: Json) -> dict[str, Json]:
        """The reply. Raises SandboxError, with the reason, where the process said no, ended, or took longer."""
        self.send(do, **request)
        return self.receive(limit_s)

    def send(self, do: str, **request: Json) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no reply, and the reason is looked for there
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()

    def fileno(self) -> int:
        """To wait for the replies of several processes with `select`."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def receive(self, limit_s: float) -> dict[str, Json]:
        """The reply to what was sent. Raises SandboxError as `ask` does."""
        line = self._line(time.monotonic() + limit_s, limit_s)
        reply: dict[str, Json] = json.loads(line)
        if "error" in reply:
            raise SandboxError(reply["error"])
        return reply

    def _line(self, until: float, limit_s: float) -> bytes:
        pipe = self.fileno()
        while b"\n" not in self._pending:
            if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                self.close()
                raise SandboxError(f"not done after {limit_s:.0f} s")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise SandboxError(self._end())
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _end(self) -> str:
        """Why the process ended, once its output has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        code = self._process.poll()
        self.close()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"its process crashed ({signal.Signals(-code).name})"
        return f"its process ended ({lines[-1].strip()[:200] if lines else f'exit code {code}'})"

    def close(self) -> None:
        """Ends the process and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _places(scratch: Path | None) -> dict[str, str]:
    if scratch is None:
        return {}
    scratch.mkdir(exist_ok=True)
    return {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}


# --- the process that is asked ---


class _Hosted:
    """What one process holds: engines that are loaded, by their number of threads."""

    def __init__(self) -> None:
        self._loaded: dict[int, LoadedEngine] = {}
        self._device: Device | None = None

    def export(self, model: str, path: str, trust_code: bool) -> Json:
        from suanli.engines.inference_module import write_onnx
        from suanli.models.model_folder import load_model

        write_onnx(load_model(Path(model), trust_code=trust_code), Path(path))
        return {}

    def build(self, engine: str, precision: str, inputs: Json, folder: str, placement: Json) -> Json:
        from suanli.core.registry import load

        load("engines", engine).build(_material(inputs), precision, Path(folder), _placement(placement))
        return {}

    def rank_layers(self, inputs: Json, placement: Json) -> Json:
        from suanli.engines.sensitivity import rank_layers

        return {"layers": rank_layers(_material(inputs), _placement(placement))}

    def load(self, engine: str, precision: str, folder: str, placement: Json) -> Json:
        from suanli.core.registry import load

        where = _placement(placement)
        self._device = where.device
        self._loaded[where.threads] = load("engines", engine).load(Path(folder), precision, where)
        return {}

    def find_precision(self, threads: int, rows: str) -> Json:
        import numpy as np

        given = np.ascontiguousarray(np.load(rows, mmap_mode="r", allow_pickle=False)[:1])
        return {"precision": self._loaded[threads].find_precision(given)}

    def answer(self, threads: int, rows: str, count: int, batch: int, out: str) -> Json:
        """Probabilities of the first `count` rows, `batch` at a time, into a file."""
        import numpy as np

        given = np.load(rows, mmap_mode="r", allow_pickle=False)[:count]
        work = self._loaded[threads].answer
        found = []
        for start in range(0, len(given), batch):
            part = np.ascontiguousarray(given[start : start + batch])
            answer = np.asarray(work(part))
            if answer.ndim != 2 or len(answer) != len(part):
                raise ValueError(f"{len(part)} inputs got answers of shape {answer.shape}")
            found.append(answer.astype(np.float32, copy=False))
        np.save(out, np.concatenate(found), allow_pickle=False)
        return {}

    def time(self, threads: int, rows: str, batch: int, for_s: float, warm_up: int, least: int) -> Json:
        """Seconds of each call with a batch of rows, for so long and at least so often, after some that don't count."""
        import numpy as np

        from suanli.machine.energy import measure_energy

        assert self._device is not None
        given = np.load(rows, mmap_mode="r", allow_pickle=False)
        part = np.ascontiguousarray(given[np.arange(batch) % len(given)])
        work = self._loaded[threads].answer
        for _ in range(warm_up):
            work(part)
        took: list[float] = []
        started = time.perf_counter()
        with measure_energy(self._device) as meter:
            while len(took) < least or (time.perf_counter() - started < for_s and len(took) < TIMES_KEPT):
                before = time.perf_counter()
                work(part)
                took.append(time.perf_counter() - before)
        return {"seconds": took, "joules": meter.joules}

    def memory(self) -> Json:
        """The most that this process had in main memory, and on a GPU; bytes."""
        from suanli.machine.device import peak_memory_bytes

        assert self._device is not None
        return {"bytes": peak_memory_bytes(self._device)}


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _material(values: Json) -> EngineInputs:
    import numpy as np

    rows = values["calibration"]
    return EngineInputs(
        model=_path(values["model"]),
        onnx=_path(values["onnx"]),
        calibration=None if rows is None else np.load(rows, allow_pickle=False),
        kept=tuple(values["kept"]),
    )


def _placement(values: Json) -> Placement:
    device = values["device"] | {"fast_dtypes": tuple(values["device"]["fast_dtypes"])}
    return Placement(**(values | {"device": Device(**device)}))


def _why(error: BaseException) -> str:
    from suanli.core.errors import SuanliError

    if isinstance(error, SuanliError):
        return error.message
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(": ")


def exit_with_parent(parent: int, *, look_s: float = 1.0) -> None:
    """Ends this process and what it started, its compilers say, once the one that asks is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(look_s)
    os.killpg(0, signal.SIGKILL)


def serve(hosted: object) -> None:
    """Answers requests on standard input by the methods that they name, until it ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like; replies must stay readable
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        work: Callable[..., Json] = getattr(hosted, request.pop("do"))
        started = time.perf_counter()
        try:
            reply = work(**request) | {"took_s": time.perf_counter() - started}
        except Exception as error:  # noqa: BLE001  # told to who asked, who decides
            reply = {"error": _why(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(_Hosted())
