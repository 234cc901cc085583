"""Which way of computing is the fastest here: measured on real batches, kept only where it helped.

The search starts from plain PyTorch. A change (a speedup more or less, another number of threads) is first
held against plain PyTorch's numbers on the same batch with the same weights, then timed by turns against the
best plan so far, and kept only if its gain exceeds the spread of the turns. The first change is the short
list, all usual speedups together: it brings most of the gain for one comparison.

Measuring may take 5 % of the forecast training time. What found no time is measured by the next training
of the same kind: the plan is kept in the cache directory, under a key of all that decides it. A run that is
too short to measure anything uses the kept plan or the short list. Compiling is tried only where the run is
long enough to win its cost back.

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
UNMEASURED = "used without measuring: a network that is shared out has no copies to try them on"
SHARE = 0.05  # of the forecast training time that planning may take
CHECKED_STEPS = 60  # a shorter run can't even afford to check the numbers of the short list
ROUNDS = (3, 6)  # of a comparison, at least and at most
CLEAR, HOPELESS = 1.3, 0.7  # ratios so large or so small need one round less
OPTIMISM = 0.3  # of a step that compiling saves at most, before it is known
COMPILING_S = (10.0, 1.0)  # before it is known: at the start, and for each part of the network with weights
COMPILING_LIMIT_S = 600.0
FIRST_STEP_LIMIT_S = 120.0  # of any other change, and less where steps are short
FIRST_STEP_S, FIRST_STEP_TIMES = 10.0, 10.0


class Trainee(Protocol):
    """A training that may be spoilt."""

    @property
    def compute(self) -> Step: ...

    def advance(self) -> None:
        """One whole step, its input included, waited for."""

    def compute_numbers(self) -> Numbers:
        """One step on the first batch, and what it computed."""


class Subject(Protocol):
    """What is to be trained: gives copies to try plans on."""

    @property
    def device(self) -> Device: ...

    @property
    def key(self) -> str: ...

    @property
    def step(self) -> Step: ...

    def trial(self, plan: Plan) -> Trainee: ...


def plan(subject: Subject, requested: str, *, steps: int, threads: int | None = None, cache: Path | None) -> Plan:
    """The plan for "auto", "none" or a list of names; `steps` are still to be trained, counted
    at full size.

    Raises UsageError for an unknown name, MachineError for a named speedup that is unusable, and GateError
    for one whose numbers are wrong. `cache` None: nothing is kept.
    """
    check_threads(threads)
    if requested != "auto":
        return _checked(subject, plan_of_names(requested, subject.device, threads))
    store = PlanCache(cache, subject.key, threads)
    known = store.read()
    if known is not None and known.complete:
        return _known(known, subject, steps)
    with store.lock() as mine:
        known = store.read()  # another process may have gone on with it
        if not mine:
            say("another process is planning on this machine, so nothing is measured now")
            return _known(known, subject, steps) if known else _Search(subject, steps, threads, None).short_list()
        if known is not None and known.complete:
            return _known(known, subject, steps)
        search = _Search(subject, steps, threads, known)
        found = search.run()
        if search.measured:
            store.write(CachedPlan(plan=found, complete=search.complete, refused=dict(known.refused) if known else {}))
    return found


def short_list(subject: Subject, threads: int | None) -> Plan:
    """All usual speedups, unmeasured."""
    return _Search(subject, 0, threads, None).short_list()


def plan_without_trials(
    subject: Subject, requested: str | Plan, *, threads: int | None, extra: Sequence[str] = ()
) -> Plan:
    """A plan for a network of which no copies can be tried: what is requested ("auto": all usual speedups, and
    `extra`), as far as `subject` has a use for it. Raises UsageError and MachineError for a name that can't be used."""
    if requested == "auto":
        usual = short_list(subject, threads)
        names = [n for n in (*usual.speedups, *extra) if _useful(n, subject) is None]
        trials = (Trial(change=_sum(names), kept=True, reason=UNMEASURED),) if names else ()
        found = replace(usual, speedups=sort_speedups(names), trials=trials, origin=SHARDED)
        return replace(found, dropped={n: r for n, r in found.dropped.items() if n not in names})
    if isinstance(requested, str):
        return plan_of_names(requested, subject.device, threads)
    # The plan of a run that goes on, perhaps with a network that was whole before.
    reasons = {n: r for n in requested.speedups if (r := _useful(n, subject)) is not None}
    left = tuple(n for n in requested.speedups if n not in reasons)
    return replace(requested, speedups=left, dropped={**requested.dropped, **reasons})


