"""Finds the fastest way to compute a training here: measured on real batches, kept only where it helps.

The search starts from plain PyTorch. For each change (a speedup more or less, another number of threads), the planner
first compares outputs and gradients with plain PyTorch's on the same batch with the same weights. Then it times the
change and the best plan so far alternately, and keeps the change only if its gain exceeds the spread. The first
change is the short list, all usual speedups together: it brings most of the gain for one comparison.

Measuring may take 5 % of the forecast training time. What there was no time for is measured by the next training of
the same kind: the plan is stored in the cache directory, under a key of all that determines it. A run that is too
short to measure anything uses the stored plan or the short list. Compiling is tried only where the run is long enough
to win its cost back.

Trials run on copies of network and optimizer; the training itself starts untouched.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from suanli.compute.plan import (
    check_threads,
    error_tolerance,
    plain_plan,
    plan_of_names,
    sort_speedups,
    usable_speedups,
)
from suanli.compute.plan_cache import CachedPlan, PlanCache
from suanli.compute.step_runner import Numbers, apply_settings
from suanli.core.console import say
from suanli.core.errors import GateError, MachineError, SuanliError
from suanli.core.registry import load
from suanli.core.types import Device, Plan, Step, Trial
from suanli.machine import timing
from suanli.machine.device import is_out_of_memory

SHARDED = "sharded"  # origin of a plan that couldn't be measured, since no copy of the network would fit
UNMEASURED = "used without measuring: there is no room for copies of a sharded network to try them on"
PLANNING_SHARE = 0.05  # of the forecast training time that planning may take
MIN_STEPS = 60  # a shorter run can't even afford to check the numbers of the short list
ROUNDS = (3, 6)  # of a comparison, at least and at most
CLEAR, HOPELESS = 1.3, 0.7  # with ratios above or below these, one round less is enough
COMPILE_SAVING = 0.3  # of a step's time that compiling is assumed to save at most
COMPILING_S = (10.0, 1.0)  # assumed before it is measured: fixed, and for each module with weights of its own
COMPILING_LIMIT_S = 600.0
FIRST_STEP_LIMIT_S = 120.0  # of any other change, and less where steps are short
FIRST_STEP_S, FIRST_STEP_TIMES = 10.0, 10.0


class Trainee(Protocol):
    """A copy of a training, which trials may spoil."""

    @property
    def compute(self) -> Step: ...

    def advance(self) -> None:
        """Train one whole step, its input included, and wait for the device."""

    def compute_numbers(self) -> Numbers:
        """Train one step on the first batch and return what it computed."""


class Subject(Protocol):
    """What is to be trained: makes copies to try plans on."""

    @property
    def device(self) -> Device: ...

    @property
    def key(self) -> str: ...

    @property
    def step(self) -> Step: ...

    def trial(self, plan: Plan) -> Trainee: ...


def plan(subject: Subject, requested: str, *, steps: int, threads: int | None = None, cache: Path | None) -> Plan:
    """The plan for "auto", "none" or a list of names, for a training that has `steps` left, counted at full size.

    Raises UsageError for an unknown name, MachineError for a named speedup that can't be used, and GateError for one
    whose numbers are wrong. `cache` None: nothing is stored.
    """
    check_threads(threads)
    if requested != "auto":
        return _check_named(subject, plan_of_names(requested, subject.device, threads))
    store = PlanCache(cache, subject.key, threads)
    cached = store.read()
    if cached is not None and cached.complete:
        return _adapt(cached, subject, steps)
    with store.lock() as is_only_planner:
        cached = store.read()  # another process may have completed it
        if not is_only_planner:
            say("another process is planning on this machine, so nothing is measured now")
            return _adapt(cached, subject, steps) if cached else short_list(subject, threads)
        if cached is not None and cached.complete:
            return _adapt(cached, subject, steps)
        search = _Search(subject, steps, threads, cached)
        best = search.run()
        if search.measured:
            refused = dict(cached.refused) if cached else {}
            store.write(CachedPlan(plan=best, complete=search.complete, refused=refused))
    return best


def short_list(subject: Subject, threads: int | None) -> Plan:
    """All usual speedups, unmeasured."""
    return _Search(subject, 0, threads, None).short_list()


def plan_without_trials(
    subject: Subject, requested: str | Plan, *, threads: int | None, extra: Sequence[str] = ()
) -> Plan:
    """A plan for a network that can't be copied for trials: what is requested ("auto": all usual speedups and
    `extra`), without the speedups that `subject` has no use for. Raises UsageError and MachineError for a name that
    can't be used."""
    if requested == "auto":
        usual = short_list(subject, threads)
        names = [n for n in (*usual.speedups, *extra) if _needless(n, subject) is None]
        trials = (Trial(change=_join(names), kept=True, reason=UNMEASURED),) if names else ()
        dropped = {n: r for n, r in usual.dropped.items() if n not in names}
        return replace(usual, speedups=sort_speedups(names), trials=trials, origin=SHARDED, dropped=dropped)
    if isinstance(requested, str):
        return plan_of_names(requested, subject.device, threads)
    # The plan of a resumed run, perhaps of a network that wasn't sharded before.
    reasons = {n: r for n in requested.speedups if (r := _needless(n, subject)) is not None}
    left = tuple(n for n in requested.speedups if n not in reasons)
    return replace(requested, speedups=left, dropped={**requested.dropped, **reasons})


