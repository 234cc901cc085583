"""The search for the fastest engine whose answers are still right: built, examined, timed, each in its own process.

Every candidate (an engine in a precision) is held against the reference, which is the float32 graph that was trained,
on validation examples that took no part in calibration. It is refused where

- the precision that it claims isn't what most of its products and convolutions run in,
- its answers depend on how many inputs it gets at once,
- its answers differ from the reference's by more than rounding to its precision explains, whatever the labels say,
- the primary metric is worse than the tolerance, even at the better end of the paired difference's interval.

Where int8 fails by its answers, the layers that were measured to hurt most go back to higher precision, twice as many
each time, until it passes or half of them are back. What is left is timed by turns, so that what slows the machine
slows all of them; what is far behind in every respect gets no further turns.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from suanli.core import compare, registry
from suanli.core.console import Progress, say
from suanli.core.errors import pip_install
from suanli.core.types import Device, Engine, Json, Placement, Task
from suanli.engines.candidates import Candidate, SearchResult, choose, compute_speed, mark_best
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine.device import cores
from suanli.machine.timing import percentile

# The largest difference of a probability between batches of other sizes, and, for float32, to the reference.
STEADY = {"float32": 1e-3, "tfloat32": 1e-2, "bfloat16": 0.1, "float16": 1e-2, "int8": 0.1, "float8": 0.1}
# The largest mean total variation distance to the reference's answers. Rounding to int8 was measured to cause 0.002 to
# 0.03, calibrating on noise 0.15, normalising with another data set's mean 0.07 and more.
DRIFT = {"float32": 1e-3, "tfloat32": 1e-2, "bfloat16": 2e-2, "float16": 1e-2, "int8": 5e-2, "float8": 5e-2}
FEW = 12  # inputs that are answered at batch 1 and 3, too
BATCHES = (1, 16, 64)  # for throughput, with all threads
TURN_S = 0.25  # of timing, for each candidate in each round
ROUNDS = 5
WARM_UP = 2  # calls that don't count
SLOW_S = 2.0  # a turn may take as long for the sake of more calls
FAR_BEHIND = 1.5  # times the best's: no further turns
EXAM_SHARE = 0.03  # of the budget for one candidate's answers
TIMING_SHARE = 0.3  # of the budget that is kept for timing
EXAM_BATCH = 64
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is optimised, and what its engines are held against."""

    model: Path | None  # the model folder
    graph: Path | None  # a graph that is there already; None: it is exported
    task: Task
    classes: tuple[str, ...]
    rows: np.ndarray  # validation examples (N, *row_shape); without labels, made-up ones
    targets: np.ndarray | None  # (N,); None: there are no labels
    calibration: np.ndarray | None  # training examples (M, *row_shape)
    examples: int  # that there are; rows may be fewer
    trust_code: bool = False


@dataclass
class _Running:
    """A candidate with its process, waiting to be timed."""

    candidate: Candidate
    host: Sandbox
    times: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    joules: dict[tuple[int, int], list[float | None]] = field(default_factory=dict)
    racing: bool = True


