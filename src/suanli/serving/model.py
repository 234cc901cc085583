"""One version of one model that is served: answers requests, and keeps an engine running for them.

An engine that fails on a batch keeps its process. One that crashes or hangs is replaced, after longer and longer pauses
if that happens again and again; one whose memory grows far beyond what it had when warm is replaced while it still
answers.

Not here: HTTP and gRPC, several models (`repository`), batches (`batching`), decoding (`encoder`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.errors import UsageError
from suanli.core.schema import Arrays
from suanli.core.task import Task
from suanli.core.types import EncodedInput, Raw
from suanli.core.windows import list_windows, merge_answers
from suanli.engines.predictor import Prediction, decide_by, empty_answer, predictions, split, stack
from suanli.serving.batching import Batcher
from suanli.serving.bodies import State
from suanli.serving.encoder import Encoder
from suanli.serving.figures import Figures
from suanli.serving.policy import Curve, Policy
from suanli.serving.protocol import InferRequest, InferResponse, Refusal, bad_request
from suanli.serving.tensors import Signature
from suanli.serving.worker import EngineDied, Worker, start_worker

if TYPE_CHECKING:
    from suanli.serving.log import Log

# Before an engine is started again. Twice at once: an input that kills it does so in a batch, and then alone.
PAUSES_S = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0  # without a crash: the next pause is the first one again
GROWN = 2.0  # an engine leaks when it has this many times its warm memory,
GROWN_BYTES = 1 << 29  # and this much more
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


async def load_model(
    name: str, version: str, subject: Path, options: ModelOptions, *, pool: Executor, log: Log
) -> ServedModel:
    """Starts an engine for the model in `subject`; `pool` decodes its inputs. Raises EngineDied with the reason."""
    worker = await _start_engine(subject, options)
    try:
        return ServedModel(name, version, subject, options, worker, pool=pool, log=log)
    except BaseException:
        worker.close()
        raise


async def _start_engine(subject: Path, options: ModelOptions) -> Worker:
    worker = await start_worker(
        subject,
        engine=options.engine,
        device=options.device,
        threads=options.threads,
        trust_code=options.trust_code,
    )
    try:
        if worker.info.torch:  # then `suanli predict` resizes by torch, and answers here must be the same
            await asyncio.to_thread(importlib.import_module, "torch")
    except BaseException:
        worker.close()
        raise
    return worker


class NothingReadable(Refusal):
    """None of the inputs of a request can be read. `predictions` say why, each for itself."""

    def __init__(self, predictions: Sequence[Prediction]) -> None:
        named = [f"{one.name}: {one.error}" for one in predictions[:3]]
        more = f" And {len(predictions) - 3} more." if len(predictions) > 3 else ""
        super().__init__(400, " ".join(named) + more)
        self.predictions = predictions


class ServedModel:
    """Made by `load_model`; `infer` and `predict` answer, `drain` and `close` end it. All on one asyncio loop."""

    def __init__(
        self,
        name: str,
        version: str,
        subject: Path,
        options: ModelOptions,
        worker: Worker,
        *,
        pool: Executor,
        log: Log,
    ) -> None:
        self.name, self.version, self.subject = name, version, subject
        self.state: State = "ready"
        self.reason = ""  # why the model isn't ready
        self.info = worker.info
        self.preprocess, self.task = worker.preprocess, worker.task
        self.signature = Signature(name, self.preprocess, self.task)
        self.empty = empty_answer(self.task, self.preprocess)
        self._geometry = self.preprocess.geometry  # of inputs that come encoded
        self.figures = Figures()
        self.policy = Policy(Curve(worker.seconds), p99_s=options.p99_s, most=worker.layout.batch)
        self.batcher = Batcher(self.policy, self.figures, on_death=self._handle_death)
        self._encoder = Encoder(self.preprocess, pool=pool, max_pixels=options.max_pixels)
        self._options, self._log = options, log
        self._users = 0  # requests that are being answered
        self._crashes = 0  # without a time of STEADY_S between them
        self._last_crash_s = -math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._worker: Worker | None = None
        self._warm_bytes = 0
        self._use(worker)
        self._start_task(self._watch_memory())
        self._log.event("model ready", model=name, version=version, engine=self.info.engine,
                        precision=self.info.precision, batch=self.policy.batch, pid=worker.pid)  # fmt: skip
        if not self.policy.reachable:
            self._log.warning(
                "the latency target can't be kept",
                model=name,
                one_input_ms=round(1e3 * self.policy.curve.seconds(1), 3),
                target_ms=round(1e3 * self.policy.target_s, 3),
            )

    # --- the engine ---

    def _use(self, worker: Worker) -> None:
        """The next batches go to `worker`; an engine before it answers what it has, and ends."""
        self._worker, self._warm_bytes = worker, worker.memory_bytes
        previous = self.batcher.use(worker)
        if previous is not None:
            self._start_task(self._retire(previous))

    async def _retire(self, worker: Worker) -> None:
        try:
            await worker.idle()
        finally:
            worker.close()

    async def _replace_engine(self) -> None:
        """Raises EngineDied with the reason; the engine before, if there is one, then goes on."""
        worker = await _start_engine(self.subject, self._options)
        if (worker.preprocess, worker.task) != (self.preprocess, self.task):
            worker.close()
            raise EngineDied("the model on disk is another one now")
        self._use(worker)

    def _handle_death(self, worker: Worker, reason: str) -> None:
        worker.close()
        if self.state in ("draining", "closed") and not self.batcher.rows:
            return
        steady = time.monotonic() - self._last_crash_s > STEADY_S
        pause_s = self._count_crash(reason, 0 if steady else self._crashes + 1)
        self._log.error("engine lost", model=self.name, version=self.version, reason=reason, again_in_s=pause_s)
        if pause_s:
            self.batcher.fail_waiting(self._not_ready())
        self._start_task(self._restart(pause_s))

    async def _restart(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        self.figures.restarts += 1
        try:
            await self._replace_engine()
        except EngineDied as error:
            pause_s = self._count_crash(str(error), self._crashes + 1)
            self.batcher.fail_waiting(self._not_ready())
            self._log.error("engine did not start", model=self.name, reason=str(error), again_in_s=pause_s)
            if self.state != "closed":
                self._start_task(self._restart(pause_s))
            return
        if self.state == "failed":
            self.state, self.reason = "ready", ""
        self._log.event("engine started again", model=self.name, version=self.version)

    def _count_crash(self, reason: str, crashes: int) -> float:
        """Seconds to wait before the engine is started again."""
        self._crashes, self._last_crash_s = crashes, time.monotonic()
        if self.state not in ("draining", "closed"):
            self.state = "failed"
        self.reason = reason
        return PAUSES_S[min(crashes, len(PAUSES_S) - 1)]

    async def _watch_memory(self) -> None:
        """Replaces an engine that leaks, without a pause for clients."""
        while self.state not in ("draining", "closed"):
            await asyncio.sleep(WATCH_S)
            worker = self._worker
            if worker is None or self.state != "ready":
                continue
            if worker.memory_bytes > max(GROWN * self._warm_bytes, self._warm_bytes + GROWN_BYTES):
                self._log.warning("engine leaks", model=self.name, memory_bytes=worker.memory_bytes,
                                  at_start_bytes=self._warm_bytes)  # fmt: skip
                self.figures.restarts += 1
                try:
                    await self._replace_engine()
                except EngineDied as error:
                    self._log.error("engine not replaced", model=self.name, reason=str(error))
                    await asyncio.sleep(STEADY_S)

    def _start_task(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("task failed", model=self.name, version=self.version, reason=repr(error)[:500])

    async def drain(self) -> None:
        """Returns when all requests are answered; nothing may send new ones meanwhile."""
        if self.state != "closed":
            self.state = "draining"
        while self._users:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        self.batcher.use(None)
        self.batcher.fail_waiting(Refusal(503, f"Model {self.name} was unloaded."))
        if self._worker is not None:
            self._worker.close()
            self._worker = None  # frees the shared memory now, and not at the next collection of cycles

    # --- answering ---

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def memory_bytes(self) -> int | None:
        """Resident memory of the engine's process."""
        return None if self._worker is None else self._worker.memory_bytes

    def admit(self, inputs: int = 1) -> None:
        """Raises Refusal(503) where a request can't be answered in time. Cheap enough to call before reading its body,
        too."""
        if self.state not in ("ready", "draining"):
            raise self._not_ready()
        retry_after_s = self.policy.retry_after_s(self.batcher.rows + self._encoder.waiting, inputs)
        if retry_after_s is not None:
            message = f"Model {self.name} has as many requests as it can answer in time."
            raise Refusal(503, message, retry_after_s=retry_after_s)

    def _not_ready(self) -> Refusal:
        problem = "was unloaded" if self.state == "closed" else f"is not ready: {self.reason}"
        return Refusal(503, f"Model {self.name} {problem}.", retry_after_s=1.0)

    async def infer(self, request: InferRequest, *, deadline: float | None = None) -> InferResponse:
        """The answer to a request of the protocol. `deadline` is a time of the loop's clock. Raises Refusal."""
        with self._count_request() as count:
            count[0] = inputs = self.signature.count_inputs(request)
            self.signature.check_outputs(request)
            timeout_us = request.parameters.get("timeout")
            if timeout_us is not None and (type(timeout_us) is not int or not 0 <= timeout_us < 1 << 62):
                raise bad_request("timeout is a number of microseconds; 0 means none.")
            if timeout_us:
                end = asyncio.get_running_loop().time() + timeout_us / 1e6
                deadline = end if deadline is None else min(end, deadline)
            self.admit(inputs)
            arrival_s = time.monotonic()
            encoded = await self._read(request)
            if isinstance(encoded, Mapping):
                results, geometries = await self._compute(encoded, arrival_s, deadline), [self._geometry] * inputs
            else:
                results = await self._compute_encoded(encoded, self.task, arrival_s, deadline)
                geometries = [one.geometry for one in encoded]
            start = time.perf_counter()
            outputs = self.signature.make_outputs(request, results, geometries)
            self.figures.output.add(time.perf_counter() - start)
            return InferResponse(id=request.id, model_name=self.name, model_version=self.version, outputs=outputs)

    async def predict(
        self, names: Sequence[str], raws: Sequence[Raw], *, top: int | None, threshold: float | None = None
    ) -> list[Prediction]:
        """For each input its answer, with at most `top` entries where it ranks, or an error. Raises Refusal, and
        NothingReadable where all have errors."""
        with self._count_request() as count:
            count[0] = len(raws)
            try:
                task = decide_by(self.task, threshold)
            except UsageError as error:
                raise bad_request(str(error)) from error
            self.admit(len(raws))
            arrival_s = time.monotonic()
            encoded = await self._encode(raws)
            good = [one for one in encoded if isinstance(one, EncodedInput)]
            results = split(await self._compute_encoded(good, task, arrival_s, None)) if good else []
            answers = predictions(names, encoded, results, task, self.empty, top=top)
            if not good:
                raise NothingReadable(answers)
            return answers

    @contextlib.contextmanager
    def _count_request(self) -> Iterator[list[int]]:
        """Counts a request and how it ended; the list is for the number of its inputs."""
        start, count = time.perf_counter(), [0]
        self._users += 1
        try:
            yield count
        except Refusal as error:
            self.figures.count_failure(time.perf_counter() - start, error.status)
            raise
        except asyncio.CancelledError:
            self.figures.count_failure(time.perf_counter() - start, 499)
            raise
        else:
            self.figures.count_answer(time.perf_counter() - start, count[0])
        finally:
            self._users -= 1

    async def _read(self, request: InferRequest) -> Arrays | Sequence[EncodedInput]:
        """The inputs of a request: encoded here, or as they came where clients have encoded them."""
        inputs = self.signature.read_inputs(request)
        if isinstance(inputs, Mapping):
            return inputs
        encoded: list[EncodedInput] = []
        for i, one in enumerate(await self._encode(inputs)):
            if isinstance(one, str):
                raise bad_request(f"Input {i} can't be read: {one}")
            encoded.append(one)
        return encoded

    async def _encode(self, raws: Sequence[Raw]) -> list[EncodedInput | str]:
        delay_s = self._encoder.delay_s
        if delay_s > self.policy.target_s:
            raise Refusal(503, f"Model {self.name} can't decode more inputs at the moment.", retry_after_s=delay_s)
        start = time.perf_counter()
        try:
            return await self._encoder.encode(raws)
        finally:
            self.figures.encode.add(time.perf_counter() - start)

    async def _compute_encoded(
        self, encoded: Sequence[EncodedInput], task: Task, arrival_s: float, deadline: float | None
    ) -> Arrays:
        """The task's outputs (B, …) for B inputs, at least one; of those with windows, merged."""
        windows = [window for one in encoded for window in list_windows(one)]
        outputs = await self._compute(stack(windows, self.preprocess), arrival_s, deadline)
        if not self.preprocess.has_windows:
            return outputs
        merged = merge_answers(task, self.preprocess, encoded, split(outputs))
        return {name: np.stack([one[name] for one in merged]) for name in outputs}

    async def _compute(self, inputs: Arrays, arrival_s: float, deadline: float | None) -> Arrays:
        """The task's outputs (B, …) for a request that arrived at `arrival_s` of the monotonic clock."""
        if self.state not in ("ready", "draining", "failed"):
            raise self._not_ready()
        before_s = time.monotonic() - arrival_s
        outputs = await self.batcher.submit(inputs, deadline)
        # A request also waits for this process before it is read. That can't be measured, but what comes back from the
        # engine waits in the same way.
        after_s = time.monotonic() - self.batcher.last_answer_s + self.batcher.overhead_s
        self.policy.add_outside_time(before_s + after_s)
        return outputs
