"""A plan that changes between the steps of a training: see `compute/adaptation.py` for when, and to what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from suanli.compute.adaptation import Adaptation, Change, Way
from suanli.compute.plan import RACED, SHORT_LIST, sort_speedups, usable_speedups
from suanli.compute.plan_cache import PlanCache
from suanli.compute.plan_race import add_errors, trials_of
from suanli.compute.planner import Field, race_field, store_raced
from suanli.compute.step_runner import AppliedSettings
from suanli.core.console import plural
from suanli.core.errors import MachineError
from suanli.core.registry import load
from suanli.core.types import Device, Plan
from suanli.machine.device import cores
from suanli.machine.run_delay import OtherPrograms, RunDelay
from suanli.training.loop import Loop
from suanli.training.setup import Setup

FEWEST = 3  # combinations, plain PyTorch among them, that are worth a race
STEPS_EACH = 6  # of the training, before its steps become larger, for each combination in the race
MANY_STEPS = 200  # from here on a turn may have several short steps, which is less noisy
TURN_S = 0.02


def can_change(plan: Plan, device: Device) -> bool:
    """Whether a training by this plan can go over to another one between two steps."""
    return device.type == "cpu" and all(load("speedups", name).switchable for name in plan.speedups)


class LivePlan:
    def __init__(self, setup: Setup, plan: Plan, *, cache: Path, threads: int | None, race_steps: int) -> None:
        """Where the plan is the short list, nothing of this kind was measured before, so plans race in the first
        `race_steps` steps. `threads`: the number that the user wants; None: it may change."""
        self.plan, self._device, self._threads = plan, setup.device, threads
        self._store = PlanCache(cache, setup.key, threads, setup.family)
        self._field: Field | None = None
        ways: list[Way] = []
        if plan.origin == SHORT_LIST and race_steps >= FEWEST * STEPS_EACH:
            each = 2 * STEPS_EACH if race_steps >= MANY_STEPS else STEPS_EACH
            self._field = race_field(setup, most=race_steps // each, threads=threads, cache=cache)
            ways = [Way(speedups=names, threads=threads) for names in self._field.combinations]
        self._helpful = [  # beside other programs
            name
            for name, speedup in usable_speedups(setup.device)[0].items()
            if speedup.beside_others and speedup.switchable and speedup.needless(setup.step, setup.device) is None
        ]
        self._adaptation = Adaptation(
            Way(speedups=plan.speedups, threads=plan.threads),
            entrants=ways,
            plain=Way(speedups=(), threads=threads),
            beside_others=self._beside_others,
            waiting=RunDelay(),
            others=OtherPrograms(),
            turn_s=TURN_S if race_steps >= MANY_STEPS else 0.0,
            turns=race_steps // 2,
        )
        self.raced_steps = 0

    def start(self, loop: Loop, settings: AppliedSettings) -> None:
        self._adaptation.start(1.0 if loop.recipe.mixed_sizes else loop.costs.cost(loop.progress.step))
        self._go_over(loop, settings)

    @property
    def is_racing(self) -> bool:
        """Whether the plan itself isn't decided yet."""
        return self._adaptation.is_racing

    def after_step(self, loop: Loop, seconds: float, settings: AppliedSettings) -> str | None:
        """The last step took so long. Gets the loop ready for the next one; gives what changed for good, in words."""
        self.raced_steps += self._adaptation.is_racing
        done, coming = (loop.costs.cost(step) for step in (loop.progress.step - 1, loop.progress.step))
        if loop.recipe.mixed_sizes:  # no two steps need be alike, so they are compared by what they should cost
            seconds, coming = seconds / done, 1.0
        change = self._adaptation.record(seconds, coming)
        change = self._go_over(loop, settings) or change
        if change is None:
            return None
        return self._describe_busy(change) if change.race is None else self._finish_race(change)

    def _go_over(self, loop: Loop, settings: AppliedSettings) -> Change | None:
        """Gives what is decided by this: where a way can't be used and one is left, the race is over."""
        way = self._adaptation.way
        if (way.speedups, way.threads) == (loop.plan.speedups, loop.plan.threads):
            return None
        try:
            loop.switch(replace(loop.plan, speedups=way.speedups, threads=way.threads))
        except MachineError:  # a speedup is needless beside the others
            change = self._adaptation.withdraw()
            return self._go_over(loop, settings) or change
        settings.change(loop.compute)
        loop.progress.plans.append((loop.progress.step, list(way.speedups), way.threads))
        return None

    def _finish_race(self, change: Change) -> str | None:
        assert self._field is not None
        assert change.race is not None
        is_first = self.plan.origin == SHORT_LIST
        plain = Way(speedups=(), threads=self._threads)
        trials = self.plan.trials
        if is_first:
            raced = trials_of(change.race, None, change.way, plain, lambda way: way.speedups)
            trials = (*self._field.refused, *add_errors(raced, self._field.errors))
        names = {name for one in self._field.combinations for name in one}
        reason = "the race in training was won without it"
        dropped = {**self.plan.dropped, **{n: reason for n in names if n not in change.way.speedups}}
        self.plan = replace(
            self.plan,
            speedups=change.way.speedups,
            trials=trials,
            origin=RACED,
            dropped={n: r for n, r in dropped.items() if n not in change.way.speedups},
        )
        store_raced(self._store, self.plan)
        if not is_first:
            return None
        what = "+".join(change.way.speedups) or "plain PyTorch"
        if change.gain is not None and change.way.speedups:
            what += f", {change.gain.ratio:.2f} times as fast as plain PyTorch"
        entrants = plural(len(change.race.entrants), "combination")
        return f"plan: {what}; {entrants} raced in the first {plural(self.raced_steps, 'step')}"

    def _describe_busy(self, change: Change) -> str:
        gain = "" if change.gain is None else f", {change.gain.ratio:.1f} times as fast"
        if not change.busy:
            return f"the cores are free again: going on as planned{gain}"
        threads = change.way.threads or torch.get_num_threads()
        if not change.way.speedups and self.plan.speedups:
            return f"steps became slower than planned: going on with plain PyTorch{gain}"
        extra = [n for n in change.way.speedups if n not in self.plan.speedups]
        what = " and ".join([plural(threads, "thread"), *extra])
        return f"other programs use the cores: going on with {what}{gain}"

    def _beside_others(self, way: Way) -> list[Way]:
        """Ways to compute the same that may be faster where other programs use the cores."""
        ways = [replace(way, speedups=sort_speedups([*way.speedups, name])) for name in self._helpful]
        if self._threads is None:
            count = way.threads or cores()
            fewer = tuple(n for n in way.speedups if not load("speedups", n).beside_others)
            ways += [replace(way, speedups=fewer, threads=n) for n in sorted({count - 1, count // 2}) if n >= 1]
        return ways
