"""The search for the fastest engine whose answers are still right.

Every candidate, an engine in a precision, is built, checked against the reference (`acceptance.py`) and timed
(`timing.py`), each in a process of its own. The reference is the float32 network that was trained. Where int8 fails by
its answers, the layers that were measured to hurt most go back to float32, twice as many each time, until it passes or
half of the layers are back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from suanli.core import registry
from suanli.core.console import duration, say
from suanli.core.errors import UsageError
from suanli.core.types import Device, Engine
from suanli.engines.acceptance import BATCH, AcceptanceCheck, AnswerFiles
from suanli.engines.builder import EngineBuilder, make_builder
from suanli.engines.candidates import Candidate, SearchResult, choose, mark_best
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.engines.subject import Subject
from suanli.engines.timing import EngineTimer, Runner
from suanli.machine.device import cores

ANSWERS_SHARE = 0.03  # of the budget, for one candidate's answers
ANSWERS_BYTES = 1 << 30  # that they may take
TIMING_SHARE = 0.3  # of the budget that is reserved for timing


class EngineSearch:
    """One search. `work` is an empty folder on the disk where engines will be stored; the caller removes it."""

    def __init__(
        self,
        subject: Subject,
        device: Device,
        work: Path,
        *,
        goal: str,
        tolerance: float | None,
        budget_s: float,
        engines: Sequence[str] | None = None,
        max_latency_s: float | None = None,
        started: float | None = None,
    ) -> None:
        """`tolerance` is the loss of the primary metric that is accepted; None: the metric's own. `started` is when the
        budget began to run, by time.monotonic()."""
        self.subject, self.device, self.work = subject, device, work
        self.goal, self.tolerance, self.budget_s, self.max_latency_s = goal, tolerance, budget_s, max_latency_s
        self.engines: list[Engine] = sorted(
            (registry.load("engines", name) for name in engines or registry.names("engines")),
            key=lambda engine: (engine.order, engine.name),
        )
        self.threads = cores()
        self._started = time.monotonic() if started is None else started
        self._examples = work / "examples"
        self._stack = ExitStack()  # of the sandboxes that wait to be timed
        self._layers: list[str] | None = None  # the one that int8 hurts most first

    def search(self) -> SearchResult:
        """Raises SandboxError where not even the reference can be run, UsageError where there is no time for others."""
        with self._stack:
            self.subject.examples.save(self._examples)
            builder = make_builder(
                self.subject,
                self.device,
                self.work,
                engines=self.engines,
                threads=self.threads,
                export_limit_s=max(60.0, self.left_s() / 2),
            )
            reference, check, input_s = self._start_reference(builder)
            entries: list[Candidate | Runner] = [reference]
            pairs = self._pairs(reference.candidate)
            if pairs and self._building_s() <= 0:
                taken_s = time.monotonic() - self._started
                raise UsageError(
                    f"A time budget of {duration(self.budget_s)} leaves no time to try an engine: preparing the "
                    f"reference alone took {duration(taken_s)}.",
                    fix=f"Give more, such as --time-budget {math.ceil(3 * taken_s)}s.",
                )
            for engine, precision in pairs:
                entries += self._try(engine, precision, builder, check)
            timer = EngineTimer(
                examples=self._examples,
                batches=self.subject.examples.batches,
                threads=self.threads,
                input_s=input_s,
                goal=self.goal,
            )
            room_s = max(self.left_s(), TIMING_SHARE * self.budget_s / 2)
            disturbed = timer.time([entry for entry in entries if isinstance(entry, Runner)], room_s)
            if reference.candidate.state != "accepted":
                raise SandboxError(f"{reference.candidate.name} {reference.candidate.reason}")
            results = [entry.result(disturbed) if isinstance(entry, Runner) else entry for entry in entries]
            candidates = mark_best(results)
            return SearchResult(
                candidates=tuple(candidates),
                chosen=choose(candidates, self.goal, check.allowed_loss, self.max_latency_s),
                goal=self.goal,
                examples=check.count,
                of_examples=self.subject.count,
                labelled=self.subject.origin == "labelled",
                origin=self.subject.origin,
                tolerance=check.allowed_loss,
                graph=builder.no_graph,
                budget_s=self.budget_s,
                seconds=time.monotonic() - self._started,
            )

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self._started)

    def _building_s(self) -> float:
        """The time that is left for building engines and checking them."""
        return self.left_s() - TIMING_SHARE * self.budget_s

    def _start_reference(self, builder: EngineBuilder) -> tuple[Runner, AcceptanceCheck, float]:
        """PyTorch in float32 where there is a model, else ONNX Runtime; the check of others by its answers; and the
        seconds that it takes per input."""
        engine: Engine = registry.load("engines", "eager" if self.subject.model is not None else "onnxruntime")
        candidate = Candidate(engine=engine.name, precision="float32", state="accepted", reason="reference")
        candidate, sandbox = builder.build(engine, candidate, math.inf)
        self._stack.enter_context(sandbox)
        files = AnswerFiles(
            examples=self._examples,
            answers=self.work / "answers",
            threads=self.threads,
            outputs=tuple(self.subject.task.outputs),
        )
        few = min(len(self.subject.examples), BATCH)
        batch = BATCH if self.subject.examples.batches else 1
        for _ in range(2):  # the first call warms up
            answers, seconds = files.ask(sandbox, few, batch, 600)
        input_s = max(seconds / few, 1e-9)
        answers_s = ANSWERS_SHARE * self.budget_s
        size_bytes = sum(array.nbytes for block in answers.blocks() for array in block.values()) / few
        most = min(int(answers_s / input_s), int(ANSWERS_BYTES / max(size_bytes, 1)))
        count = min(len(self.subject.examples), max(most, BATCH))
        limit_s = 60 + 20 * answers_s
        answers, _ = files.ask(sandbox, count, batch, limit_s)
        check = AcceptanceCheck(
            subject=self.subject, reference=answers, files=files, tolerance=self.tolerance, limit_s=limit_s
        )
        return self._get_ready(check.score(candidate, answers), sandbox, builder), check, input_s

    def _pairs(self, reference: Candidate) -> list[tuple[Engine, str]]:
        """Engines and precisions to try, the most promising first."""
        pairs = [(engine, precision) for engine in self.engines for precision in engine.precisions]
        # The graph as it is costs nothing to build and runs anywhere, so it is never left out for want of time.
        pairs.sort(key=lambda pair: (pair[0].name, pair[1]) != ("onnxruntime", "float32"))
        return [pair for pair in pairs if (pair[0].name, pair[1]) != (reference.engine, reference.precision)]

    def _try(
        self, engine: Engine, precision: str, builder: EngineBuilder, check: AcceptanceCheck
    ) -> list[Candidate | Runner]:
        """The candidate, and where it was rescued, the rescued one behind it."""
        candidate = Candidate(engine=engine.name, precision=precision)
        impossible = builder.why_not(engine, precision)
        if impossible:
            return [replace(candidate, state="impossible", reason=impossible)]
        say(f"{candidate.name}: building and checking")
        entry = self._build_and_check(engine, candidate, builder, check)
        refused = isinstance(entry, Candidate) and entry.state == "refused" and check.is_inexact(entry)
        if refused and engine.quantized_ops and precision == "int8":
            return [entry, *self._rescue(engine, builder, check)]
        return [entry]

    def _build_and_check(
        self, engine: Engine, candidate: Candidate, builder: EngineBuilder, check: AcceptanceCheck
    ) -> Candidate | Runner:
        """A runner, which waits to be timed, if the candidate is accepted."""
        left_s = self._building_s()
        if left_s <= 0:
            return replace(candidate, state="no time", reason="the time budget was spent on others")
        try:
            candidate, sandbox = builder.build(engine, candidate, left_s)
        except SandboxError as error:
            return replace(candidate, state="lost", reason=str(error))
        self._stack.enter_context(sandbox)
        try:
            candidate = check.check(candidate, sandbox)
            if candidate.state == "accepted":
                return self._get_ready(candidate, sandbox, builder)
        except SandboxError as error:
            candidate = replace(candidate, state="lost", reason=str(error))
        sandbox.close()
        return candidate

    def _rescue(self, engine: Engine, builder: EngineBuilder, check: AcceptanceCheck) -> list[Candidate | Runner]:
        """The engine in int8 with so many of its layers in float32 that it passes, or the last that was tried."""
        try:
            if self._layers is None:
                self._layers = builder.rank_layers(max(10.0, self.left_s() / 2))
        except SandboxError:
            return []
        count = 1
        tried: list[Candidate | Runner] = []
        while count <= len(self._layers) // 2:
            say(f"{engine.name} int8: again with the {count} most sensitive of {len(self._layers)} layers in float32")
            candidate = Candidate(engine=engine.name, precision="int8", kept=tuple(self._layers[:count]))
            entry = self._build_and_check(engine, candidate, builder, check)
            tried.append(entry)
            if isinstance(entry, Runner) or entry.state != "refused":
                break
            count *= 2
        return tried[-1:]

    def _get_ready(self, candidate: Candidate, sandbox: Sandbox, builder: EngineBuilder) -> Runner:
        """Looks up the memory that it takes, then loads it for one thread, too, to be timed."""
        memory_bytes = builder.memory_bytes(sandbox)
        if self.threads > 1:
            builder.load(sandbox, candidate, 1, self.left_s())
        return Runner(candidate=replace(candidate, memory_bytes=memory_bytes), sandbox=sandbox)
