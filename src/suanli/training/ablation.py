"""An ablation: one training, computed with more and more of a plan's speedups, all compared with plain PyTorch.

Each variant adds one change of the plan to the variant before. All start from the same weights and take turns, one
block of steps each in every round. In the end each has trained the same steps, its speed was taken in the same minutes
as that of plain PyTorch, and the ratio is one of pairs. What is trained is the recipe with its schedule shortened to
these steps: scores are comparable once the learning rate has come down.

The gate compares the scores on the validation split with plain PyTorch's. Two trainings also differ by chance, so a
variant that is worse is trained again with another seed beside plain PyTorch, and refused only if it is worse again.

A variant that fails is refused with its reason, and the next ones are measured without its speedup. This module
doesn't choose a plan, write files, or train to the end of a long recipe.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from suanli.core.compare import difference
from suanli.core.console import Progress, say
from suanli.core.errors import SuanliError
from suanli.core.task import Metric, Records, Task
from suanli.core.types import Difference, Plan, Recipe
from suanli.core.windows import merge_windows
from suanli.machine import device
from suanli.machine.ceilings import Ceilings
from suanli.machine.timing import gain, percentile, spread
from suanli.training.ablation_plan import Survey, cumulative_plans, divide_steps, shorten, survey, with_recipe
from suanli.training.ablation_records import Ablation, Estimate, EvaluationFigures, TrainingFigures, Variant
from suanli.training.setup import Setup
from suanli.training.timed_run import TimedRun, Timings
from suanli.training.utilization import ceiling_flops

ROUNDS = 5
BUDGET_S = 300.0  # for training and evaluating all variants, where the number of steps isn't given
EVALUATION_SHARE = 0.2  # of the budget
MOST_BATCHES = 50  # of evaluation in a block


def run_ablation(
    setup: Setup,
    plan: Plan,
    ceilings: Ceilings,
    *,
    steps: int | None = None,
    rounds: int = ROUNDS,
    budget_s: float | None = None,
    price_per_hour: float | None = None,
) -> tuple[Ablation, Recipe]:
    """Measures plain PyTorch and every variant up to `plan`. Gives the figures and the recipe that was trained.

    Without `steps`, as many as `budget_s` (default BUDGET_S) allows and at most the recipe's. Where time turns out to
    be short, rounds get fewer steps, the same for all variants; the first round always runs. `price_per_hour` is in
    any currency. Raises Diverged, and what torch raises, where plain PyTorch itself fails.
    """
    contenders = [_Contender(name, part) for name, part in cumulative_plans(plan)]
    facts = survey(setup)
    limit_s = budget_s or (BUDGET_S if steps is None else math.inf)
    if steps is None:
        afford = _affordable((1 - EVALUATION_SHARE) * limit_s, [facts.step_s] * len(contenders), facts.steps)
        steps = min(facts.steps, max(2 * (rounds + 1), afford))
    recipe = shorten(setup.recipe, steps, facts.steps_per_epoch)
    comparison = _Comparison(with_recipe(setup, recipe), contenders, divide_steps(steps, rounds))
    comparison.run(limit_s)
    highest = ceiling_flops(ceilings)
    ablation = Ablation(
        device=setup.device.name,
        batch_size=facts.batch_size,
        rounds=comparison.rounds,
        steps=comparison.steps,
        planned_steps=steps,
        metric=comparison.task.metric.name,
        unit=comparison.task.metric.unit,
        tolerance=comparison.allowed_loss,
        validation_examples=len(setup.prepared.splits["val"]),
        price_per_hour=price_per_hour,
        ceiling_flops=highest,
        plan=plan,
        variants=tuple(comparison.variant(one, facts, highest, price_per_hour) for one in contenders),
    )
    return ablation, recipe


@dataclass
class _Contender:
    """A variant while it is measured."""

    name: str
    plan: Plan
    run: TimedRun | None = None  # None: not begun, or failed
    precision: str = "float32"
    records: Records | None = None  # of the validation split, after the last step
    difference: Difference | None = None
    again: Difference | None = None
    refused: str | None = None
    failed: bool = False
    scores: dict[str, float] = field(default_factory=dict)


class _Comparison:
    """Runs the contenders; the first is plain PyTorch. `sizes` are the steps of each block (`divide_steps`)."""

    def __init__(self, setup: Setup, contenders: Sequence[_Contender], sizes: Sequence[int]) -> None:
        self.setup, self.contenders, self.sizes = setup, contenders, sizes
        self.steps = self.rounds = 0  # that each contender was trained

    @property
    def task(self) -> Task:
        return self._plain_run.loop.task

    @property
    def _plain_run(self) -> TimedRun:
        run = self.contenders[0].run
        assert run is not None  # where plain PyTorch fails, nothing is measured
        return run

    def run(self, limit_s: float) -> None:
        with Progress("Measuring", len(self.contenders) * len(self.sizes)) as bar:
            self._train(bar, (1 - EVALUATION_SHARE) * limit_s)
        self._score()
        self._time_evaluation(EVALUATION_SHARE * min(limit_s, BUDGET_S))
        self._train_again()

    def _train(self, bar: Progress, limit_s: float) -> None:
        started = time.perf_counter()
        self._warm_up(bar)
        rounds = self.sizes[1:]
        for number, planned in enumerate(rounds):
            left_s = limit_s - (time.perf_counter() - started)
            if number and left_s <= 0:
                break
            paces = [run.training.pace_s for _, run in self._in_turn(0)]
            steps = _affordable(left_s / (len(rounds) - number), paces, planned)
            for contender, run in self._in_turn(number):
                with self._attempt(contender):
                    run.train(steps)
            self.rounds, self.steps = number + 1, self.steps + steps
            bar.update(len(self.contenders) * (number + 2), f"round {number + 1}")

    def _warm_up(self, bar: Progress) -> None:
        """Starts the runs, in order: what fails is left out of the variants after it."""
        failures: set[str] = set()
        for number, contender in enumerate(self.contenders):
            before = self.contenders[number - 1].plan.speedups if number else ()
            usable = tuple(name for name in contender.plan.speedups if name not in failures)
            contender.plan = replace(contender.plan, speedups=usable)
            with self._attempt(contender):
                run = contender.run = TimedRun(self.setup.trial(contender.plan), self.setup.device)
                run.train(self.sizes[0], timed=False, other_bytes=self._bytes_of_others(contender))
                contender.precision = run.precision()
            if contender.failed:
                failures |= set(contender.plan.speedups) - set(before)
            bar.update(number + 1, contender.name)
        self.steps = self.sizes[0]

    def _time_evaluation(self, limit_s: float) -> None:
        rounds = len(self.sizes) - 1
        for contender, run in self._in_turn(0):
            with self._attempt(contender):
                run.evaluate(2, timed=False, other_bytes=self._bytes_of_others(contender))
        paces = [run.evaluation.pace_s for _, run in self._in_turn(0)]
        batches = _affordable(limit_s / rounds, paces, MOST_BATCHES)
        for number in range(rounds):
            for contender, run in self._in_turn(number):
                with self._attempt(contender):
                    run.evaluate(batches)

    def _in_turn(self, round_number: int) -> Iterator[tuple[_Contender, TimedRun]]:
        """Those that run, in every other round from the last, so that none always follows the same one."""
        for contender in self.contenders if round_number % 2 == 0 else self.contenders[::-1]:
            if contender.run is not None:
                yield contender, contender.run

    def _bytes_of_others(self, contender: _Contender) -> int:
        others = [one.run for one in self.contenders if one is not contender]
        return sum(run.state_bytes() for run in others if run is not None)

    @contextmanager
    def _attempt(self, contender: _Contender) -> Iterator[None]:
        """A contender that fails is refused and dropped; plain PyTorch must not fail."""
        try:
            yield
        except Exception as error:  # a speedup may be anyone's code, and a compiler may raise anything
            if contender is self.contenders[0]:
                raise
            contender.refused, contender.failed, contender.run = _reason(error), True, None
            gc.collect()  # a loop and its generator refer to each other, and memory may be short

    # --- the gate ---

    def _score(self) -> None:
        """The scores of every contender, and how they differ from plain PyTorch's."""
        plain = self.contenders[0]
        for contender, run in self._in_turn(0):
            with self._attempt(contender):
                contender.records = self._records(run)
                contender.scores = self.task.scores(contender.records)
                if contender is not plain:
                    assert plain.records is not None
                    contender.difference = difference(self.task, plain.records, contender.records, self._groups)

    @property
    def allowed_loss(self) -> float:
        """Of the primary metric, against plain PyTorch."""
        metric = self.task.metric
        return metric.allowed_loss(self.contenders[0].scores.get(metric.name, 0.0))

    def _train_again(self) -> None:
        """Trains contenders that lose more than is tolerated with another seed, and refuses those that lose again."""
        allowed = self.allowed_loss
        suspects = [c for c in self.contenders if c.difference is not None and c.difference.exceeds(allowed)]
        suspects = [contender for contender in suspects if not contender.failed]
        if not suspects:
            return
        names = ", ".join(contender.name for contender in suspects)
        say(f"{names}: worse than plain PyTorch, so trained again with another seed")
        seed = self.setup.recipe.seed + 1
        recipe = self.setup.recipe.model_copy(update={"seed": seed})
        other = Setup(recipe, self.setup.prepared, self.setup.device)
        plain = self._train_anew(other, self.contenders[0].plan)
        for contender in suspects:
            with self._attempt(contender):
                again = self._train_anew(other, contender.plan)
                contender.again = difference(self.task, plain, again, self._groups)
                if contender.again.exceeds(allowed):
                    contender.refused = _describe_loss(self.task.metric, contender, allowed)

    def _train_anew(self, setup: Setup, plan: Plan) -> Records:
        run = TimedRun(setup.trial(plan), setup.device)
        run.train(self.steps, timed=False)
        return self._records(run)

    def _records(self, run: TimedRun) -> Records:
        split = self.setup.prepared.splits["val"]
        return self.task.records(merge_windows(self.task, run.predictions(), split.windows), split.targets)

    @property
    def _groups(self) -> np.ndarray | None:
        return self.setup.prepared.splits["val"].groups

    # --- figures ---

    def variant(
        self,
        contender: _Contender,
        facts: Survey,
        highest_flops: Mapping[str, float],
        price_per_hour: float | None,
    ) -> Variant:
        run, plain = contender.run, self._plain_run
        train = evaluate = None
        if run is not None:
            ceiling = highest_flops.get(contender.precision) or highest_flops.get("float32")
            common = _figures(run.training, plain.training, facts.training_flops, ceiling, price_per_hour)
            p50, p95 = _percentiles_ms(run.training)
            train = TrainingFigures(**common, step_ms_p50=p50, step_ms_p95=p95)
            common = _figures(run.evaluation, plain.evaluation, facts.evaluation_flops, ceiling, price_per_hour)
            p50, p95 = _percentiles_ms(run.evaluation)
            evaluate = EvaluationFigures(**common, batch_ms_p50=p50, batch_ms_p95=p95)
        return Variant(
            name=contender.name,
            speedups=contender.plan.speedups,
            threads=contender.plan.threads or torch.get_num_threads(),
            train=train,
            evaluate=evaluate,
            scores=contender.scores,
            difference=contender.difference,
            again=contender.again,
            refused=contender.refused,
            failed=contender.failed,
        )


