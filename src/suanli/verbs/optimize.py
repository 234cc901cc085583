"""optimize: the fastest engine that this machine can run and that still gives the right answers.

Leaves the chosen engine and a reference that runs anywhere in `model/engines/`, with the whole table of what was
tried. How engines are searched is in `autotune.py`. What this doesn't do: change the model, or read the test split.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core import registry
from suanli.core.console import duration
from suanli.core.errors import MachineError, RunBusy, UsageError, unknown
from suanli.core.run import Run, measurement
from suanli.core.settings import parse_duration
from suanli.core.storage import raise_storage_errors
from suanli.core.types import AnyPath, Device, Engine, Json
from suanli.engines import store
from suanli.engines.candidates import GOALS, Candidate, SearchResult
from suanli.engines.sandbox import SandboxError
from suanli.engines.search import EngineSearch
from suanli.machine import device as hardware
from suanli.machine.energy import counters
from suanli.verbs._subjects import Options, ResolvedSubject, resolve_subject

if TYPE_CHECKING:
    from rich.console import Group


WORK = ".suanli-work-"  # how folders begin that are gone when the work is done


@dataclass(frozen=True, kw_only=True)
class OptimizeResult:
    """What an optimisation came to, and where the engines lie."""

    path: Path  # the folder of engines
    search: SearchResult
    index: Json  # engines.json

    @property
    def chosen(self) -> Candidate:
        return self.search.chosen

    def to_json(self) -> dict[str, Json]:
        return self.search.to_json() | {"engines": str(self.path)}


class TooSlow(MachineError):
    """No engine is as fast as was asked for; `result` has every figure."""

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
    `tolerance` the loss of the primary metric, as a fraction, that is accepted (default: the task's); `time_budget`
    the time for all of it. Calibration and examination use the data of the run, or `data`; without, only engines that
    keep float32 are tried. `mean` and `std` of each channel (white is 1) and `size` ("224", "224x160") say what a
    foreign network learned with. Engines go into the model folder; for a foreign one into `out`.

    Raises MachineError where no engine meets `max_latency_ms`, and what reading the subject raises.
    """
    if goal not in GOALS:
        raise unknown("goal", goal, GOALS)
    if tolerance is not None and not 0 <= tolerance < 1:
        raise UsageError(
            f"A tolerance of {tolerance} is not a share.", fix="Give 0 to 1, such as 0.005 for half a point."
        )
    if max_latency_ms is not None and not max_latency_ms > 0:
        raise UsageError(f"A latency of {max_latency_ms} ms can't be met.", fix="Give milliseconds above 0.")
    started = time.monotonic()
    names = _names(engines)
    budget_s = parse_duration(time_budget)
    target = hardware.detect(device)
    meters = counters(target) if goal == "energy" else []
    if goal == "energy" and (not meters or any(meter.read_j() is None for meter in meters)):
        raise MachineError(
            f"The energy that {target.name} takes can't be read here.",
            fix="Choose another goal; on most machines only root may read it.",
        )
    options = Options(
        data=data, cache_dir=cache_dir, weights=weights, size=size, mean=mean, std=std, out=out, trust_code=trust_code
    )
    given = resolve_subject(subject, options)
    with ExitStack() as held:
        if given.run is not None:
            held.enter_context(given.run.lock())  # better now than after the search
        work = held.enter_context(_work(given.engines))
        tuner = EngineSearch(
            given.subject(work),
            target,
            work,
            goal=goal,
            tolerance=given.task.tolerance if tolerance is None else tolerance,
            budget_s=budget_s,
            engines=names,
            max_latency_s=None if max_latency_ms is None else max_latency_ms / 1000,
            started=started,
        )
        try:
            found = tuner.search()
        except SandboxError as error:
            raise MachineError(
                f"Not even the reference can be run here ({error}).", fix="Check the network, and see suanli device."
            ) from error
        if max_latency_ms is not None and (speed := found.chosen.latency()) and speed.p95_s * 1000 > max_latency_ms:
            raise TooSlow(
                OptimizeResult(path=given.engines, search=found, index={"headline": given.task.metric}),
                f"No engine answers in {max_latency_ms:g} ms here; the best, {found.chosen.name}, takes "
                f"{speed.p95_s * 1000:.3g} ms (95 of 100 answers are quicker).",
                fix="Allow more, choose a smaller model, or a faster machine.",
            )
        index = store.save(
            given.engines,
            [_kept(tuner, c, found) for c in _worth_keeping(found)],
            device=target,
            about={
                "weights": given.weights,
                "classes": list(given.classes),
                "preprocess": given.preprocess.to_json(),
                "headline": given.task.metric,
                "found": found.to_json(),
            },
        )
        if given.run is not None:
            _record(given.run, given, target, found)
    return OptimizeResult(path=given.engines, search=found, index=index)


