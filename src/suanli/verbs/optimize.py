"""optimize: the fastest engine that this machine can run and that still gives the right answers.

Stores the chosen engine and a reference that runs anywhere in `model/engines/`, with a table of all that was tried.
How engines are searched is in `engines/search.py`. This never changes the model, nor reads the test split.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core import registry
from suanli.core.errors import MachineError, RunBusy, UsageError, unknown
from suanli.core.run import Run, measurement
from suanli.core.settings import parse_duration
from suanli.core.storage import raise_storage_errors
from suanli.core.task import Metric
from suanli.core.types import AnyPath, Device, Engine, Recipe
from suanli.engines import store
from suanli.engines.builder import engine_folder
from suanli.engines.candidates import GOALS, Candidate, SearchResult
from suanli.engines.sandbox import SandboxError
from suanli.engines.search import EngineSearch
from suanli.machine.device import cores, detect, environment
from suanli.machine.energy import counters
from suanli.verbs._engine_table import engine_table
from suanli.verbs._subjects import ResolvedSubject, SubjectOptions, resolve_subject

if TYPE_CHECKING:
    from rich.console import Group


WORK = ".suanli-work-"  # prefix of temporary folders


@dataclass(frozen=True, kw_only=True)
class OptimizeResult:
    path: Path  # the folder of the stored engines
    search: SearchResult
    metric: Metric

    @property
    def chosen(self) -> Candidate:
        return self.search.chosen

    def to_json(self) -> dict[str, object]:
        return self.search.to_json() | {"engines": str(self.path)}


class TooSlow(MachineError):
    """No engine is as fast as the user asked for; `result` has every figure."""

    def __init__(self, result: OptimizeResult, message: str, *, fix: str) -> None:
        super().__init__(message, fix=fix)
        self.result = result


def optimize(
    subject: AnyPath,
    *,
    goal: str = "latency",
    tolerance: float | None = None,
    max_latency_ms: float | None = None,
    time_budget: str | float = "3m",
    engines: str | None = None,
    data: AnyPath | None = None,
    weights: AnyPath | None = None,
    size: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: AnyPath | None = None,
    device: str = "auto",
    cache_dir: AnyPath | None = None,
    trust_code: bool = False,
) -> OptimizeResult:
    """Build every engine that this machine can run, refuse those whose answers aren't right, keep the best.

    `subject` is a run, a model folder, an .onnx file of any framework, or "package.module:function", which builds a
    network, with `weights` (.safetensors). `goal` is "latency" (one input), "throughput", "size" or "energy";
    `tolerance` the loss of the primary metric that is accepted (default: the task's), in its unit or as a share of the
    score, as the metric counts; `time_budget` the time for all of it. Calibration and evaluation use the data of the
    run, or `data`. Without labels answers are compared with the float32 model's, and `tolerance` is the share of them
    that may decide otherwise; without data only engines in float32 are tried. `mean` and `std` of each channel (white
    is 1) and `size` ("224", "224x160") are those that the network of an ONNX file or a function was trained with.
    Engines go into the model folder, or for these into `out`.

    Raises MachineError where no engine meets `max_latency_ms`, and what reading the subject raises.
    """
    started = time.monotonic()
    _check_options(goal, tolerance, max_latency_ms)
    names = _parse_engines(engines)
    budget_s = parse_duration(time_budget)
    target = detect(device)
    _check_energy(goal, target)
    options = SubjectOptions(
        data=data, cache_dir=cache_dir, weights=weights, size=size, mean=mean, std=std, out=out, trust_code=trust_code
    )
    resolved = resolve_subject(subject, options)
    metric = resolved.task.metric
    _check_share(metric, tolerance)
    with ExitStack() as stack:
        if resolved.run is not None:
            stack.enter_context(resolved.run.lock())  # better now than after the search
        work = stack.enter_context(_work_folder(resolved.engines))
        search = EngineSearch(
            resolved.subject(work),
            target,
            work,
            goal=goal,
            tolerance=tolerance,
            budget_s=budget_s,
            engines=names,
            max_latency_s=None if max_latency_ms is None else max_latency_ms / 1000,
            started=started,
        )
        result = OptimizeResult(path=resolved.engines, search=_run(search), metric=metric)
        _check_latency(result, max_latency_ms)
        _store(work, result, resolved, target)
        if resolved.run is not None:
            _record(resolved.run, result, resolved.recipe, target)
    return result


def _check_options(goal: str, tolerance: float | None, max_latency_ms: float | None) -> None:
    if goal not in GOALS:
        raise unknown("goal", goal, GOALS)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"A tolerance of {tolerance} is not a share.", fix="Give 0 or more, such as 0.005.")
    if max_latency_ms is not None and not max_latency_ms > 0:
        raise UsageError(f"A latency of {max_latency_ms} ms can't be met.", fix="Give milliseconds above 0.")


def _check_share(metric: Metric, tolerance: float | None) -> None:
    """Where the metric's tolerance is a share: of the score, or points of a fraction."""
    if tolerance is not None and tolerance >= 1 and (metric.relative or metric.unit == "fraction"):
        raise UsageError(f"A tolerance of {tolerance} is not a share.", fix="Give 0 to 1, such as 0.005.")


def _parse_engines(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        registry.load("engines", name)
    if not names:
        raise UsageError("No engine is named.", fix=f"Name some of: {', '.join(registry.names('engines'))}.")
    return names


def _check_energy(goal: str, device: Device) -> None:
    meters = counters(device) if goal == "energy" else []
    if goal == "energy" and (not meters or any(meter.read_j() is None for meter in meters)):
        raise MachineError(
            f"The energy that {device.name} takes can't be read here.",
            fix="Choose another goal; on most machines only root may read it.",
        )


def _run(search: EngineSearch) -> SearchResult:
    try:
        return search.search()
    except SandboxError as error:
        raise MachineError(
            f"Not even the reference can be run here ({error}).", fix="Check the network, and see suanli device."
        ) from error


def _check_latency(result: OptimizeResult, max_latency_ms: float | None) -> None:
    speed = result.chosen.latency()
    if max_latency_ms is not None and speed is not None and speed.p95_s * 1000 > max_latency_ms:
        raise TooSlow(
            result,
            f"No engine answers in {max_latency_ms:g} ms here; the best, {result.chosen.name}, takes "
            f"{speed.p95_s * 1000:.3g} ms (p95).",
            fix="Allow more, or use a smaller model or a faster machine.",
        )


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside the engines; only one process makes engines there at a time."""
    from filelock import FileLock, Timeout

    with raise_storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunBusy(f"Another process is making engines in {folder}.", fix="Wait until it ends.") from error
        try:
            for remains in folder.glob(f"{WORK}*"):  # of a process that was killed
                shutil.rmtree(remains, ignore_errors=True)
            work = Path(tempfile.mkdtemp(dir=folder, prefix=WORK)).absolute()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
        finally:
            lock.release()


def _store(work: Path, result: OptimizeResult, resolved: ResolvedSubject, device: Device) -> None:
    engines = [_describe_engine(work, c, result.search.goal) for c in _choose_stored(result.search)]
    store.save(
        resolved.engines,
        engines,
        device=device,
        about={
            "weights": resolved.weights,
            "task": {"name": resolved.task.name, "settings": resolved.task.settings},
            "classes": list(resolved.task.classes),
            "preprocess": resolved.preprocess.to_json(),
            "batches": resolved.batches,
            "headline": result.metric.name,
            "found": result.search.to_json(),
        },
    )


def _choose_stored(result: SearchResult) -> list[Candidate]:
    """The chosen engine first; last a float32 engine whose files run anywhere."""
    timed = [c for c in result.candidates if c.state == "accepted" and c.speeds]
    portable = [c for c in timed if c.precision == "float32" and _engine(c).portable]
    reference = next((c for c in portable if c.engine == "onnxruntime"), portable[0])
    return [result.chosen] if reference == result.chosen else [result.chosen, reference]


def _engine(candidate: Candidate) -> Engine:
    engine: Engine = registry.load("engines", candidate.engine)
    return engine


def _describe_engine(work: Path, candidate: Candidate, goal: str) -> store.StoredEngine:
    engine = _engine(candidate)
    speed = candidate.throughput() if goal == "throughput" else candidate.latency()
    return store.StoredEngine(
        engine=candidate.engine,
        precision=candidate.precision,
        folder=engine_folder(work, candidate),
        threads=cores() if speed is None else speed.threads,
        packages=engine.packages,
        portable=engine.portable,
    )


def _record(run: Run, result: OptimizeResult, recipe: Recipe, device: Device) -> None:
    """Writes one line for the reference and one for the chosen engine into the run's ledger."""
    facts = environment(device)
    for candidate in dict.fromkeys((result.search.candidates[0], result.chosen)):
        speed, score = candidate.latency(), candidate.score
        if speed is not None:
            run.record(
                measurement(
                    "latency_s",
                    speed.p50_s,
                    "s",
                    environment=facts,
                    recipe=recipe,
                    variant=candidate.name,
                    scores={} if score is None else {f"val_{result.metric.name}": score},
                    count=speed.calls,
                )
            )


def table(result: OptimizeResult) -> Group:
    """What was tried, the fastest first, and what was chosen."""
    return engine_table(result.search, result.metric, result.path)