def _needless(name: str, subject: Subject) -> str | None:
    reason: str | None = load("speedups", name).needless(subject.step, subject.device)
    return reason


def drop_risky_speedup(plan: Plan, risk: str) -> tuple[Plan, str] | None:
    """The plan without the last of its speedups that has this risk ("memory", "numerics", "backend"), and that
    speedup's name. None: none has it."""
    risky = [n for n in plan.speedups if risk in load("speedups", n).risks]
    if not risky:
        return None
    left = tuple(n for n in plan.speedups if n != risky[-1])
    return replace(plan, speedups=left), risky[-1]


def difference(expected: Numbers, actual: Numbers) -> float:
    """The relative error (L2 over all tensors together) of the outputs, or a quarter of the gradients' if that is
    larger: a gradient is a product of many rounded factors (measured in bfloat16: outputs off by up to 0.035,
    gradients by up to 0.12). Infinite where values aren't finite or shapes differ."""
    outputs = _relative_error(expected.outputs, actual.outputs)
    return max(outputs, _relative_error(expected.gradients, actual.gradients) / 4)


def _relative_error(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in actual]:
        expected, actual = _join_micro_batches(expected), _join_micro_batches(actual)
        if [t.shape for t in expected] != [t.shape for t in actual]:
            return float("inf")
    squares = sum(float((a - b).double().square().sum()) for a, b in zip(expected, actual, strict=True))
    scale = sum(float(a.double().square().sum()) for a in expected)
    error = (squares / scale) ** 0.5 if scale else (squares and float("inf"))
    return error if error == error else float("inf")