def _names(given: str | None) -> list[str] | None:
    if given is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in names:
        registry.load("engines", name)
    if not names:
        raise UsageError("No engine is named.", fix=f"Name some of: {', '.join(registry.names('engines'))}.")
    return names


@contextmanager
def _work(folder: Path) -> Iterator[Path]:
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


def _worth_keeping(found: SearchResult) -> list[Candidate]:
    """The chosen engine first; last one that keeps float32 and whose files run anywhere."""
    timed = [c for c in found.candidates if c.state == "accepted" and c.speeds]
    exact = [c for c in timed if c.precision == "float32" and _engine(c).portable]
    reference = next((c for c in exact if c.engine == "onnxruntime"), exact[0])
    return [found.chosen] if reference == found.chosen else [found.chosen, reference]


def _engine(candidate: Candidate) -> Engine:
    engine: Engine = registry.load("engines", candidate.engine)
    return engine


def _kept(tuner: EngineSearch, candidate: Candidate, found: SearchResult) -> store.StoredEngine:
    engine = _engine(candidate)
    speed = candidate.throughput() if found.goal == "throughput" else candidate.latency()
    return store.StoredEngine(
        engine=candidate.engine,
        precision=candidate.precision,
        folder=tuner.folder(candidate),
        threads=tuner.threads if speed is None else speed.threads,
        packages=engine.packages,
        portable=engine.portable,
    )


def _record(run: Run, given: ResolvedSubject, device: Device, found: SearchResult) -> None:
    """A line of the ledger for the reference and for the chosen engine."""
    environment = hardware.environment(device)
    for candidate in dict.fromkeys((found.candidates[0], found.chosen)):
        speed, score = candidate.latency(), candidate.score
        if speed is not None:
            run.record(
                measurement(
                    "latency_s",
                    speed.p50_s,
                    "s",
                    environment=environment,
                    recipe=given.recipe,
                    variant=candidate.name,
                    scores={} if score is None else {f"val_{given.task.metric}": score},
                    count=speed.calls,
                )
            )


# --- for people ---


def table(optimized: OptimizeResult) -> Group:
    """What was tried, the fastest first, and what was chosen."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found = optimized.search
    reference, metric = found.candidates[0], optimized.index["headline"]
    shown = Table(box=None, pad_edge=False, padding=(0, 1))
    shown.add_column("engine", no_wrap=True)
    for title in ("p50 ms", "p95", "p99", "inputs/s", "times", "MB", metric):
        shown.add_column(title, justify="right", no_wrap=True)
    for c in sorted((c for c in found.candidates if c.speeds), key=lambda c: c.cost(found.goal)):
        speed, most = c.latency(), c.throughput()
        assert speed is not None
        assert most is not None
        shown.add_row(
            Text(f"{'>' if c == found.chosen else '*' if c.best else ' '} {c.name}"),
            *(f"{value * 1000:.3g}" for value in (speed.p50_s, speed.p95_s, speed.p99_s)),
            f"{most.per_s:,.0f}",
            f"{reference.cost(found.goal) / c.cost(found.goal):.2f}",
            "" if c.size_bytes is None else f"{c.size_bytes / 1e6:.1f}",
            "" if c.score is None else f"{c.score:.2%}",
        )
    others: dict[tuple[str, str], list[str]] = {}
    for c in found.candidates:
        if not c.speeds:
            others.setdefault((c.state, c.reason), []).append(c.name)
    lines = [Text(f"  {state}: {', '.join(names)}: {reason}", style="dim") for (state, reason), names in others.items()]
    return Group(shown, *lines, Text(_summary(optimized)))


def _summary(optimized: OptimizeResult) -> str:
    found = optimized.search
    chosen, reference = found.chosen, found.candidates[0]
    times = reference.cost(found.goal) / chosen.cost(found.goal)
    lines = [
        f"> chosen for {found.goal}: {chosen.name}, {times:.2f} times as good as the reference, {reference.name}; "
        "* no other is as good in every respect."
    ]
    if chosen.difference is not None:
        of = "" if found.examples == found.of_examples else f" of {found.of_examples:,}"
        d = chosen.difference
        lines.append(
            f"{optimized.index['headline']} {100 * d.median:+.2f} points (95 % interval {100 * d.low:+.2f} to "
            f"{100 * d.high:+.2f}) on {found.examples:,}{of} validation examples."
        )
        if not d.resolves(found.tolerance):
            lines.append(
                f"So few can't show a loss of {100 * found.tolerance:.2g} points; "
                f"its answers differ by {chosen.drift:.2g} on average."
            )
    else:
        lines.append("Without labelled data only float32 was tried, and answers were compared on made-up inputs.")
    lines.append(f"Took {duration(found.seconds)} of {duration(found.budget_s)}.")
    return "\n".join([*lines, f"Engines: {optimized.path}"])