def _useful(name: str, subject: Subject) -> str | None:
    reason: str | None = load("speedups", name).needless(subject.step, subject.device)
    return reason


def drop_risky_speedup(plan: Plan, risk: str) -> tuple[Plan, str] | None:
    """The plan without the last speedup that brings this risk ("memory", "numerics", "backend"), and that
    speedup's name. None: none does."""
    risky = [n for n in plan.speedups if risk in load("speedups", n).risks]
    if not risky:
        return None
    left = tuple(n for n in plan.speedups if n != risky[-1])
    return replace(plan, speedups=left), risky[-1]


def difference(expected: Numbers, got: Numbers) -> float:
    """The relative error (L2 over all tensors together) of the outputs, or a quarter of the gradients' if that is
    larger: a gradient is a product of many factors that were all rounded (seen in bfloat16: outputs off by up
    to 0.035, gradients by up to 0.12). Infinite where they aren't finite or have other shapes."""
    return max(_relative(expected.outputs, got.outputs), _relative(expected.gradients, got.gradients) / 4)


def _relative(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in got]:
        expected, got = _whole(expected), _whole(got)
        if [t.shape for t in expected] != [t.shape for t in got]:
            return float("inf")
    squares = sum(float((a - b).double().square().sum()) for a, b in zip(expected, got, strict=True))
    scale = sum(float(a.double().square().sum()) for a in expected)
    error = (squares / scale) ** 0.5 if scale else (squares and float("inf"))
    return error if error == error else float("inf")


