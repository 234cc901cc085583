"""The ladder: the same training computed in more and more of a plan's ways, all measured against plain PyTorch.

Each rung adds one change of the plan to the rung below. All rungs start from the same weights and advance by
turns, a few steps a visit, so that in the end each has had the same steps, its speed was taken in the same
minutes as that of plain PyTorch, and the ratio is one of pairs. What is trained is the recipe with its
schedule drawn together to these steps: a learning rate that has come down makes scores comparable.

The gate holds the scores on the validation split against plain PyTorch's. Two trainings differ by chance as
well, so a rung that is worse is trained again with another seed beside plain PyTorch, and only if it is worse
again it is refused.

A rung that fails is refused with its reason and the next ones are measured without its speedup. What this
doesn't do: choose a plan, write files, or train to the end of a long recipe.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from suanli.compute.plan import plain_plan
from suanli.core.compare import difference
from suanli.core.console import Progress, say
from suanli.core.errors import SuanliError, UsageError
from suanli.core.types import Difference, Plan, Recipe, Task
from suanli.machine import device
from suanli.machine.ceilings import Ceilings
from suanli.machine.timing import gain, percentile, spread
from suanli.training.ablation_records import Ladder, Phase, Rung, rungs, shortened, visits
from suanli.training.setup import Setup
from suanli.training.timed_run import Record, Way
from suanli.training.utilization import ceiling_flops

ROUNDS = 5
BUDGET_S = 300.0  # for training and evaluating all rungs, where the number of steps isn't given
EVALUATION_SHARE = 0.2  # of the budget
MOST_BATCHES = 50  # of evaluation in a visit
SURVEYED = 3  # steps, from which the time of all is estimated


def climb(
    setup: Setup,
    plan: Plan,
    *,
    steps: int | None = None,
    rounds: int = ROUNDS,
    budget_s: float | None = None,
    ceilings: Ceilings | None = None,
    price_per_hour: float | None = None,
) -> Ladder:
    """Measures plain PyTorch and every rung up to `plan`.

    Without `steps`, as many as `budget_s` (default BUDGET_S) allows and at most the recipe's. Where time turns out
    to be short, rounds get fewer steps, the same for all rungs; the first round always runs. `price_per_hour` is
    in any currency. Raises Diverged, and what torch raises, where plain PyTorch itself fails.
    """
    places = [_Place(name, part) for name, part in rungs(plan)]
    survey = _survey(setup)
    limit_s = budget_s or (BUDGET_S if steps is None else math.inf)
    if steps is None:
        afford = _affordable((1 - EVALUATION_SHARE) * limit_s, [survey.step_s] * len(places), survey.steps)
        steps = min(survey.steps, max(2 * (rounds + 1), afford))
    recipe = shortened(setup.recipe, steps, survey.steps_per_epoch)
    run = _Climb(_with_recipe(setup, recipe), places, visits(steps, rounds))
    run.climb(limit_s)
    highest = None if ceilings is None else ceiling_flops(ceilings)
    made = [run.rung(place, survey, highest, price_per_hour) for place in places]
    return Ladder(
        device=setup.device.name,
        batch_size=survey.batch_size,
        rounds=run.rounds,
        steps=run.steps,
        planned_steps=steps,
        headline=run.task.metric,
        tolerance=run.task.tolerance,
        validation_examples=len(setup.prepared.splits["val"]),
        price_per_hour=price_per_hour,
        ceiling_flops=highest,
        plan=plan,
        rungs=tuple(made),
        recipe=recipe,
    )


def check(steps: int | None, rounds: int, budget_s: float | None, price_per_hour: float | None) -> None:
    """Raises UsageError for values that `climb` can't do anything with."""
    if rounds < 1:
        raise UsageError(f"--rounds can't be {rounds}.", fix="Give 1 or more; 5 tell a spread.")
    if steps is not None and steps < 2:
        raise UsageError(f"--steps can't be {steps}.", fix="Give 2 or more: the first ones only warm up.")
    if budget_s is not None and not budget_s > 0:
        raise UsageError(f"--time-budget-s can't be {budget_s}.", fix="Give a number of seconds above 0.")
    if price_per_hour is not None and not (price_per_hour > 0 and math.isfinite(price_per_hour)):
        raise UsageError(f"--price-per-hour can't be {price_per_hour}.", fix="Give what an hour costs, above 0.")


def _with_recipe(setup: Setup, recipe: Recipe) -> Setup:
    """The same weights and splits under a recipe that differs in its schedule only."""
    other = copy.copy(setup)
    other.recipe = recipe
    return other


