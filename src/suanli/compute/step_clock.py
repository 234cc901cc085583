"""Where the time of a training step goes: a clock that the loop marks at the end of each phase.

    clock = StepClock.of(torch.device("cpu"))
    clock.begin()
    batch = next(batches); clock.mark("input")
    loss = forward(batch); clock.mark("forward")
    loss.backward(); clock.mark("backward")
    optimizer.step(); clock.mark("optimizer")
    clock.end()  # what is left is "host"

A mark assigns the time since the mark before it to its name; a name may occur several times in one step. Steps are
timed as they run, without a profiler, which would slow them down. Timing a step costs about 50 µs on a CPU
(`benchmarks/bench_diagnosis.py`), and after the first window steps are timed only so often that this stays below 1 %
of the time, however short they are.

What the shares mean, on a CPU (`HostClock`):

- a computing phase (copy, forward, backward, graph, optimizer, communication) and "host" get the CPU time of the
  calling thread between their marks;
- "idle" is their wall time minus that: the thread waited for a core, or slept until the other threads of the
  operation were done. OpenMP threads wait actively at first, which counts as computing, so with several threads
  "idle" is a lower bound;
- "input" gets its whole wall time: waiting for a batch is what being limited by input means.

On a GPU (`DeviceClock`), which works through a queue that the host fills, a step lasts from its first event to its
last on the device's own clock, and a phase from mark to mark. Its time is assigned by what limited it:

- if the device reached the end of the phase later than the host had issued it (by more than CAUGHT_UP_S), it is
  taken to have been busy, and the time belongs to the phase;
- if it reached the end as soon as the host had issued it, it had been waiting. The part of that time in which this
  process was on a core is "host" (Python and launches), the rest is "idle" (the host itself waited);
- "input" gets its whole time, as on a CPU.

A phase whose last operation takes longer than CAUGHT_UP_S counts as busy although the device may have waited earlier
in it, so "host" and "idle" are lower bounds there. CPU time is that of the whole process, because the backward pass
runs in a thread of its own; a thread that reads ahead turns some "idle" into "host".

Shares sum to 1. A phase that was never marked is None: unknown or absent. The clock can't tell what happens inside a
phase or between two steps (validation, checkpoints).
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch

SKIPPED = 3  # first steps of a run: they allocate, choose kernels and fill caches
TRIMMED_FROM = 10  # a window of at least so many steps leaves out its slowest: one slow step is not a limit
GOLDEN = 0.618  # multiples of it, modulo 1, spread evenly over the unit interval
MAX_STEPS = 4096  # timed steps that are stored until `window` is called
# Between timed steps, on average. The calls take 10 µs on a CPU in a loop of their own, but 50 µs after a step that
# evicted them from the caches: 0.25 %. A GPU adds six events: an estimated 100 µs at most, 0.5 %.
EVERY_S = 0.02
# Assumed, not measured: an idle GPU reaches an event about 10 µs after it is issued, and the clocks agree to 20 µs.
CAUGHT_UP_S = 5e-5

MARKS = frozenset(("input", "copy", "forward", "backward", "graph", "optimizer", "communication", "host"))
REPORTED = ("input", "copy", "forward", "backward", "optimizer", "communication", "host", "idle")


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How the steps of one window spent their time."""

    shares: Mapping[str, float | None]  # of the step, sum 1; "graph" only where a captured graph was replayed
    step_s: float  # median
    steps: int  # that were timed
    cores_used: float | None = None  # CPU seconds of all threads of this process per second of the steps


class StepClock:
    """Measures nothing and costs nothing: the clock of a device whose time can't be divided into phases."""

    @staticmethod
    def of(device: torch.device) -> StepClock:
        if device.type == "cpu":
            return HostClock()
        if device.type == "cuda":
            return DeviceClock(CudaTimeline(device))
        return StepClock()

    def begin(self) -> None:
        """A step starts. A step that began and didn't end doesn't count."""

    def mark(self, name: str) -> None:
        """The phase `name` ends here. Raises ValueError for a name that isn't one of MARKS."""

    def end(self) -> None:
        """The step ends; what came after the last mark is "host"."""

    def window(self) -> Shares | None:
        """The shares of the steps since the last call; a new window starts. None where no step was timed.

        On a GPU this waits for the device: best called where the loop has just done so.
        """
        return None