class EngineSearch:
    """One search. `work` is an empty folder on the disk where engines are kept; it isn't cleaned up here."""

    def __init__(
        self,
        subject: Subject,
        device: Device,
        work: Path,
        *,
        goal: str,
        tolerance: float,
        budget_s: float,
        engines: Sequence[str] | None = None,
        max_latency_s: float | None = None,
        started: float | None = None,
    ) -> None:
        """`started` is when the budget began to run, by time.monotonic()."""
        self.subject, self.device, self.work = subject, device, work
        self.goal, self.tolerance, self.budget_s, self.max_latency_s = goal, tolerance, budget_s, max_latency_s
        self.engines = sorted(
            (registry.load("engines", name) for name in engines or registry.names("engines")),
            key=lambda engine: (engine.order, engine.name),
        )
        self.threads = cores()
        self._started = time.monotonic() if started is None else started
        self._stack = ExitStack()
        self._running: list[_Running] = []
        self._done: list[Candidate] = []
        self._no_graph: str | None = None
        self._layers: list[str] | None = None

    # --- the whole ---

    def search(self) -> SearchResult:
        """Raises SandboxError where not even the reference can be run."""
        with self._stack:
            self._write_rows()
            self.graph = self.subject.graph
            if self.graph is None and self._graph_is_wanted():
                self.graph = self._graph()
            self._done.append(self._reference())
            for engine, precision in self._pairs():
                self._done += self._tried(engine, precision)
            self._time()
            if not self._done[0].state == "accepted":
                raise SandboxError(f"{self._done[0].name} {self._done[0].reason}")
            timed = {id(r.candidate): r for r in self._running}
            candidates = mark_best([_with_speeds(c, timed.get(id(c))) for c in self._done])
            return SearchResult(
                candidates=tuple(candidates),
                chosen=choose(candidates, self.goal, self.tolerance, self.max_latency_s),
                goal=self.goal,
                examples=self.count,
                of_examples=self.subject.examples,
                labelled=self.subject.targets is not None,
                tolerance=self.tolerance,
                graph=self._no_graph,
                budget_s=self.budget_s,
                seconds=time.monotonic() - self._started,
            )

    def _host(self) -> Sandbox:
        return Sandbox(self.work / "scratch")

    def folder(self, candidate: Candidate) -> Path:
        """Where its files are."""
        kept = f"-{len(candidate.kept)}" if candidate.kept else ""
        return self.work / f"{candidate.engine}-{candidate.precision}{kept}"

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self._started)

    # --- before the candidates ---

    def _write_rows(self) -> None:
        np.save(self.work / "rows.npy", self.subject.rows, allow_pickle=False)
        if self.subject.calibration is not None:
            np.save(self.work / "calibration.npy", self.subject.calibration, allow_pickle=False)

    def _graph_is_wanted(self) -> bool:
        """Whether any engine that reads an ONNX graph can run here: to export it takes longer than to build some
        engines. A foreign subject without a network has one already."""
        readers = [engine for engine in self.engines if engine.needs == "onnx"]
        return any(
            engine.why_not(self.device, precision) is None and _missing(engine.packages) is None
            for engine in readers
            for precision in engine.precisions
        )

    def _graph(self) -> Path | None:
        missing = _missing(("onnx", "onnxscript"))
        if missing:
            self._no_graph = missing
            return None
        assert self.subject.model is not None
        path = self.work / "model.onnx"
        with self._host() as host:
            try:
                host.ask(
                    max(60.0, self.left_s() / 2),
                    "export",
                    model=str(self.subject.model),
                    path=str(path),
                    trust_code=self.subject.trust_code,
                )
            except SandboxError as error:
                self._no_graph = str(error)
                return None
        return path

    def _reference(self) -> Candidate:
        """The first engine that keeps float32: PyTorch where there is a model, else what runs the graph."""
        engine = registry.load("engines", "eager" if self.subject.model is not None else "onnxruntime")
        candidate = Candidate(engine=engine.name, precision="float32", state="accepted", reason=REFERENCE)
        candidate, host = self._ready(engine, candidate, limit_s=math.inf)
        few = min(len(self.subject.rows), EXAM_BATCH)
        for _ in range(2):  # the first call wakes things up
            seconds = host.ask(600, "answer", **self._exam(self.threads, few, few))["took_s"]
        self.input_s = max(seconds / few, 1e-9)
        fits = int(EXAM_SHARE * self.budget_s / self.input_s)
        self.count = min(len(self.subject.rows), max(fits, EXAM_BATCH))
        self.reference = self._answers(host, self.count, EXAM_BATCH)
        candidate = self._settled(self._scored(candidate, self.reference), host)
        self._running.append(_Running(candidate=candidate, host=host))
        return candidate

    # --- one candidate ---

    def _pairs(self) -> Iterable[tuple[Engine, str]]:
        reference = self._running[0].candidate
        pairs = [(engine, precision) for engine in self.engines for precision in engine.precisions]
        # The graph as it is costs nothing to build, and is what runs anywhere: never for want of time left out.
        pairs.sort(key=lambda pair: (pair[0].name, pair[1]) != ("onnxruntime", "float32"))
        for engine, precision in pairs:
            if (engine.name, precision) != (reference.engine, reference.precision):
                yield engine, precision

    def _tried(self, engine: Engine, precision: str) -> list[Candidate]:
        """The candidate, and where it was rescued, the rescued one behind it."""
        candidate = Candidate(engine=engine.name, precision=precision)
        impossible = self._why_not(engine, precision)
        if impossible:
            return [replace(candidate, state="impossible", reason=impossible)]
        say(f"{candidate.name}: building and examining")
        candidate = self._entered(engine, candidate)
        if candidate.state == "refused" and engine.quantized_ops and precision == "int8" and self._inexact(candidate):
            return [candidate, *self._rescued(engine)]
        return [candidate]

    def _entered(self, engine: Engine, candidate: Candidate) -> Candidate:
        """Built and examined; if accepted, waiting to be timed."""
        left = self.left_s() - TIMING_SHARE * self.budget_s
        if left <= 0:
            return replace(candidate, state="no time", reason="the time budget was spent on others")
        host: Sandbox | None = None
        try:
            candidate, host = self._ready(engine, candidate, limit_s=left)
            candidate = self._examined(candidate, host)
            if candidate.state == "accepted":
                candidate = self._settled(candidate, host)
        except SandboxError as error:
            candidate = replace(candidate, state="lost", reason=str(error))
        if host is not None and candidate.state == "accepted":
            self._running.append(_Running(candidate=candidate, host=host))
        elif host is not None:
            host.close()
        return candidate

    def _inexact(self, candidate: Candidate) -> bool:
        if candidate.drift is None or candidate.difference is None:
            return False
        return candidate.drift > DRIFT[candidate.precision] or candidate.difference.exceeds(self.tolerance)

    def _rescued(self, engine: Engine) -> list[Candidate]:
        try:
            layers = self._sensitive()
        except SandboxError:
            return []
        count = 1
        tried: list[Candidate] = []
        while count <= len(layers) // 2 and (not tried or tried[-1].state == "refused"):
            say(f"{engine.name} int8: again with the {count} most sensitive of {len(layers)} layers kept out")
            kept = Candidate(engine=engine.name, precision="int8", kept=tuple(layers[:count]))
            tried.append(self._entered(engine, kept))
            count *= 2
        return tried[-1:]

    def _sensitive(self) -> list[str]:
        """Names of layers, the one that int8 hurts most first; measured once."""
        if self._layers is None:
            if importlib.util.find_spec("onnxruntime") is None:
                raise SandboxError("not installed: onnxruntime")
            with self._host() as host:
                found = host.ask(
                    max(10.0, self.left_s() / 2),
                    "rank_layers",
                    inputs=self._material(),
                    placement=asdict(self._placement(self.threads)),
                )
            self._layers = [name for name, _ in found["layers"]]
        return self._layers

    def _why_not(self, engine: Engine, precision: str) -> str | None:
        if reason := engine.why_not(self.device, precision):
            return reason
        if missing := _missing((*engine.packages, *(engine.build_packages if precision == "int8" else ()))):
            return missing
        if engine.needs == "onnx" and self.graph is None:
            return f"there is no ONNX graph: {self._no_graph}"
        if engine.needs == "model" and self.subject.model is None:
            return "there is only an ONNX graph, no PyTorch network"
        if precision != "float32" and self.subject.targets is None:
            return "a lower precision can't be examined without labelled data"
        if precision == "int8" and self.subject.calibration is None:
            return "there are no training examples to calibrate with"
        return None

    def _ready(self, engine: Engine, candidate: Candidate, *, limit_s: float) -> tuple[Candidate, Sandbox]:
        """Built in one process, loaded in another, so that memory and load time are those of a user."""
        folder = self.folder(candidate)
        folder.mkdir()
        with self._host() as builder:
            built = builder.ask(
                min(limit_s, 3600.0),
                "build",
                engine=engine.name,
                precision=candidate.precision,
                inputs=self._material(candidate.kept),
                folder=str(folder),
                placement=asdict(self._placement(self.threads)),
            )
        host = self._stack.enter_context(self._host())
        try:
            loaded = self._load(host, candidate, self.threads, limit_s)
        except SandboxError:
            host.close()
            raise
        return replace(
            candidate,
            build_s=built["took_s"],
            load_s=loaded,
            size_bytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        ), host

    def _load(self, host: Sandbox, candidate: Candidate, threads: int, limit_s: float) -> float:
        """Seconds that it took."""
        reply = host.ask(
            min(max(limit_s, 10.0), 600.0),
            "load",
            engine=candidate.engine,
            precision=candidate.precision,
            folder=str(self.folder(candidate)),
            placement=asdict(self._placement(threads)),
        )
        return float(reply["took_s"])

    def _material(self, kept: Sequence[str] = ()) -> Json:
        calibration = self.work / "calibration.npy"
        return {
            "model": None if self.subject.model is None else str(self.subject.model),
            "onnx": None if self.graph is None else str(self.graph),
            "calibration": str(calibration) if calibration.exists() else None,
            "kept": list(kept),
        }

    def _placement(self, threads: int) -> Placement:
        return Placement(device=self.device, threads=threads, trust_code=self.subject.trust_code)

    def _exam(self, threads: int, count: int, batch: int) -> dict[str, Json]:
        out, rows = self.work / "answers.npy", self.work / "rows.npy"
        return {"threads": threads, "rows": str(rows), "count": count, "batch": batch, "out": str(out)}

    def _answers(self, host: Sandbox, count: int, batch: int) -> np.ndarray:
        limit = 60 + 20 * EXAM_SHARE * self.budget_s
        host.ask(limit, "answer", **self._exam(self.threads, count, batch))
        found: np.ndarray = np.load(self.work / "answers.npy", allow_pickle=False)
        if found.shape[1] != len(self.subject.classes):
            raise SandboxError(f"it answers for {found.shape[1]} classes, not {len(self.subject.classes)}")
        if not np.isfinite(found).all():
            raise SandboxError("its answers are not finite numbers")
        return found

    def _examined(self, candidate: Candidate, host: Sandbox) -> Candidate:
        """Accepted, or refused with the reason."""
        ran_in = host.ask(120, "find_precision", threads=self.threads, rows=str(self.work / "rows.npy"))["precision"]
        if ran_in != candidate.precision:
            return _refused(candidate, f"most of it ran in {ran_in}")
        answers = self._answers(host, self.count, EXAM_BATCH)
        candidate = self._scored(candidate, answers)
        few = min(FEW, self.count)
        for batch in (1, 3):
            apart = float(np.abs(self._answers(host, few, batch) - answers[:few]).max())
            if apart > STEADY[candidate.precision]:
                return _refused(candidate, f"answers at batch {batch} and {EXAM_BATCH} differ by up to {apart:.2g}")
        assert candidate.drift is not None
        if candidate.drift > DRIFT[candidate.precision]:
            return _refused(
                candidate, f"answers differ by {candidate.drift:.2g} on average, which rounding doesn't explain"
            )
        if candidate.precision == "float32":
            apart = float(np.abs(answers - self.reference).max())
            if apart > STEADY["float32"]:
                return _refused(candidate, f"answers differ by up to {apart:.2g}, which rounding doesn't explain")
        found = candidate.difference
        if found is not None and found.exceeds(self.tolerance):
            return _refused(
                candidate,
                f"{self.subject.task.metric} {100 * found.median:+.2f} points "
                f"({100 * found.low:+.2f} to {100 * found.high:+.2f})",
            )
        return replace(candidate, state="accepted")

    def _settled(self, candidate: Candidate, host: Sandbox) -> Candidate:
        """With its memory; then loaded for one thread, too, to be timed."""
        memory = host.ask(60, "memory")["bytes"]
        if self.threads > 1:
            self._load(host, candidate, 1, self.left_s())
        return replace(candidate, memory_bytes=memory)

    def _scored(self, candidate: Candidate, answers: np.ndarray) -> Candidate:
        drift = float(np.abs(answers - self.reference).sum(1).mean() / 2)
        if self.subject.targets is None:
            return replace(candidate, drift=drift)
        task, targets = self.subject.task, self.subject.targets[: self.count]
        return replace(
            candidate,
            score=task.scores(answers, targets)[task.metric],
            difference=compare.difference(task, self.reference, answers, targets),
            drift=drift,
        )

    # --- timing ---

    def _cells(self, room_s: float) -> list[tuple[int, int]]:
        """Batch sizes and numbers of threads, as many as one round of all has time for; at least one input, and a
        few, with all threads."""
        every, few, many = ((batch, self.threads) for batch in BATCHES)
        found: list[tuple[int, int]] = []
        spent = 0.0
        for batch, threads in dict.fromkeys((every, few, many, (BATCHES[0], 1), (BATCHES[-1], 1))):
            calls = self._warm_up(batch) + self._least(batch)
            each = max(TURN_S, calls * batch * self.input_s * self.threads / threads)  # none is slower, or not by much
            spent += len(self._running) * each
            if not found or spent <= room_s:
                found.append((batch, threads))
        return sorted(found)

    def _least(self, batch: int) -> int:
        """How many calls make a turn: a tail of latencies needs more, a slow network gets fewer."""
        return max(2, min(20 if batch == 1 else 3, int(SLOW_S / (batch * self.input_s))))

    def _warm_up(self, batch: int) -> int:
        return WARM_UP if batch * self.input_s < SLOW_S else 1

    def _time(self) -> None:
        room_s = max(self.left_s(), TIMING_SHARE * self.budget_s / 2)
        self._timed, until = self._cells(room_s), time.monotonic() + room_s
        with Progress("Timing", ROUNDS) as progress:
            for number in range(ROUNDS):
                racing = [r for r in self._running if r.racing]
                started = time.monotonic()
                for cell in self._timed:
                    if number == 0 and cell != self._timed[0] and time.monotonic() > until:
                        self._timed = [timed for timed in self._timed if timed < cell]
                        break
                    for runner in racing if number % 2 == 0 else racing[::-1]:
                        self._turn(runner, *cell)
                self._drop()
                progress.update(number + 1)
                if time.monotonic() + (time.monotonic() - started) > until:
                    break

    def _turn(self, runner: _Running, batch: int, threads: int) -> None:
        if not runner.racing:
            return
        try:
            found = runner.host.ask(
                60 + 10 * batch * self.input_s * self.threads / threads * (self._warm_up(batch) + self._least(batch)),
                "time",
                threads=threads,
                rows=str(self.work / "rows.npy"),
                batch=batch,
                for_s=TURN_S,
                warm_up=self._warm_up(batch),
                least=self._least(batch),
            )
        except SandboxError as error:
            runner.racing = False
            runner.times.clear()
            lost = replace(runner.candidate, state="lost", reason=f"while it was timed: {error}")
            self._done = [lost if c is runner.candidate else c for c in self._done]
            runner.candidate = lost
            return
        runner.times.setdefault((batch, threads), []).extend(found["seconds"])
        each = None if found["joules"] is None else found["joules"] / (batch * len(found["seconds"]))
        runner.joules.setdefault((batch, threads), []).append(each)

    def _drop(self) -> None:
        """Those that are far behind the best in all that the goal is about stop here; the reference stays, gains are
        told by it."""
        racing = [r for r in self._running if r.racing]
        if not racing:
            return
        matter = [cell for cell in self._timed if (cell[0] == 1) == (self.goal == "latency")]
        matter = matter or self._timed
        best = {cell: min(percentile(r.times[cell], 0.5) for r in racing) for cell in matter}
        for runner in racing[1:]:
            runner.racing = any(percentile(runner.times[cell], 0.5) <= FAR_BEHIND * best[cell] for cell in matter)


def _refused(candidate: Candidate, reason: str) -> Candidate:
    return replace(candidate, state="refused", reason=reason)


def _with_speeds(candidate: Candidate, runner: _Running | None) -> Candidate:
    if runner is None:
        return candidate
    speeds = [compute_speed(*cell, times, runner.joules[cell]) for cell, times in sorted(runner.times.items())]
    return replace(candidate, speeds=tuple(speeds))


def _missing(packages: Iterable[str]) -> str | None:
    """Which of these distributions aren't installed, with the command that adds them."""
    absent = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return f"not installed: {', '.join(absent)} ({pip_install('suanli[engines]')})" if absent else None
