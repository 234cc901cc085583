"""One version of one model that is served: tensors to rows, rows to answers, and an engine that is kept alive.

An engine's process that throws away a batch stays; one that crashes or hangs is replaced, after a longer and longer
pause if it doesn't stop doing so; one whose memory grows far beyond what it had after warming up is replaced while it
still answers. Pictures are decoded in threads while the engine computes.

What this doesn't do: HTTP or gRPC, or several models (see `repository`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.errors import BadInput
from suanli.core.types import Preprocess
from suanli.engines.predictor import Prediction, encode, predictions
from suanli.machine.device import cores
from suanli.models.model_folder import build_preprocess
from suanli.serving.batching import Batcher
from suanli.serving.bodies import State
from suanli.serving.figures import Figures
from suanli.serving.policy import NEWEST, Curve, Policy
from suanli.serving.protocol import NAMES, InferRequest, InferResponse, Refusal, Tensor, bad_request
from suanli.serving.shared_memory import Layout
from suanli.serving.worker import EngineDied, EngineInfo, Worker

if TYPE_CHECKING:
    from suanli.serving.log import Log

MAX_INPUTS = 4096  # of one request
SLOTS = 2  # one is computed while the other is filled
SLOT_BYTES = 1 << 26  # at most
# Before an engine is started again. Twice at once: an input that kills it does so in a batch, and then alone.
PAUSES_S = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0  # without a crash: the next pause is the first one again
GROWN = 2.0  # times the memory after warming up, and
GROWN_BYTES = 1 << 29  # so much more: the engine leaks
WATCH_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models are served; see `suanli serve --help`."""

    engine: str = "auto"
    device: str = "auto"
    threads: int | None = None
    trust_code: bool = False
    p99_s: float | None = None
    max_pixels: int = 50_000_000  # of one picture