@dataclass(kw_only=True, slots=True)
class _StepTimes:
    """One step: `names` of n phases and the n + 1 moments around them."""

    names: list[str] = field(default_factory=list)
    wall_ns: list[int] = field(default_factory=list)  # of the host
    cpu_ns: list[int] = field(default_factory=list)
    process_ns: int = 0
    events: list[Any] = field(default_factory=list)
    device_s: list[float] = field(default_factory=list)  # the events, on the host's clock


class HostClock(StepClock):
    """For a device that has finished an operation when the call returns: the CPU."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_ns = every_s * 1e9
        self._begun = 0
        self._due_ns = 0.0
        self._first_window = True
        self._step: _StepTimes | None = None
        self._steps: deque[_StepTimes] = deque(maxlen=MAX_STEPS)

    def begin(self) -> None:
        self._step = None
        self._begun += 1
        now = time.perf_counter_ns()
        if self._begun > SKIPPED and (self._first_window or now >= self._due_ns):
            # At uneven intervals (0.5 to 1.5 times), or an event of every few steps could be missed each time.
            self._due_ns = now + self._every_ns * (0.5 + GOLDEN * self._begun % 1)
            self._step = _StepTimes(process_ns=time.process_time_ns())
            self._stamp(self._step)

    def mark(self, name: str) -> None:
        if self._step is not None:
            if name not in MARKS:
                raise ValueError(f"no phase {name!r}; there are {', '.join(sorted(MARKS))}")
            self._step.names.append(name)
            self._stamp(self._step)

    def end(self) -> None:
        if (step := self._step) is not None:
            self.mark("host")
            step.process_ns = time.process_time_ns() - step.process_ns
            self._steps.append(step)
            self._step = None

    def window(self) -> Shares | None:
        steps = list(self._steps)
        self._steps.clear()
        self._first_window = self._first_window and not steps
        if not steps:
            return None
        typical = statistics.median(map(self._seconds, steps))
        if len(steps) >= TRIMMED_FROM:
            steps.remove(max(steps, key=self._seconds))
        wall_ns = sum(s.wall_ns[-1] - s.wall_ns[0] for s in steps)
        parts = self._parts(steps)
        if not any(parts.values()):  # steps too short for the system's clock
            return None
        return Shares(
            shares=_normalize(parts),
            step_s=typical,
            steps=len(steps),
            cores_used=sum(s.process_ns for s in steps) / wall_ns,
        )

    def _stamp(self, step: _StepTimes) -> None:
        step.wall_ns.append(time.perf_counter_ns())
        step.cpu_ns.append(time.thread_time_ns())

    def _seconds(self, step: _StepTimes) -> float:
        return (step.wall_ns[-1] - step.wall_ns[0]) / 1e9

    def _parts(self, steps: Sequence[_StepTimes]) -> dict[str, float]:
        """Seconds by phase. Summed before they are compared: some systems count CPU time in ticks longer than a
        step."""
        wall: dict[str, int] = defaultdict(int)
        cpu: dict[str, int] = defaultdict(int)
        for step in steps:
            for name, (w, w_end), (c, c_end) in zip(
                step.names, pairwise(step.wall_ns), pairwise(step.cpu_ns), strict=True
            ):
                wall[name] += w_end - w
                cpu[name] += c_end - c
        waited = {name: max(0, wall[name] - cpu[name]) for name in wall if name != "input"}
        parts: dict[str, float] = {name: wall[name] - waited.get(name, 0) for name in wall}
        return parts | {"idle": sum(waited.values())}


class Timeline(Protocol):
    """The queue of a device: events in it, and the time between them on the device's clock."""

    def record(self) -> Any:
        """An event behind all that was issued so far; doesn't wait."""

    def wait(self, event: Any) -> None: ...

    def seconds(self, first: Any, second: Any) -> float: ...