def _affordable(time_s: float, paces_s: Sequence[float], most: int) -> int:
    """How many times all can be done one after the other, each taking so long: from 1 to `most`."""
    if math.isinf(time_s):
        return most
    return max(1, min(most, int(max(0.0, time_s) / sum(paces_s))))


def _percentiles_ms(timings: Timings) -> tuple[float, float]:
    return 1e3 * percentile(timings.step_s, 0.5), 1e3 * percentile(timings.step_s, 0.95)


def _figures(
    timings: Timings, plain: Timings, flops: float, ceiling: float | None, price_per_hour: float | None
) -> dict[str, Any]:
    """The fields of `Figures`; `flops` are those of one example."""
    rate = spread([count / took for count, took in zip(timings.examples, timings.seconds, strict=True)])
    speedup = gain(plain.seconds, timings.seconds)
    several = rate.count > 1
    return {
        "rounds": rate.count,
        "examples_per_s": Estimate(median=rate.median, half_iqr=rate.half_iqr if several else None),
        "ratio": Estimate(median=speedup.ratio, half_iqr=speedup.spread if several else None),
        "peak_memory_bytes": timings.peak_bytes,
        "share_of_ceiling": flops * rate.median / ceiling if ceiling and flops else None,
        "joules_per_example": None if timings.joules is None else timings.joules / sum(timings.examples),
        "examples_per_price": None if price_per_hour is None else rate.median * 3600 / price_per_hour,
    }


def _describe_loss(metric: Metric, contender: _Contender, allowed: float) -> str:
    first, again = contender.difference, contender.again
    assert first is not None
    assert again is not None
    return (
        f"it loses too much: {metric.describe(first)}, with another seed {metric.describe(again)}; "
        f"the task tolerates a loss of {metric.format(allowed)}."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, SuanliError):
        return error.message
    if device.is_out_of_memory(error):
        return "memory ran out."
    message = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {message.strip()[:200]}"