def _whole(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of the parts of a batch, those of one kind behind each other."""
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for part in parts:
        found.setdefault(tuple(part.shape[1:]), []).append(part if part.dim() else part.reshape(1))
    return [torch.cat(kind) for kind in found.values()]


def _checked(subject: Subject, named: Plan) -> Plan:
    """The user's own list, after one step that shows that it computes the same."""
    if not named.speedups:
        return named
    reference = _numbers(subject, plain_plan(subject.device, named.threads))
    error = difference(reference, _numbers(subject, named))
    allowed = error_tolerance(named.speedups, subject.device)
    if error > allowed:
        raise GateError(
            f"With --speedups {','.join(named.speedups)}, outputs or gradients differ from plain PyTorch's by "
            f"{error:.2g}, more than the {allowed:g} that rounding explains.",
            fix="Leave out one after the other to find which one, or use --speedups auto.",
        )
    return replace(named, trials=(Trial(change=_sum(named.speedups), kept=True, reason="you named it", error=error),))


def _numbers(subject: Subject, plan: Plan) -> Numbers:
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


def _known(known: CachedPlan, subject: Subject, steps: int) -> Plan:
    """The kept plan, without what takes longer to start than a run so short would win."""
    kept = replace(known.plan, origin="cached", seconds=0.0)
    for name in kept.speedups:
        trial = next((t for t in reversed(kept.trials) if f"+{name}" in t.change.split()), None)
        if not load("speedups", name).slow_start or trial is None or not trial.ratio or not trial.step_s:
            continue
        if steps * trial.step_s * (trial.ratio - 1) <= trial.start_s:
            reason = f"starting takes {trial.start_s:.0f} s, more than it would save in {steps} steps"
            kept = replace(
                kept,
                speedups=tuple(n for n in kept.speedups if n != name),
                dropped={**kept.dropped, name: reason},
            )
    if subject.device.type == "cuda" and "resident" in kept.speedups and not subject.step.can_reside:
        kept = replace(kept, speedups=tuple(n for n in kept.speedups if n != "resident"))
    return kept


# --- the search -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Change:
    name: str  # "+bf16", "+fp16 -bf16", "threads=1"
    plan: Plan
    slow_start: bool = False
    delayed_effect: bool = False


class _Search:
    def __init__(self, subject: Subject, steps: int, threads: int | None, known: CachedPlan | None) -> None:
        self.subject, self.device, self.steps, self.fixed_threads = subject, subject.device, steps, threads
        self.usable, self.dropped = usable_speedups(self.device)
        refused = dict(known.refused) if known else {}
        for name, speedup in list(self.usable.items()):
            reason = speedup.needless(subject.step, self.device) or refused.get(name)
            if speedup.saves_memory:
                reason = reason or "only where memory is what limits: it costs time"
            if speedup.distributed_only:
                reason = reason or "only by name: planning computes alone, so it can't tell what this brings"
            if reason is not None:
                del self.usable[name]
                self.dropped[name] = reason
        start = plain_plan(self.device, threads)
        self.best = replace(start, speedups=known.plan.speedups, threads=known.plan.threads) if known else start
        self.trials = list(known.plan.trials) if known else []
        self.untried: dict[str, str] = {}  # changes that had no time, and why
        self.complete = self.measured = False
        self.started = time.perf_counter()

    def short_list(self) -> Plan:
        """All usual speedups, unmeasured."""
        names = self._usual()
        why = "used without measuring: the run is too short for that"
        trials = (Trial(change=_sum(names), kept=True, reason=why),) if names else ()
        return self._plan(replace(self.best, speedups=names), trials, "short list")

    def run(self) -> Plan:
        if self.steps < CHECKED_STEPS:
            if self.trials:
                return self._plan(self.best, tuple(self.trials), "cached")
            return self.short_list()
        trainee = self.subject.trial(plain_plan(self.device, self.fixed_threads))
        with apply_settings(trainee.compute):
            self.reference = trainee.compute_numbers()
            self.best_s = timing.seconds(trainee.advance)
        if self.best.speedups or self.best.threads != self.fixed_threads:  # go on where a run before has stopped
            del trainee
            trainee = self.subject.trial(self.best)
            with apply_settings(trainee.compute):
                trainee.advance()
                self.best_s = timing.seconds(trainee.advance)
        self.trainee: Trainee | None = trainee
        del trainee
        self.complete = self.measured = True
        self._measure_all()
        self.trainee = None
        free_memory(self.device)
        if not self.trials and (names := self._usual()):
            return self._checked_short_list(names)
        return self._plan(self.best, tuple(self.trials), "measured")

    def _checked_short_list(self, names: tuple[str, ...]) -> Plan:
        """The usual speedups where there was no time for turns, if they compute the same."""
        self.measured = False
        plan = replace(self.best, speedups=names)
        try:
            error = difference(self.reference, _numbers(self.subject, plan))
        except MachineError as failed:
            trial = Trial(change=_sum(names), kept=False, reason=failed.message)
            return self._plan(self.best, (trial,), "short list")
        kept = error <= (allowed := error_tolerance(names, self.device))
        reason = "computes the same; the run is too short to time it" if kept else _too_far(error, allowed)
        trial = Trial(change=_sum(names), kept=kept, reason=reason, error=error)
        return self._plan(plan if kept else self.best, (trial,), "short list")

    def _measure_all(self) -> None:
        queue = self._changes()
        tried = {change for t in self.trials for change in (t.change, _undoing(t))}
        while queue:
            change = queue.pop(0)
            if change.name in tried:
                continue
            tried.add(change.name)
            if (reason := self._too_dear(change)) is not None:
                self.complete = self.complete and change.slow_start
                self.untried[change.name] = reason
                continue
            trial = self._try(change)
            self.trials.append(trial)
            tried.add(_undoing(trial))
            if trial.kept:
                queue = self._changes()  # what is left to try has changed

    def _changes(self) -> list[_Change]:
        self.untried = {}
        found = []
        best = self.best
        usual = self._usual()
        if not best.speedups and len(usual) > 1:
            found.append(self._change(_sum(usual), usual))
        for name, speedup in self.usable.items():
            if name in best.speedups:
                continue
            rivals = [n for n in best.speedups if speedup.group and self.usable[n].group == speedup.group]
            names = [n for n in best.speedups if n not in rivals] + [name]
            found.append(self._change(" ".join([f"+{name}", *(f"-{n}" for n in rivals)]), names))
        if self.device.type == "cpu" and self.fixed_threads is None:
            count = best.threads or torch.get_num_threads()
            while (count := count // 2) >= 1:
                fewer = replace(best, threads=count)
                found.append(_Change(name=f"threads={count}", plan=fewer, delayed_effect=True))
        for name in best.speedups:
            found.append(self._change(f"-{name}", [n for n in best.speedups if n != name]))
        return sorted(found, key=lambda c: c.slow_start)  # what compiles comes last

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
        found: dict[str, str] = {}
        for name, speedup in self.usable.items():
            if speedup.usual:
                found.setdefault(speedup.group or name, name)
        return sort_speedups(found.values())

    def _too_dear(self, change: _Change) -> str | None:
        left = SHARE * self.steps * self.best_s - (time.perf_counter() - self.started)
        rounds = ROUNDS[0] * 2 * (2 if change.delayed_effect else 1)
        needs = self.best_s * (rounds + 1)
        if change.slow_start:
            parts = sum(1 for m in self.subject.step.model.modules() if any(True for _ in m.parameters(recurse=False)))
            compiling = COMPILING_S[0] + COMPILING_S[1] * parts
            saves = OPTIMISM * self.steps * self.best_s
            if saves <= compiling:
                return f"compiling takes about {compiling:.0f} s and would save {saves:.0f} s at most"
            needs += compiling
        if needs > left:
            return "not tried yet: no time was left in the 5 % for planning"
        return None

    def _try(self, change: _Change) -> Trial:
        try:
            usual = min(FIRST_STEP_LIMIT_S, FIRST_STEP_S + FIRST_STEP_TIMES * self.best_s)
            limit = COMPILING_LIMIT_S if change.slow_start else usual
            with _time_limit(limit):
                candidate = self.subject.trial(change.plan)
                started = time.perf_counter()
                with apply_settings(candidate.compute):
                    numbers = candidate.compute_numbers()
                first_s = time.perf_counter() - started
            error = difference(self.reference, numbers)
            if error > (allowed := error_tolerance(change.plan.speedups, self.device)):
                return Trial(change=change.name, kept=False, reason=_too_far(error, allowed), error=error)
            before, after = self._by_turns(candidate, change.delayed_effect)
        except MachineError as refused:  # needless beside the others
            return Trial(change=change.name, kept=False, reason=refused.message)
        except Exception as failed:  # noqa: BLE001  # a compiler or a kernel library may raise anything
            return Trial(change=change.name, kept=False, reason=f"failed: {first_line(failed)}")
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
            self.best, self.trainee, self.best_s = change.plan, candidate, after_s
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

    def _by_turns(self, candidate: Trainee, delayed_effect: bool) -> tuple[list[float], list[float]]:
        """Seconds of steps of the best plan and of the candidate, round by round."""
        assert self.trainee is not None
        sides = (self.trainee, candidate)
        found: tuple[list[float], list[float]] = ([], [])
        for number in range(ROUNDS[1]):
            for which in (0, 1) if number % 2 else (1, 0):
                with apply_settings(sides[which].compute):
                    if delayed_effect or number == 0:
                        sides[which].advance()
                    found[which].append(timing.seconds(sides[which].advance))
            ratios = [a / b for a, b in zip(*found, strict=True)]
            if number + 1 >= ROUNDS[0] - 1 and (min(ratios) > CLEAR or max(ratios) < HOPELESS):
                break
            if number + 1 >= ROUNDS[0] and not 0.9 < timing.spread(ratios).median < 1.1:
                break
        return found

    def _plan(self, best: Plan, trials: tuple[Trial, ...], origin: str) -> Plan:
        dropped = dict(self.dropped)
        for trial in trials:  # the latest word on each
            words = trial.change.split()
            if not trial.kept and len(words) == 1 and words[0].startswith("+"):
                dropped[words[0][1:]] = trial.reason
        for change, reason in self.untried.items():
            first = change.split()[0]
            if first.startswith("+") and len(change.split()) <= 2:
                dropped[first[1:]] = reason
        took = time.perf_counter() - self.started
        return replace(
            best,
            dropped={n: r for n, r in dropped.items() if n not in best.speedups},
            trials=trials,
            origin=origin,
            seconds=took,
        )


def _too_far(error: float, allowed: float) -> str:
    return f"outputs or gradients differ by {error:.2g}, more than the {allowed:g} that rounding explains"


def _undoing(trial: Trial) -> str:
    """The change back from one that was kept, which needs no trial any more; "" where there is none."""
    words = trial.change.split()
    if not trial.kept or len(words) != 1 or words[0][0] not in "+-":
        return ""
    return ("-" if words[0][0] == "+" else "+") + words[0][1:]


def _sum(names: Sequence[str]) -> str:
    return " ".join(f"+{name}" for name in names)


def first_line(error: BaseException) -> str:
    """What an error says first, for a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def free_memory(device: Device) -> None:
    """Gives memory back that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _time_limit(limit_s: float) -> Iterator[None]:
    """Raises TimeoutError inside the block when it takes longer. Only the main thread can be stopped so."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it didn't end within {limit_s:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    own_s, every_s = signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)  # again: a compiler may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if own_s:  # the caller's own alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(0.001, own_s - (time.monotonic() - started)), every_s)