class CudaTimeline:
    """The stream that is current on the device when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return float(first.elapsed_time(second)) / 1e3


class DeviceClock(HostClock):
    """For a device that works through a queue. No mark may be set during the capture of a graph."""

    def __init__(self, timeline: Timeline, every_s: float = EVERY_S) -> None:
        super().__init__(every_s)
        self._timeline = timeline
        self._start: tuple[float, Any] | None = None  # a moment on both clocks

    def begin(self) -> None:
        if self._start is None and self._begun == SKIPPED:
            self._start = self._moment()
        super().begin()

    def window(self) -> Shares | None:
        if self._steps and self._start is not None:
            now = self._moment()
            self._align(self._start, now)
            self._start = now
        return super().window()

    def _stamp(self, step: _StepTimes) -> None:
        step.wall_ns.append(time.perf_counter_ns())
        step.cpu_ns.append(time.process_time_ns())
        step.events.append(self._timeline.record())

    def _moment(self) -> tuple[float, Any]:
        """Now, on both clocks. The device must have nothing to do, or the event would come later."""
        self._timeline.wait(self._timeline.record())
        now = time.perf_counter()
        event = self._timeline.record()
        self._timeline.wait(event)
        return now, event

    def _align(self, start: tuple[float, Any], end: tuple[float, Any]) -> None:
        """Convert the events of all steps to the host's clock. The two clocks drift apart by tens of microseconds per
        second, so they are aligned at both ends of the window. Times are added up from event to event, since the
        driver returns them in float32."""
        at, previous = 0.0, start[1]
        for step in self._steps:
            step.device_s = []
            for event in step.events:
                at += self._timeline.seconds(previous, event)
                step.device_s.append(at)
                previous = event
        at += self._timeline.seconds(previous, end[1])
        scale = (end[0] - start[0]) / at if at > 0 else 1.0
        for step in self._steps:
            step.device_s = [start[0] + scale * s for s in step.device_s]

    def _seconds(self, step: _StepTimes) -> float:
        return step.device_s[-1] - step.device_s[0]

    def _parts(self, steps: Sequence[_StepTimes]) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for step in steps:
            issued, busy = [ns / 1e9 for ns in step.wall_ns], [ns / 1e9 for ns in step.cpu_ns]
            for name, seconds in attribute_time(step.names, issued, step.device_s, busy):
                total[name] += seconds
        return total


def attribute_time(
    names: Sequence[str], issued_s: Sequence[float], reached_s: Sequence[float], cpu_s: Sequence[float]
) -> list[tuple[str, float]]:
    """Seconds of one step's phases on a device with a queue, by the rules in the module's docstring.

    `names` of n phases; of the n + 1 moments around them when the host issued the event, when the device reached
    it (same clock), and the process's CPU time until then. Adds up to `reached_s[-1] - reached_s[0]`.
    """
    parts = []
    for i, name in enumerate(names):
        phase_s = max(0.0, reached_s[i + 1] - reached_s[i])
        if name == "input" or (name != "host" and reached_s[i + 1] - issued_s[i + 1] > CAUGHT_UP_S):
            parts.append((name, phase_s))
            continue
        wall_s = issued_s[i + 1] - issued_s[i]
        busy = min(1.0, max(0.0, cpu_s[i + 1] - cpu_s[i]) / wall_s) if wall_s > 0 else 1.0
        parts += [(name, 0.0), ("host", phase_s * busy), ("idle", phase_s * (1 - busy))]
    return parts


def _normalize(parts: Mapping[str, float]) -> dict[str, float | None]:
    total = sum(parts.values())
    shares = {"host": 0.0, "idle": 0.0, **{name: seconds / total for name, seconds in parts.items()}}
    names = REPORTED + (("graph",) if "graph" in shares else ())
    return {name: shares.get(name) for name in names}