# --- before the rungs -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What is taken once, from a copy that plain PyTorch trains a few steps."""

    steps: int  # of the whole recipe
    steps_per_epoch: int
    batch_size: int
    step_s: float
    step_flops: float  # of an example in training
    batch_flops: float  # of an example in evaluation


def _survey(setup: Setup) -> _Survey:
    plain = plain_plan(setup.device)
    loop = setup.trial(plain)
    order, whole = loop.order, loop.steps
    if whole < SURVEYED + 1:
        recipe = shortened(setup.recipe, SURVEYED + 1, order.steps_per_epoch)  # longer, in fact
        loop = _with_recipe(setup, recipe).trial(plain)
    way = Way(loop, setup.device)
    step_flops, batch_flops = way.flops()
    way.train(SURVEYED)
    return _Survey(
        steps=whole,
        steps_per_epoch=order.steps_per_epoch,
        batch_size=order.batch_size,
        step_s=percentile(way.training.step_s, 0.5),
        step_flops=step_flops / order.batch_size,
        batch_flops=batch_flops / way.evaluated,
    )


# --- climbing -------------------------------------------------------------------------------


@dataclass
class _Place:
    """A rung while it is measured."""

    name: str
    plan: Plan
    way: Way | None = None  # None: not begun, or failed
    precision: str = "float32"
    probabilities: np.ndarray | None = None  # (N, K) of the validation split, after the last step
    difference: Difference | None = None
    again: Difference | None = None
    refused: str | None = None
    failed: bool = False
    scores: dict[str, float] = field(default_factory=dict)


class _Climb:
    def __init__(self, setup: Setup, places: Sequence[_Place], sizes: Sequence[int]) -> None:
        self.setup, self.places, self.sizes = setup, places, sizes
        self.steps = self.rounds = 0

    @property
    def task(self) -> Task:
        way = self.places[0].way
        assert way is not None  # where plain PyTorch fails, nothing is measured
        return way.loop.task

    def climb(self, limit_s: float) -> None:
        with Progress("Measuring", len(self.places) * len(self.sizes)) as bar:
            self._train(bar, (1 - EVALUATION_SHARE) * limit_s)
        self._examine()
        self._evaluate(EVALUATION_SHARE * min(limit_s, BUDGET_S))
        self._train_again()

    def _train(self, bar: Progress, limit_s: float) -> None:
        started = time.perf_counter()
        self._warm_up(bar)
        rounds = self.sizes[1:]
        for number, planned in enumerate(rounds):
            left_s = limit_s - (time.perf_counter() - started)
            if number and left_s <= 0:
                break
            paces = [way.training.pace_s for _, way in self._by_turns(0)]
            steps = _affordable(left_s / (len(rounds) - number), paces, planned)
            for place, way in self._by_turns(number):
                with self._attempt(place):
                    way.train(steps)
            self.rounds, self.steps = number + 1, self.steps + steps
            bar.update(len(self.places) * (number + 2), f"round {number + 1}")

    def _evaluate(self, limit_s: float) -> None:
        rounds = len(self.sizes) - 1
        for place, way in self._by_turns(0):
            with self._attempt(place):
                way.evaluate(2, timed=False, elsewhere_bytes=self._held_elsewhere(place))
        paces = [way.evaluation.pace_s for _, way in self._by_turns(0)]
        batches = _affordable(limit_s / rounds, paces, MOST_BATCHES)
        for number in range(rounds):
            for place, way in self._by_turns(number):
                with self._attempt(place):
                    way.evaluate(batches)

    def _warm_up(self, bar: Progress) -> None:
        """Builds the rungs, in order: what fails is left out of the rungs above."""
        without: set[str] = set()
        for number, place in enumerate(self.places):
            below = self.places[number - 1].plan.speedups if number else ()
            place.plan = replace(place.plan, speedups=tuple(n for n in place.plan.speedups if n not in without))
            with self._attempt(place):
                loop = self.setup.trial(place.plan)
                way = place.way = Way(loop, self.setup.device)
                way.train(self.sizes[0], timed=False, elsewhere_bytes=self._held_elsewhere(place))
                place.precision = way.precision()
            if place.failed:
                without |= set(place.plan.speedups) - set(below)
            bar.update(number + 1, place.name)
        self.steps = self.sizes[0]

    def _by_turns(self, number: int) -> Iterator[tuple[_Place, Way]]:
        """The rungs that run, every other round from the top, so that none always follows the same one."""
        for place in self.places if number % 2 == 0 else self.places[::-1]:
            if place.way is not None:
                yield place, place.way

    def _held_elsewhere(self, place: _Place) -> int:
        return sum(p.way.held_bytes() for p in self.places if p is not place and p.way is not None)

    @contextmanager
    def _attempt(self, place: _Place) -> Iterator[None]:
        """A rung that fails is refused and given up; plain PyTorch must not fail."""
        try:
            yield
        except Exception as error:  # a speedup may be anyone's code, and a compiler may raise anything
            if place is self.places[0]:
                raise
            place.refused, place.failed, place.way = _reason(error), True, None
            gc.collect()  # a loop and its generator hold each other, and memory may be short

    # --- the gate ---

    def _examine(self) -> None:
        """Scores of every rung, and how they differ from plain PyTorch's."""
        targets, plain = self._targets, self.places[0]
        for place, way in self._by_turns(0):
            with self._attempt(place):
                found = place.probabilities = way.probabilities()
                place.scores = self.task.scores(found, targets)
                if place is not plain:
                    assert plain.probabilities is not None
                    place.difference = difference(self.task, plain.probabilities, found, targets)

    def _train_again(self) -> None:
        """Rungs that lose more than is tolerated, trained with another seed: refused if they do so again."""
        tolerance = self.task.tolerance
        suspects = [p for p in self.places if p.difference is not None and p.difference.exceeds(tolerance)]
        suspects = [p for p in suspects if not p.failed]
        if not suspects:
            return
        named = ", ".join(p.name for p in suspects)
        say(f"{named}: worse than plain PyTorch, so trained again with another seed")
        seed = self.setup.recipe.seed + 1
        recipe = self.setup.recipe.model_copy(update={"seed": seed})
        other = Setup(recipe, self.setup.prepared, self.setup.device)
        plain = self._trained(other, self.places[0].plan)
        for place in suspects:
            with self._attempt(place):
                found = self._trained(other, place.plan)
                place.again = difference(self.task, plain, found, self._targets)
                if place.again.exceeds(tolerance):
                    place.refused = _loss(self.task, place)

    def _trained(self, setup: Setup, plan: Plan) -> np.ndarray:
        way = Way(setup.trial(plan), setup.device)
        way.train(self.steps, timed=False)
        return way.probabilities()

    @property
    def _targets(self) -> np.ndarray:
        return self.setup.prepared.splits["val"].targets

    # --- figures ---

    def rung(
        self, place: _Place, survey: _Survey, highest: dict[str, float] | None, price_per_hour: float | None
    ) -> Rung:
        way, plain = place.way, self.places[0].way
        assert plain is not None
        train = evaluate = None
        if way is not None:
            ceiling = (highest or {}).get(place.precision) or (highest or {}).get("float32")
            pair = (way.training, plain.training), (way.evaluation, plain.evaluation)
            train, evaluate = (
                _phase(mine, plains, flops, ceiling, price_per_hour)
                for (mine, plains), flops in zip(pair, (survey.step_flops, survey.batch_flops), strict=True)
            )
        return Rung(
            name=place.name,
            speedups=place.plan.speedups,
            threads=place.plan.threads or torch.get_num_threads(),
            train=train,
            evaluate=evaluate,
            scores=place.scores,
            difference=place.difference,
            again=place.again,
            refused=place.refused,
            failed=place.failed,
        )