class ServedModel:
    """`start` it, then `infer` or `predict`; `drain` and `close` it at the end. All on one asyncio loop."""

    def __init__(
        self, name: str, version: str, subject: Path, settings: ModelOptions, *, pool: Executor, log: Log
    ) -> None:
        self.name, self.version, self.subject = name, version, subject
        self.state: State = "loading"
        self.reason = ""
        self.figures = Figures()
        self._settings, self._pool, self._log = settings, pool, log
        self._worker: Worker | None = None
        self._encoding = 0  # inputs that are being decoded
        self._encode_s = 0.0  # that one of them took of a thread, lately
        self._users = 0
        self._crashes = 0
        self._crashed = -math.inf
        self._up_bytes = 0  # memory of the engine when it was warm
        self._tasks: set[asyncio.Task[None]] = set()
        self.about: EngineInfo
        self.preprocess: Preprocess
        self.batcher: Batcher

    # --- life ---

    async def start(self) -> None:
        """Brings an engine up. Raises EngineDied with the reason."""
        try:
            worker, about = await self._new()
        except EngineDied as error:
            self._fail(str(error))
            raise
        self._task(self._watch())
        self.state = "ready"
        self._log.event("model ready", model=self.name, version=self.version, engine=about.engine,
                        precision=about.precision, batch=self.policy.batch, pid=worker.pid)  # fmt: skip
        if not self.policy.reachable:
            self._log.warning(
                "the latency target can't be kept",
                model=self.name,
                one_input_ms=round(1e3 * self.policy.curve.seconds(1), 3),
                target_ms=round(1e3 * self.policy.target_s, 3),
            )

    async def _new(self) -> tuple[Worker, EngineInfo]:
        """A warm engine, in use."""
        options = self._settings
        worker = Worker(
            self.subject,
            engine=options.engine,
            device=options.device,
            threads=options.threads,
            trust_code=options.trust_code,
        )
        try:
            about = await worker.start()
            if about.torch:  # then `suanli predict` resizes by torch, and so shall answers here
                await asyncio.to_thread(importlib.import_module, "torch")
            row_bytes = math.prod(about.row_shape) * np.dtype(about.row_dtype).itemsize
            most = max(1, min(64, SLOT_BYTES // max(row_bytes, 1)))
            layout = Layout(
                slots=SLOTS,
                batch=most,
                row_shape=about.row_shape,
                row_dtype=about.row_dtype,
                classes=len(about.classes),
            )
            seconds = await worker.attach(layout)
            if not self.known:
                self.about, self.preprocess = about, build_preprocess(about.preprocess)
                self.policy = Policy(Curve(seconds), p99_s=options.p99_s, most=most)
                self.batcher = Batcher(self.policy, self.figures, on_death=self._died)
            elif (about.classes, about.preprocess) != (self.about.classes, self.about.preprocess):
                raise EngineDied("the model on disk is another one now")
        except BaseException:
            worker.close()
            raise
        self._worker, self._up_bytes = worker, worker.memory_bytes
        before = self.batcher.use(worker)
        if before is not None:
            self._task(self._retire(before))
        return worker, about

    async def _retire(self, worker: Worker) -> None:
        """Another has taken its place: it answers what it has."""
        try:
            await worker.idle()
        finally:
            worker.close()

    def _died(self, worker: Worker, reason: str) -> None:
        """The engine's process is gone: another takes its place."""
        worker.close()
        if self.state in ("draining", "closed") and not self.batcher.rows:
            return
        now = time.monotonic()
        self._crashes = 0 if now - self._crashed > STEADY_S else self._crashes + 1
        self._crashed = now
        pause_s = PAUSES_S[min(self._crashes, len(PAUSES_S) - 1)]
        self._fail(reason)
        self._log.error("engine lost", model=self.name, version=self.version, reason=reason, again_in_s=pause_s)
        if pause_s:
            self.batcher.fail_waiting(self._unready())
        self._task(self._restart(pause_s))

    async def _restart(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        self.figures.restarts += 1
        try:
            await self._new()
        except EngineDied as error:
            self._crashes += 1
            self._crashed = time.monotonic()
            pause_s = PAUSES_S[min(self._crashes, len(PAUSES_S) - 1)]
            self._fail(str(error))
            self.batcher.fail_waiting(self._unready())
            self._log.error("engine did not start", model=self.name, reason=str(error), again_in_s=pause_s)
            if self.state != "closed":
                self._task(self._restart(pause_s))
            return
        if self.state == "failed":
            self.state, self.reason = "ready", ""
        self._log.event("engine started again", model=self.name, version=self.version)

    async def _watch(self) -> None:
        """Replaces an engine that leaks, without a pause for those who ask."""
        while self.state not in ("draining", "closed"):
            await asyncio.sleep(WATCH_S)
            worker = self._worker
            if worker is None or self.state != "ready":
                continue
            if worker.memory_bytes > max(GROWN * self._up_bytes, self._up_bytes + GROWN_BYTES):
                self._log.warning("engine leaks", model=self.name, memory_bytes=worker.memory_bytes,
                                  at_start_bytes=self._up_bytes)  # fmt: skip
                self.figures.restarts += 1
                try:
                    await self._new()
                except EngineDied as error:
                    self._log.error("engine not replaced", model=self.name, reason=str(error))
                    await asyncio.sleep(STEADY_S)

    def _fail(self, reason: str) -> None:
        if self.state not in ("draining", "closed"):
            self.state = "failed"
        self.reason = reason

    def _task(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("task failed", model=self.name, version=self.version, reason=repr(error)[:500])

    async def drain(self) -> None:
        """Returns when all that was asked is answered; nothing new may be asked for meanwhile."""
        if self.state != "closed":
            self.state = "draining"
        while self._users:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        if self.known:
            self.batcher.use(None)
            self.batcher.fail_waiting(Refusal(503, f"Model {self.name} was unloaded."))
        if self._worker is not None:
            self._worker.close()
            self._worker = None  # and its memory, which would else stay until the next search for cycles

    # --- answering ---

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    def admit(self, inputs: int = 1) -> None:
        """Raises Refusal(503) where a request can't be answered in time. Cheap: before its body is read."""
        if self.state not in ("ready", "draining"):
            raise self._unready()
        again_s = self.policy.retry_after_s(self.batcher.rows + self._encoding, inputs)
        if again_s is not None:
            raise Refusal(503, f"Model {self.name} has as much to do as it can answer in time.", retry_after_s=again_s)

    def _unready(self) -> Refusal:
        told = {"loading": "is being loaded", "closed": "was unloaded"}.get(self.state, f"is not ready: {self.reason}")
        return Refusal(503, f"Model {self.name} {told}.", retry_after_s=1.0)

    async def infer(self, request: InferRequest, *, deadline: float | None = None) -> InferResponse:
        """The answer to a request of the protocol. `deadline` is a time of the loop's clock. Raises Refusal."""
        with self._counted() as count:
            tensor = self._only(request)
            count[0] = inputs = self._inputs(tensor)
            self._check_outputs(request)
            timeout = request.parameters.get("timeout")
            if timeout is not None and (type(timeout) is not int or not 0 <= timeout < 1 << 62):
                raise bad_request("timeout is a number of microseconds; 0: none.")
            if timeout:
                until = asyncio.get_running_loop().time() + timeout / 1e6
                deadline = until if deadline is None else min(until, deadline)
            self.admit(inputs)
            came = time.monotonic()
            probabilities = await self._probabilities(await self._rows(tensor, inputs), came, deadline)
            before = time.perf_counter()
            response = self._response(request, probabilities)
            self.figures.output.add(time.perf_counter() - before)
            return response

    async def predict(self, names: Sequence[str], raws: Sequence[bytes | str], *, top: int) -> list[Prediction]:
        """For each input its label and the likeliest classes, or an error. Raises Refusal."""
        with self._counted() as count:
            count[0] = len(raws)
            self.admit(len(raws))
            came = time.monotonic()
            found = await self._encoded(raws)
            rows = [row for row in found if isinstance(row, np.ndarray)]
            answers = await self._probabilities(np.stack(rows), came, None) if rows else ()
            return predictions(names, found, answers, self.about.classes, top=top)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[list[int]]:
        """Counts a request and what became of it."""
        started, count = time.perf_counter(), [0]
        self._users += 1
        try:
            yield count
        except Refusal as error:
            self.figures.count_failure(time.perf_counter() - started, error.status)
            raise
        except asyncio.CancelledError:
            self.figures.count_failure(time.perf_counter() - started, 499)
            raise
        else:
            self.figures.count_answer(time.perf_counter() - started, count[0])
        finally:
            self._users -= 1

    @property
    def input_name(self) -> str:
        return self.preprocess.kind

    def _only(self, request: InferRequest) -> Tensor:
        if len(request.inputs) != 1 or request.inputs[0].name not in (self.input_name, ""):
            given = ", ".join(tensor.name[:40] for tensor in request.inputs)
            raise bad_request(f"Model {self.name} has one input, {self.input_name!r}; the request has {given!r}.")
        return request.inputs[0]

    def _inputs(self, tensor: Tensor) -> int:
        """How many inputs a tensor holds."""
        if not tensor.shape or not tensor.shape[0]:
            raise bad_request(f"Input {tensor.name!r} holds nothing: its shape is {list(tensor.shape)}.")
        inputs = math.prod(tensor.shape) if tensor.datatype == "BYTES" else tensor.shape[0]
        if inputs > MAX_INPUTS:
            raise bad_request(f"{inputs} inputs are more than the {MAX_INPUTS} that one request may have.")
        return inputs

    async def _rows(self, tensor: Tensor, inputs: int) -> np.ndarray:
        """The rows of a tensor: itself where it has their shape, else encoded."""
        data, about = tensor.data, self.about
        if not isinstance(data, list):
            if data.dtype == about.row_dtype and data.shape[1:] == about.row_shape and self._takes_rows:
                if data.dtype.kind == "f" and not np.isfinite(data).all():
                    raise bad_request(f"Input {tensor.name!r} has values that are not numbers.")
                return data
            if self.preprocess.kind != "image" or data.dtype != np.uint8 or data.ndim != 4:
                wanted = f"{NAMES[np.dtype(about.row_dtype)]} {[-1, *about.row_shape]} or " if self._takes_rows else ""
                raise bad_request(
                    f"Input {tensor.name!r} is {wanted}BYTES [-1], not {tensor.datatype} {list(tensor.shape)}."
                )
        found = await self._encoded(list(data))
        for i, row in enumerate(found):
            if isinstance(row, str):
                raise bad_request(f"Input {i} can't be read: {row}")
        assert len(found) == inputs
        return np.stack([row for row in found if isinstance(row, np.ndarray)])

    @property
    def _takes_rows(self) -> bool:
        """Any number can be a pixel or a measurement, but not any is the id of a word: who looks it up could crash."""
        return np.dtype(self.about.row_dtype).kind == "f" or self.about.row_dtype == "uint8"

    async def _encoded(self, raws: Sequence[object]) -> list[np.ndarray | str]:
        """Rows, or why there is none, in threads. Raises Refusal where those have too much to do already."""
        behind_s = self._encoding * self._encode_s / cores()
        if behind_s > self.policy.target_s:
            raise Refusal(503, f"Model {self.name} has too much to decode.", retry_after_s=behind_s)
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        self._encoding += len(raws)
        try:
            return await asyncio.gather(*(loop.run_in_executor(self._pool, self._encode, raw) for raw in raws))
        finally:
            self._encoding -= len(raws)
            self.figures.encode.add(time.perf_counter() - started)

    def _encode(self, raw: object) -> np.ndarray | str:
        before = time.perf_counter()
        try:
            return self._encode_one(raw)
        finally:
            took = time.perf_counter() - before
            self._encode_s += (NEWEST if self._encode_s else 1.0) * (took - self._encode_s)

    def _encode_one(self, raw: object) -> np.ndarray | str:
        if self.preprocess.kind == "image" and isinstance(raw, bytes):
            from suanli.data.decode import read_header

            try:
                header = read_header(raw)
            except BadInput as error:
                return error.message
            if header.height * header.width > self._settings.max_pixels:
                return (
                    f"The picture has {header.width}x{header.height} pixels, more than the "
                    f"{self._settings.max_pixels / 1e6:g} million that are allowed."
                )
        return encode(self.preprocess, raw)

    async def _probabilities(self, rows: np.ndarray, came: float, deadline: float | None) -> np.ndarray:
        """`came`: when the request did."""
        if self.state not in ("ready", "draining", "failed"):
            raise self._unready()
        before_s = time.monotonic() - came
        found = await self.batcher.submit(rows, deadline)
        # A request waits for this process before it is read, too. Nobody sees that, but what comes back from the
        # engine waits for the same.
        self.policy.add_outside_time(before_s + time.monotonic() - self.batcher.last_answer_s + self.batcher.overhead_s)
        return found

    def _check_outputs(self, request: InferRequest) -> None:
        for wanted in request.outputs:
            if wanted.name not in ("probabilities", "label"):
                raise bad_request(
                    f"Model {self.name} has the outputs 'probabilities' and 'label', not {wanted.name!r}."
                )

    def _response(self, request: InferRequest, probabilities: np.ndarray) -> InferResponse:
        outputs = []
        counts = {wanted.name: wanted.class_count for wanted in request.outputs} or {"probabilities": 0, "label": 0}
        for name, count in counts.items():
            if name == "label":
                best = probabilities.argmax(1)
                labels = [self.about.classes[i].encode() for i in best]
                outputs.append(Tensor(name=name, datatype="BYTES", shape=(len(labels),), data=labels))
            elif count:
                outputs.append(self._classified(probabilities, count))
            else:
                outputs.append(Tensor(name=name, datatype="FP32", shape=probabilities.shape, data=probabilities))
        return InferResponse(id=request.id, model_name=self.name, model_version=self.version, outputs=tuple(outputs))

    def _classified(self, probabilities: np.ndarray, count: int) -> Tensor:
        """The classification extension: "value:index:label", best first."""
        count = min(count, probabilities.shape[1])
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
        texts = [
            f"{row[i]:f}:{i}:{self.about.classes[i]}".encode()
            for row, chosen in zip(probabilities, best, strict=True)
            for i in chosen
        ]
        return Tensor(name="probabilities", datatype="BYTES", shape=(len(best), count), data=texts)

    @property
    def known(self) -> bool:
        """Whether an engine ever came up, so that classes and shapes are known."""
        return hasattr(self, "batcher")

    @property
    def memory_bytes(self) -> int | None:
        """Of the engine's process."""
        return None if self._worker is None else self._worker.memory_bytes