def _join_micro_batches(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of the whole batch from those of its micro-batches: those of equal row shape are concatenated."""
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for output in outputs:
        by_shape.setdefault(tuple(output.shape[1:]), []).append(output if output.dim() else output.reshape(1))
    return [torch.cat(same) for same in by_shape.values()]


def _check_named(subject: Subject, named: Plan) -> Plan:
    """The user's own list, after one step that checks that it computes the same as plain PyTorch."""
    if not named.speedups:
        return named
    reference = _compute_numbers(subject, plain_plan(subject.device, named.threads))
    error = difference(reference, _compute_numbers(subject, named))
    allowed = error_tolerance(named.speedups, subject.device)
    if error > allowed:
        raise GateError(
            f"With --speedups {','.join(named.speedups)}, outputs or gradients differ from plain PyTorch's by "
            f"{error:.2g}, more than the {allowed:g} that rounding explains.",
            fix="Leave out one after the other to find which one causes it, or use --speedups auto.",
        )
    return replace(named, trials=(Trial(change=_join(named.speedups), kept=True, reason="you named it", error=error),))


def _compute_numbers(subject: Subject, plan: Plan) -> Numbers:
    try:
        with _time_limit(COMPILING_LIMIT_S):
            trainee = subject.trial(plan)
            with apply_settings(trainee.compute):
                return trainee.compute_numbers()
    except SuanliError:
        raise
    except Exception as error:  # a compiler or a kernel library may raise anything
        if is_out_of_memory(error) or not plan.speedups:
            raise
        raise MachineError(
            f"The speedups {','.join(plan.speedups)} fail here: {first_line(error)}.",
            fix="Leave out the one that is named there, or use --speedups auto.",
        ) from error
    finally:
        free_memory(subject.device)


def _adapt(cached: CachedPlan, subject: Subject, steps: int) -> Plan:
    """The stored plan, without speedups that take longer to start than they save in `steps`."""
    plan = replace(cached.plan, origin="cached", seconds=0.0)
    for name in plan.speedups:
        trial = next((t for t in reversed(plan.trials) if f"+{name}" in t.change.split()), None)
        if not load("speedups", name).slow_start or trial is None or not trial.ratio or not trial.step_s:
            continue
        if steps * trial.step_s * (trial.ratio - 1) <= trial.start_s:
            reason = f"starting takes {trial.start_s:.0f} s, more than it would save in {steps} steps"
            plan = replace(
                plan,
                speedups=tuple(n for n in plan.speedups if n != name),
                dropped={**plan.dropped, name: reason},
            )
    if subject.device.type == "cuda" and "resident" in plan.speedups and not subject.step.can_reside:
        plan = replace(plan, speedups=tuple(n for n in plan.speedups if n != "resident"))
    return plan


# --- the search -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Change:
    name: str  # "+bf16", "+fp16 -bf16", "threads=1"
    plan: Plan
    slow_start: bool = False
    delayed_effect: bool = False


@dataclass(kw_only=True)
class _Baseline:
    """What a change is compared with."""

    numbers: Numbers  # of plain PyTorch
    trainee: Trainee  # with the best plan so far


class _Search:
    """Goes on where a cached search stopped. `complete`: nothing is left to try; `measured`: something was timed."""

    def __init__(self, subject: Subject, steps: int, threads: int | None, cached: CachedPlan | None) -> None:
        self.subject, self.device, self.steps, self.fixed_threads = subject, subject.device, steps, threads
        self.usable, self.dropped = usable_speedups(self.device)
        refused = dict(cached.refused) if cached else {}
        for name, speedup in list(self.usable.items()):
            reason = speedup.needless(subject.step, self.device) or refused.get(name)
            if speedup.saves_memory:
                reason = reason or "only where memory is the limit: it costs time"
            if speedup.distributed_only:
                reason = reason or "only by name: planning runs in one process, so it can't measure the gain"
            if reason is not None:
                del self.usable[name]
                self.dropped[name] = reason
        start = plain_plan(self.device, threads)
        self.best = replace(start, speedups=cached.plan.speedups, threads=cached.plan.threads) if cached else start
        self.best_s = 0.0  # of a step; not measured yet
        self.trials = list(cached.plan.trials) if cached else []
        self.untried: dict[str, str] = {}  # changes that there was no time for, and why
        self.complete = self.measured = False
        self.started = time.perf_counter()

    def short_list(self) -> Plan:
        """All usual speedups, unmeasured."""
        names = self._usual()
        why = "used without measuring: the run is too short for that"
        trials = (Trial(change=_join(names), kept=True, reason=why),) if names else ()
        return self._plan(replace(self.best, speedups=names), trials, "short list")

    def run(self) -> Plan:
        if self.steps < MIN_STEPS:
            if self.trials:
                return self._plan(self.best, tuple(self.trials), "cached")
            return self.short_list()
        trainee = self.subject.trial(plain_plan(self.device, self.fixed_threads))
        with apply_settings(trainee.compute):
            reference = trainee.compute_numbers()
            self.best_s = timing.seconds(trainee.advance)
        if self.best.speedups or self.best.threads != self.fixed_threads:  # go on from the cached plan
            del trainee
            trainee = self.subject.trial(self.best)
            with apply_settings(trainee.compute):
                trainee.advance()
                self.best_s = timing.seconds(trainee.advance)
        self.complete = self.measured = True
        baseline = _Baseline(numbers=reference, trainee=trainee)
        del trainee  # so that it is freed once a better one replaces it
        self._try_all(baseline)
        del baseline
        free_memory(self.device)
        if not self.trials and (names := self._usual()):
            return self._check_short_list(reference, names)
        return self._plan(self.best, tuple(self.trials), "measured")

    def _check_short_list(self, reference: Numbers, names: tuple[str, ...]) -> Plan:
        """The usual speedups where there was no time to time them, if they compute the same."""
        self.measured = False
        plan = replace(self.best, speedups=names)
        try:
            error = difference(reference, _compute_numbers(self.subject, plan))
        except MachineError as failure:
            trial = Trial(change=_join(names), kept=False, reason=failure.message)
            return self._plan(self.best, (trial,), "short list")
        kept = error <= (allowed := error_tolerance(names, self.device))
        reason = "computes the same; the run is too short to time it" if kept else _error_reason(error, allowed)
        trial = Trial(change=_join(names), kept=kept, reason=reason, error=error)
        return self._plan(plan if kept else self.best, (trial,), "short list")

    def _try_all(self, baseline: _Baseline) -> None:
        queue = self._changes()
        tried = {change for t in self.trials for change in (t.change, _reverse(t))}
        while queue:
            change = queue.pop(0)
            if change.name in tried:
                continue
            tried.add(change.name)
            if (reason := self._too_expensive(change)) is not None:
                self.complete = self.complete and change.slow_start
                self.untried[change.name] = reason
                continue
            trial = self._try(change, baseline)
            self.trials.append(trial)
            tried.add(_reverse(trial))
            if trial.kept:
                queue = self._changes()  # what is left to try has changed

    def _changes(self) -> list[_Change]:
        """What can be tried from the best plan so far; compiling comes last."""
        self.untried = {}
        changes = []
        best = self.best
        usual = self._usual()
        if not best.speedups and len(usual) > 1:
            changes.append(self._change(_join(usual), usual))
        for name, speedup in self.usable.items():
            if name in best.speedups:
                continue
            rivals = [n for n in best.speedups if speedup.group and self.usable[n].group == speedup.group]
            names = [n for n in best.speedups if n not in rivals] + [name]
            changes.append(self._change(" ".join([f"+{name}", *(f"-{n}" for n in rivals)]), names))
        if self.device.type == "cpu" and self.fixed_threads is None:
            count = best.threads or torch.get_num_threads()
            while (count := count // 2) >= 1:
                fewer = replace(best, threads=count)
                changes.append(_Change(name=f"threads={count}", plan=fewer, delayed_effect=True))
        for name in best.speedups:
            changes.append(self._change(f"-{name}", [n for n in best.speedups if n != name]))
        return sorted(changes, key=lambda c: c.slow_start)

    def _change(self, name: str, speedups: Sequence[str]) -> _Change:
        new = set(speedups) ^ set(self.best.speedups)
        return _Change(
            name=name,
            plan=replace(self.best, speedups=sort_speedups(speedups)),
            slow_start=any(self.usable[n].slow_start for n in new if n in speedups),
            delayed_effect=any(self.usable[n].delayed_effect for n in new),
        )

    def _usual(self) -> tuple[str, ...]:
        """The usual speedups that are usable here, the first of each group."""
        by_group: dict[str, str] = {}
        for name, speedup in self.usable.items():
            if speedup.usual:
                by_group.setdefault(speedup.group or name, name)
        return sort_speedups(by_group.values())

    def _too_expensive(self, change: _Change) -> str | None:
        """Why there is no time to try this; None: there is."""
        left_s = PLANNING_SHARE * self.steps * self.best_s - (time.perf_counter() - self.started)
        rounds = ROUNDS[0] * 2 * (2 if change.delayed_effect else 1)
        needed_s = self.best_s * (rounds + 1)
        if change.slow_start:
            parts = sum(1 for m in self.subject.step.model.modules() if any(True for _ in m.parameters(recurse=False)))
            compiling_s = COMPILING_S[0] + COMPILING_S[1] * parts
            saving_s = COMPILE_SAVING * self.steps * self.best_s
            if saving_s <= compiling_s:
                return f"compiling takes about {compiling_s:.0f} s and would save {saving_s:.0f} s at most"
            needed_s += compiling_s
        if needed_s > left_s:
            return "not tried yet: no time was left in the 5 % for planning"
        return None

    def _try(self, change: _Change, baseline: _Baseline) -> Trial:
        """Check and time a change; if it is kept, it becomes the best plan."""
        try:
            usual = min(FIRST_STEP_LIMIT_S, FIRST_STEP_S + FIRST_STEP_TIMES * self.best_s)
            limit = COMPILING_LIMIT_S if change.slow_start else usual
            with _time_limit(limit):
                candidate = self.subject.trial(change.plan)
                started = time.perf_counter()
                with apply_settings(candidate.compute):
                    numbers = candidate.compute_numbers()
                first_s = time.perf_counter() - started
            error = difference(baseline.numbers, numbers)
            if error > (allowed := error_tolerance(change.plan.speedups, self.device)):
                return Trial(change=change.name, kept=False, reason=_error_reason(error, allowed), error=error)
            before, after = _time_alternately(baseline.trainee, candidate, change.delayed_effect)
        except MachineError as refusal:  # needless beside the others
            return Trial(change=change.name, kept=False, reason=refusal.message)
        except Exception as failure:  # noqa: BLE001  # a compiler or a kernel library may raise anything
            return Trial(change=change.name, kept=False, reason=f"failed: {first_line(failure)}")
        finally:
            free_memory(self.device)
        gain = timing.gain(before, after)
        after_s = timing.spread(after).median
        start_s = max(0.0, first_s - after_s) if change.slow_start else 0.0
        reason = f"{gain.ratio:.2f} times as fast (spread {gain.spread:.2f}, {gain.rounds} rounds)"
        kept = gain.proven
        if kept and start_s >= self.steps * after_s * (gain.ratio - 1):
            kept, reason = False, f"{reason}, but compiling takes {start_s:.0f} s, more than it saves"
        if kept:
            self.best, baseline.trainee, self.best_s = change.plan, candidate, after_s
        return Trial(
            change=change.name,
            kept=kept,
            reason=reason,
            ratio=gain.ratio,
            spread=gain.spread,
            rounds=gain.rounds,
            error=error,
            step_s=after_s,
            start_s=start_s,
        )

    def _plan(self, best: Plan, trials: tuple[Trial, ...], origin: str) -> Plan:
        """`best` with the record of this search."""
        dropped = dict(self.dropped)
        for trial in trials:  # a later trial of the same speedup replaces the reason of an earlier one
            words = trial.change.split()
            if not trial.kept and len(words) == 1 and words[0].startswith("+"):
                dropped[words[0][1:]] = trial.reason
        for change, reason in self.untried.items():
            first = change.split()[0]
            if first.startswith("+") and len(change.split()) <= 2:
                dropped[first[1:]] = reason
        return replace(
            best,
            dropped={n: r for n, r in dropped.items() if n not in best.speedups},
            trials=trials,
            origin=origin,
            seconds=time.perf_counter() - self.started,
        )


def _time_alternately(incumbent: Trainee, candidate: Trainee, delayed_effect: bool) -> tuple[list[float], list[float]]:
    """Seconds of a step of each, round by round. Stops early where the result is clear."""
    trainees = (incumbent, candidate)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS[1]):
        for side in (0, 1) if number % 2 else (1, 0):
            with apply_settings(trainees[side].compute):
                if delayed_effect or number == 0:
                    trainees[side].advance()
                seconds[side].append(timing.seconds(trainees[side].advance))
        ratios = [a / b for a, b in zip(*seconds, strict=True)]
        if number + 1 >= ROUNDS[0] - 1 and (min(ratios) > CLEAR or max(ratios) < HOPELESS):
            break
        if number + 1 >= ROUNDS[0] and not 0.9 < timing.spread(ratios).median < 1.1:
            break
    return seconds


def _error_reason(error: float, allowed: float) -> str:
    return f"outputs or gradients differ by {error:.2g}, more than the {allowed:g} that rounding explains"


def _reverse(trial: Trial) -> str:
    """The reverse of a change that was kept, which needs no trial any more; "" where there is none."""
    words = trial.change.split()
    if not trial.kept or len(words) != 1 or words[0][0] not in "+-":
        return ""
    return ("-" if words[0][0] == "+" else "+") + words[0][1:]


def _join(names: Sequence[str]) -> str:
    return " ".join(f"+{name}" for name in names)


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message, for use in a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def free_memory(device: Device) -> None:
    """Return unused memory to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _time_limit(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when it takes longer. Works in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it didn't end within {limit_s:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    own_s, every_s = signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)  # repeated: a compiler may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if own_s:  # the caller's own alarm continues
            signal.setitimer(signal.ITIMER_REAL, max(0.001, own_s - (time.monotonic() - started)), every_s)