def _affordable(time_s: float, paces_s: Sequence[float], most: int) -> int:
    """How many times all can be done one after the other, each taking so long: from 1 to `most`."""
    if math.isinf(time_s):
        return most
    return max(1, min(most, int(max(0.0, time_s) / sum(paces_s))))


def _phase(mine: Record, plain: Record, flops: float, ceiling: float | None, price_per_hour: float | None) -> Phase:
    """`flops` are those of one example."""
    rate = spread([count / took for count, took in zip(mine.examples, mine.seconds, strict=True)])
    return Phase(
        examples_per_s=rate,
        gain=gain(plain.seconds, mine.seconds),
        step_ms_p50=1e3 * percentile(mine.step_s, 0.5),
        step_ms_p95=1e3 * percentile(mine.step_s, 0.95),
        peak_memory_bytes=mine.peak_bytes,
        share_of_ceiling=flops * rate.median / ceiling if ceiling and flops else None,
        joules_per_example=None if mine.joules is None else mine.joules / sum(mine.examples),
        examples_per_price=None if price_per_hour is None else rate.median * 3600 / price_per_hour,
    )


def _loss(task: Task, place: _Place) -> str:
    assert place.difference is not None
    assert place.again is not None
    found, again = place.difference, place.again
    return (
        f"it loses {-found.median:.1%} of {task.metric} (95 % interval {-found.high:.1%} to {-found.low:.1%}), "
        f"{-again.median:.1%} with another seed; the task tolerates {task.tolerance:.1%}."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, SuanliError):
        return error.message
    if device.is_out_of_memory(error):
        return "memory ran out."
    told = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {told.strip()[:200]}"
