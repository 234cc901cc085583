"""Finds the fastest way to compute a training here: measured on real batches, kept only where it helps.

Combinations of the speedups whose gains depend on each other race against plain PyTorch (`race.py`). Then each further
change (a speedup more or less, another number of threads) is timed alternately with the best plan so far, and kept only
if its gain exceeds the spread (`plan_search.py`). Outputs and gradients are compared with plain PyTorch's before.

Measuring may take 5 % of the forecast training time. What there was no time for is measured by the next training of
the same kind: the plan is stored in the cache directory, under a key of all that determines it. Trials run on copies of
network and optimizer, and the training itself starts untouched. A training on a CPU that is too short for that gets the
stored plan, or else the short list, with which it begins to race on its own steps (`adaptation.py`). Compiling is tried
only where the run is long enough to win its cost back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.compute.entrants import Combination
from suanli.compute.plan import check_threads, plain_plan, plan_of_names, sort_speedups
from suanli.compute.plan_cache import CachedPlan, PlanCache
from suanli.compute.plan_check import judge
from suanli.compute.plan_race import PLAIN, check_numbers, join_names
from suanli.compute.plan_search import Search
from suanli.compute.plan_trial import Subject, run_check_step
from suanli.core.console import say
from suanli.core.errors import GateError
from suanli.core.registry import load
from suanli.core.types import Plan, Trial

SHARDED = "sharded"  # origin of a plan that couldn't be measured, since no copy of the network would fit
UNMEASURED = "used without measuring: there is no room for copies of a sharded network to try them on"


def plan(
    subject: Subject,
    requested: str,
    *,
    steps: int,
    threads: int | None = None,
    cache: Path | None,
    races_in_training: bool = False,
) -> Plan:
    """The plan for "auto", "none" or a list of names, for a training that has `steps` left, counted at full size. With
    `races_in_training`, a training that has no time for trials on copies gets the short list, and is to race plans on
    its own steps.

    Raises UsageError for an unknown name, MachineError for a named speedup that can't be used, and GateError for one
    whose numbers are wrong. `cache` None: nothing is stored.
    """
    check_threads(threads)
    if requested != "auto":
        return _check_named(subject, plan_of_names(requested, subject.device, threads))
    store = PlanCache(cache, subject.key, threads, subject.family)
    cached = store.read()
    if cached is not None and cached.complete:
        return _adapt(cached, subject, steps)
    with store.lock() as is_only_planner:
        cached = store.read()  # another process may have completed it
        if not is_only_planner:
            say("another process is planning on this machine, so nothing is measured now")
            return _adapt(cached, subject, steps) if cached else short_list(subject, threads, cache)
        if cached is not None and cached.complete:
            return _adapt(cached, subject, steps)
        search = Search(subject, steps, threads, cache, cached)
        if races_in_training and not search.raced and not search.has_time_to_race():
            return search.without_measuring()
        best = search.run(store.similar())
        if search.measured:
            refused = dict(cached.refused) if cached else {}
            store.write(CachedPlan(plan=best, complete=search.complete, refused=refused, raced=search.raced))
    return best


def short_list(subject: Subject, threads: int | None, cache: Path | None) -> Plan:
    """All usual speedups, unmeasured, but for precisions that aren't faster on this machine."""
    return Search(subject, 0, threads, cache, None).short_list()


@dataclass(frozen=True, kw_only=True)
class Field:
    """The combinations that a training races on its own steps, and what is known of them."""

    combinations: tuple[Combination, ...]  # that compute the same as plain PyTorch, which is the last one
    errors: Mapping[Combination, float]
    refused: tuple[Trial, ...]  # those that compute something else, or fail


def race_field(subject: Subject, *, most: int, threads: int | None, cache: Path | None) -> Field:
    """At most so many combinations, the likely winners first, each checked on a part of the first batch."""
    store = PlanCache(cache, subject.key, threads, subject.family)
    field = Search(subject, 0, threads, cache, store.read()).field(store.similar())
    errors, refused = check_numbers(subject, [*field[:-1][: most - 1], PLAIN], threads)
    names = tuple(n for n in errors if n != PLAIN)
    return Field(combinations=(*names, PLAIN), errors=errors, refused=tuple(refused.values()))


def store_raced(store: PlanCache, plan: Plan) -> None:
    """Keep the plan that won on a training's own steps, for trainings to come that are as short."""
    cached = store.read()
    if cached is None or not cached.raced:
        store.write(CachedPlan(plan=plan, complete=False, refused=dict(cached.refused) if cached else {}))


def plan_without_trials(
    subject: Subject, requested: str | Plan, *, threads: int | None, cache: Path | None, extra: Sequence[str] = ()
) -> Plan:
    """A plan for a network that can't be copied for trials: what is requested ("auto": all usual speedups and
    `extra`), without the speedups that `subject` has no use for. Raises UsageError and MachineError for a name that
    can't be used."""
    if requested == "auto":
        usual = short_list(subject, threads, cache)
        names = [n for n in (*usual.speedups, *extra) if _needless(n, subject) is None]
        trials = (Trial(change=join_names(names), kept=True, reason=UNMEASURED),) if names else ()
        dropped = {n: r for n, r in usual.dropped.items() if n not in names}
        return replace(usual, speedups=sort_speedups(names), trials=trials, origin=SHARDED, dropped=dropped)
    if isinstance(requested, str):
        return plan_of_names(requested, subject.device, threads)
    # The plan of a resumed run, perhaps of a network that wasn't sharded before.
    reasons = {n: r for n in requested.speedups if (r := _needless(n, subject)) is not None}
    left = tuple(n for n in requested.speedups if n not in reasons)
    return replace(requested, speedups=left, dropped={**requested.dropped, **reasons})


def drop_risky_speedup(plan: Plan, risk: str) -> tuple[Plan, str] | None:
    """The plan without the last of its speedups that has this risk ("memory", "numerics", "backend"), and that
    speedup's name. None: none has it."""
    risky = [n for n in plan.speedups if risk in load("speedups", n).risks]
    if not risky:
        return None
    left = tuple(n for n in plan.speedups if n != risky[-1])
    return replace(plan, speedups=left), risky[-1]


def _needless(name: str, subject: Subject) -> str | None:
    reason: str | None = load("speedups", name).needless(subject.step, subject.device)
    return reason


def _check_named(subject: Subject, named: Plan) -> Plan:
    """The user's own list, after one step that checks that it computes the same as plain PyTorch."""
    if not named.speedups:
        return named
    reference = run_check_step(subject, plain_plan(subject.device, named.threads))
    error, refused = judge(subject, named, reference, run_check_step(subject, named))
    if refused is not None:
        raise GateError(
            f"With --speedups {','.join(named.speedups)}, {refused}.",
            fix="Leave out one after the other to find which one causes it, or use --speedups auto.",
        )
    return replace(
        named, trials=(Trial(change=join_names(named.speedups), kept=True, reason="you named it", error=error),)
    )


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
