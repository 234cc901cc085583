"""A process of its own for an engine: a crash, a hang or a leak there harms nothing else, and its memory is its own.

`Sandbox` sends requests to it; `python -m suanli.engines.sandbox`, or another module that calls `serve`, answers them.
Requests and replies are JSON objects, one a line, on the process's standard input and output; examples and answers are
in folders (`examples.py`). What libraries print goes to a temporary file, whose last line says why a process ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from suanli.core.types import EngineInputs, Json, LoadedEngine, Placement

if TYPE_CHECKING:
    import numpy as np

TURNS = 16  # inputs that are timed in turn where each is answered alone
SOURCE_LINE = re.compile(r"^(Exception from|Check '.*' failed at) \S+:\d+:?$")  # of OpenVINO, before the reason
MAX_CALLS = 5000  # of one request to time an engine


class SandboxError(Exception):
    """The process ended, took too long, or couldn't do what it was asked for. The message is a reason, for a table."""


class Sandbox:
    """One process. A context manager; after a crash or a timeout the process is gone."""

    def __init__(
        self,
        scratch: Path | None = None,
        *,
        module: str = "suanli.engines.sandbox",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`scratch` is where libraries put files of their own, which they don't remove when they are killed. `module`
        is what the process runs, a call of `serve`; `environment` are variables that it has in addition."""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        paths = [p for p in sys.path if p]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths)}
            | _scratch_variables(scratch)
            | dict(environment or {}),
            start_new_session=True,  # its compilers end with it
        )
        self._pending = b""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, limit_s: float, do: str, **request: object) -> dict[str, Json]:
        """The reply. Raises SandboxError, with the reason, where the process failed, ended, or took longer."""
        self.send(do, **request)
        return self.receive(limit_s)

    def send(self, do: str, **request: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # there will be no reply, and `receive` finds the reason
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()

    def fileno(self) -> int:
        """For `select`, to wait for the replies of several processes."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def receive(self, limit_s: float) -> dict[str, Json]:
        """The reply to what was sent. Raises SandboxError as `ask` does."""
        line = self._read_line(time.monotonic() + limit_s, limit_s)
        reply: dict[str, Json] = json.loads(line)
        if "error" in reply:
            raise SandboxError(reply["error"])
        return reply

    def _read_line(self, until: float, limit_s: float) -> bytes:
        pipe = self.fileno()
        while b"\n" not in self._pending:
            if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                self.close()
                raise SandboxError(f"not done after {limit_s:.0f} s")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise SandboxError(self._explain_end())
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _explain_end(self) -> str:
        """Why the process ended, once its output has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        code = self._process.poll()
        self.close()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"its process crashed ({signal.Signals(-code).name})"
        return f"its process ended ({lines[-1].strip()[:200] if lines else f'exit code {code}'})"

    def close(self) -> None:
        """Kill the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _scratch_variables(scratch: Path | None) -> dict[str, str]:
    if scratch is None:
        return {}
    scratch.mkdir(exist_ok=True)
    return {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}


# --- inside the process ---


class _EngineRequests:
    """The requests about engines. Engines stay loaded, one for each number of threads."""

    def __init__(self) -> None:
        self._loaded: dict[int, tuple[LoadedEngine, Placement]] = {}

    def export(self, model: str, path: str, trust_code: bool) -> dict[str, object]:
        from suanli.engines.inference_module import write_onnx
        from suanli.models.model_folder import load_model

        write_onnx(load_model(Path(model), trust_code=trust_code), Path(path))
        return {}

    def build(
        self, engine: str, precision: str, inputs: dict[str, Json], folder: str, placement: object
    ) -> dict[str, object]:
        from suanli.core.registry import load

        load("engines", engine).build(_read_inputs(inputs), precision, Path(folder), _read_placement(placement))
        return {}

    def rank_layers(self, inputs: dict[str, Json], task: dict[str, Json], placement: object) -> dict[str, object]:
        from suanli.engines.sensitivity import rank_layers
        from suanli.models.model_folder import build_task

        return {"layers": rank_layers(_read_inputs(inputs), build_task(**task), _read_placement(placement))}

    def load(self, engine: str, precision: str, folder: str, placement: object) -> dict[str, object]:
        from suanli.core.registry import load

        where = _read_placement(placement)
        self._loaded[where.threads] = load("engines", engine).load(Path(folder), precision, where), where
        return {}

    def find_precision(self, threads: int, examples: str) -> dict[str, object]:
        from suanli.engines.examples import load_examples

        arrays = load_examples(Path(examples)).batch(0, 1)
        return {"precision": self._loaded[threads][0].find_precision(arrays)}

    def answer(
        self, threads: int, examples: str, outputs: list[str], count: int, batch: int, out: str
    ) -> dict[str, object]:
        """Write these outputs for the first `count` examples, computed `batch` at a time, into a folder."""
        from suanli.core.schema import pick
        from suanli.engines.examples import load_examples

        engine, _ = self._loaded[threads]
        inputs = load_examples(Path(examples)).first(count)
        answers = []
        for start in range(0, len(inputs), batch):
            answer = engine.answer(inputs.batch(start, min(start + batch, len(inputs))))
            answers.append({name: _plain(array) for name, array in pick(answer, outputs).items()})
        inputs.join(answers).save(Path(out))
        return {}

    def time(
        self, threads: int, examples: str, batch: int, for_s: float, warm_up: int, least: int
    ) -> dict[str, object]:
        """Seconds of each call with a batch of examples: at least `least` calls, and more until `for_s` seconds are
        over; `warm_up` calls before them don't count. Examples that are answered one at a time take turns. Also the
        share of their time that threads of this process waited for a core."""
        from suanli.engines.examples import load_examples
        from suanli.machine.energy import measure_energy
        from suanli.machine.run_delay import RunDelay

        engine, placement = self._loaded[threads]
        inputs = load_examples(Path(examples))
        number = 1 if inputs.batches else min(len(inputs), TURNS)
        turns = cycle([inputs.batch(start, start + batch) for start in range(number)])
        for _ in range(warm_up):
            engine.answer(next(turns))
        seconds: list[float] = []
        delay, started = RunDelay(), time.perf_counter()
        with measure_energy(placement.device) as meter:
            while len(seconds) < least or (time.perf_counter() - started < for_s and len(seconds) < MAX_CALLS):
                arrays = next(turns)
                before = time.perf_counter()
                engine.answer(arrays)
                seconds.append(time.perf_counter() - before)
        return {"seconds": seconds, "joules": meter.joules, "waited": delay()}

    def memory(self, placement: object) -> dict[str, object]:
        """The peak of this process's main memory, or of its memory on a GPU; bytes."""
        from suanli.machine.device import peak_memory_bytes

        return {"bytes": peak_memory_bytes(_read_placement(placement).device)}


def _plain(answer: np.ndarray) -> np.ndarray:
    """Floating-point numbers in float32."""
    import numpy as np

    array = np.asarray(answer)
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _read_inputs(values: dict[str, Json]) -> EngineInputs:
    from suanli.engines.examples import calibration_batches, load_examples

    calibration = values["calibration"]
    return EngineInputs(
        model=_path(values["model"]),
        onnx=_path(values["onnx"]),
        calibration=None if calibration is None else calibration_batches(load_examples(Path(calibration))),
        kept=tuple(values["kept"]),
        batches=values["batches"],
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _read_placement(values: object) -> Placement:
    return TypeAdapter(Placement).validate_python(values)


def _describe_error(error: BaseException) -> str:
    from suanli.core.errors import SuanliError

    if isinstance(error, SuanliError):
        return error.message
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not SOURCE_LINE.search(line)]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(": ")


def exit_with_parent(parent: int, *, look_s: float = 1.0) -> None:
    """Wait until the parent process is gone, however it ended; then kill this process and all that it started, such
    as compilers."""
    while os.getppid() == parent:
        time.sleep(look_s)
    os.killpg(0, signal.SIGKILL)


def serve(target: object) -> None:
    """Answer requests on standard input until it ends; each names a method of `target`."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like; replies must stay readable
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        request: dict[str, Json] = json.loads(line)
        method: Callable[..., dict[str, object]] = getattr(target, request.pop("do"))
        started = time.perf_counter()
        try:
            reply = method(**request) | {"took_s": time.perf_counter() - started}
        except Exception as error:  # noqa: BLE001  # reported to the other side, which decides
            reply = {"error": _describe_error(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(_EngineRequests())
