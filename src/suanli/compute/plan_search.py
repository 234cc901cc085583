"""The search for the fastest plan: a race of the combinations whose parts act on each other, then one further change
after the other, each checked and timed against the best plan so far."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.compute.entrants import WORTH_TRYING, WORTH_USING, Combination, combinations, cost, expected_gains, promise
from suanli.compute.plan import SHORT_LIST, fewer_threads, plain_plan, sort_speedups, usable_speedups
from suanli.compute.plan_cache import CachedPlan
from suanli.compute.plan_check import judge
from suanli.compute.plan_race import add_errors, check_numbers, describe_gain, join_names, race_on_copy
from suanli.compute.plan_trial import (
    COMPILING_LIMIT_S,
    FIRST_STEP_S,
    FIRST_STEP_TIMES,
    Subject,
    Trainee,
    first_line,
    free_memory,
    limit_time,
    run_check_step,
)
from suanli.compute.step_runner import Numbers, apply_settings
from suanli.core.errors import MachineError
from suanli.core.types import Plan, Trial
from suanli.machine import timing

PLANNING_SHARE = 0.05  # of the forecast training time that planning may take
MIN_STEPS = 60  # a shorter run can't even afford to check the numbers of the short list
ROUNDS = (3, 6)  # of a comparison, at least and at most
CLEAR, HOPELESS = 1.3, 0.7  # with ratios above or below these, one round less is enough
COMPILE_SAVING = 0.3  # of a step's time that compiling is assumed to save at most
COMPILING_S = (10.0, 1.0)  # assumed before it is measured: fixed, and for each module with weights of its own
FIRST_STEP_LIMIT_S = 120.0  # of any other change, and less where steps are short


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


class Search:
    """Continues where a cached search stopped. `complete`: nothing is left to try; `measured`: something was timed."""

    def __init__(
        self, subject: Subject, steps: int, threads: int | None, cache: Path | None, cached: CachedPlan | None
    ) -> None:
        self.subject, self.device, self.steps, self.fixed_threads = subject, subject.device, steps, threads
        self.usable, self.dropped = usable_speedups(self.device)
        refused = dict(cached.refused) if cached else {}
        for name, speedup in list(self.usable.items()):
            reason = speedup.needless(subject.step, self.device) or refused.get(name)
            if speedup.saves_memory:
                reason = reason or "only where memory is the limit: it costs time"
            if speedup.beside_others:
                reason = reason or "only beside other programs: a training tries it when they use the cores"
            if speedup.distributed_only:
                reason = reason or "only by name: planning runs in one process, so it can't measure the gain"
            if reason is not None:
                del self.usable[name]
                self.dropped[name] = reason
        self.gains = expected_gains(self.usable, subject.step.model, self.device, cache)
        for name, gain in self.gains.items():
            if gain < WORTH_TRYING:
                self.dropped[name] = f"measured here, {self.usable[name].rate} is {gain:.2f} times as fast as float32"
                del self.usable[name]
        start = plain_plan(self.device, threads)
        self.best = replace(start, speedups=cached.plan.speedups, threads=cached.plan.threads) if cached else start
        self.best_s = 0.0  # of a step; not measured yet
        self.trials = list(cached.plan.trials) if cached else []
        self.untried: dict[str, str] = {}  # changes that there was no time for, and why
        self.raced = cached is not None and cached.raced
        self.complete = self.measured = False
        self.started = time.perf_counter()

    def short_list(self) -> Plan:
        """All usual speedups, unmeasured."""
        names = self._usual()
        why = "used without measuring: the run is too short for that"
        trials = (Trial(change=join_names(names), kept=True, reason=why),) if names else ()
        return self._plan(replace(self.best, speedups=names), trials, SHORT_LIST)

    def without_measuring(self) -> Plan:
        """The stored plan, or else the short list."""
        return self._plan(self.best, tuple(self.trials), "cached") if self.trials else self.short_list()

    def field(self, known: Iterable[Combination] = ()) -> list[Combination]:
        """What enters the race; the last one is plain PyTorch."""
        base = [n for n, s in self.usable.items() if s.usual and s.switchable and not s.raced]
        return combinations(sort_speedups(base), self.usable, self.gains, known)

    def has_time_to_race(self) -> bool:
        """Whether all combinations can race on a copy in the share of the training that planning may take."""
        field = self.field()
        best = max(promise(names, self.usable, self.gains) for names in field)
        return cost(field, self.usable, self.gains) <= PLANNING_SHARE * self.steps / best

    def run(self, known: Iterable[Combination] = ()) -> Plan:
        """`known`: plans that were the best for similar trainings, the best first."""
        if self.steps < MIN_STEPS:
            return self.without_measuring()
        trainee = self.subject.trial(plain_plan(self.device, self.fixed_threads))
        with apply_settings(trainee.compute):
            reference = trainee.compute_numbers()
            self.best_s = timing.seconds(trainee.advance)
        self.complete = self.measured = True
        raced = not self.raced and self._race(trainee, [*known, self.best.speedups])
        if raced or self.best.speedups or self.best.threads != self.fixed_threads:
            del trainee  # its memory may be needed
            trainee = self.subject.trial(self.best)
            with apply_settings(trainee.compute):
                trainee.advance()
                self.best_s = timing.seconds(trainee.advance)
        baseline = _Baseline(numbers=reference, trainee=trainee)
        del trainee  # so that it is freed once a better one replaces it
        self._try_all(baseline)
        del baseline
        free_memory(self.device)
        if not self.trials and (names := self._usual()):
            return self._check_short_list(reference, names)
        return self._plan(self.best, tuple(self.trials), "measured")

    def _race(self, trainee: Trainee, known: Iterable[Combination]) -> bool:
        """Time the combinations of those speedups whose gains depend on each other, as many as there is time for, on
        one copy that computes by one after the other. The best plan is the winner, if it is faster than plain
        PyTorch on fresh rounds. Gives whether there was time for it."""
        field = self.field(known)
        left = self._left_s() / self.best_s / max(promise(names, self.usable, self.gains) for names in field)
        everything = len(field)
        while len(field) > 2 and cost(field, self.usable, self.gains) > left:
            del field[-2]  # the least likely; the last one is plain PyTorch
        if len(field) < 3:
            return False
        errors, refused = check_numbers(self.subject, field, self.fixed_threads)
        start = replace(self.best, threads=self.fixed_threads)
        winner, raced = race_on_copy(trainee, list(errors), start, self.best_s)
        self.trials = [*refused.values(), *add_errors(raced, errors)]
        self.best, self.raced = replace(start, speedups=winner), len(field) == everything
        self.complete = self.raced
        return True

    def _check_short_list(self, reference: Numbers, names: tuple[str, ...]) -> Plan:
        """The usual speedups where there was no time to time them, if they compute the same."""
        self.measured = False
        plan = replace(self.best, speedups=names)
        try:
            error, refused = judge(self.subject, plan, reference, run_check_step(self.subject, plan))
        except MachineError as failure:
            trial = Trial(change=join_names(names), kept=False, reason=failure.message)
            return self._plan(self.best, (trial,), SHORT_LIST)
        reason = refused or "computes the same; the run is too short to time it"
        trial = Trial(change=join_names(names), kept=refused is None, reason=reason, error=error)
        return self._plan(plan if refused is None else self.best, (trial,), SHORT_LIST)

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
        if not self.raced and not best.speedups and len(usual) > 1:
            changes.append(self._change(join_names(usual), usual))
        for name, speedup in self.usable.items():
            if name in best.speedups or (self.raced and speedup.raced):
                continue
            rivals = [n for n in best.speedups if speedup.group and self.usable[n].group == speedup.group]
            names = [n for n in best.speedups if n not in rivals] + [name]
            changes.append(self._change(" ".join([f"+{name}", *(f"-{n}" for n in rivals)]), names))
        if self.device.type == "cpu" and self.fixed_threads is None:
            for count in fewer_threads(best.threads):
                fewer = replace(best, threads=count)
                changes.append(_Change(name=f"threads={count}", plan=fewer, delayed_effect=True))
        for name in best.speedups:
            if self.raced and name in self.usable and self.usable[name].raced:
                continue
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
            if speedup.usual and self.gains.get(name, math.inf) >= WORTH_USING:
                by_group.setdefault(speedup.group or name, name)
        return sort_speedups(by_group.values())

    def _left_s(self) -> float:
        return PLANNING_SHARE * self.steps * self.best_s - (time.perf_counter() - self.started)

    def _too_expensive(self, change: _Change) -> str | None:
        """Why there is no time to try this; None: there is."""
        left_s = self._left_s()
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
            with limit_time(limit):
                candidate = self.subject.trial(change.plan)
                started = time.perf_counter()
                with apply_settings(candidate.compute):
                    numbers = candidate.compute_numbers()
                first_s = time.perf_counter() - started
            error, refused = judge(self.subject, change.plan, baseline.numbers, numbers)
            if refused is not None:
                return Trial(change=change.name, kept=False, reason=refused, error=error)
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
        reason = describe_gain(gain)
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
        for name, speedup in self.usable.items():
            with_it = [t for t in trials if f"+{name}" in t.change.split() and t.ratio is not None]
            if self.raced and speedup.raced and with_it:
                best_with = max(with_it, key=lambda t: t.ratio or 0.0)
                dropped[name] = f"with it at most {best_with.ratio:.2f} times as fast as plain PyTorch"
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


def _reverse(trial: Trial) -> str:
    """The reverse of a change that was kept, which needs no trial any more; "" where there is none."""
    words = trial.change.split()
    if not trial.kept or len(words) != 1 or words[0][0] not in "+-":
        return ""
    return ("-" if words[0][0] == "+" else "+") + words[0][1:]
