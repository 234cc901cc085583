"""Chooses a network and a number of epochs for a score that is wanted, or for the time there is.

A recipe may come with several budgets (`Budget`), from the cheapest to the most expensive: each changes a few fields
and states the scores that were measured with it, and on which data. For a score, the cheapest budget that reached it
is chosen, and only on the data where that was measured: nothing is promised about other data. For a time, a few real
steps give the speed of the machine; the most expensive budget that fits is chosen, and its epochs are stretched or cut
to fill the time.

Training itself doesn't watch the clock: the learning rate must know the end beforehand, and a run that ended by the
clock could not be repeated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property

from suanli.compute.step_runner import apply_settings
from suanli.core.console import duration, plural, say
from suanli.core.errors import OutOfMemory, UsageError
from suanli.core.registry import load_all
from suanli.core.types import Budget, Device, Json, Plan, Recipe, RecipeChoice
from suanli.data.cache import PreparedData
from suanli.machine import timing
from suanli.training import unfreezing
from suanli.training.forecast import check_memory, explain_out_of_memory, validation_steps
from suanli.training.frozen_head import FrozenHead
from suanli.training.recipe import change
from suanli.training.setup import Setup
from suanli.training.utilization import count_step_flops

PLANNING = 0.05  # of the training, for choosing the plan
RESERVE = 0.1  # of the time that is left: steps never take the same time twice
FINISHING_S = 3.0  # the last validation, the model and the run's files
LONGEST = 3.0  # times the epochs of the most expensive budget
TIMED_STEPS = 3
LEAST_STEPS = 5  # that a training must have time for
SIZE_TOLERANCE = 0.05  # of the examples more or fewer: the same data in another encoding, so split differently
WIDE_SPEEDUP = 2.0  # at most, of an operation in a wider network


def choose_for_score(recipe: Recipe, prepared: PreparedData, target: float) -> Recipe:
    """The recipe with the cheapest budget that reached `target` (a fraction) on this data. Raises UsageError where no
    budget did, or none was measured on it."""
    scores = [(budget, score) for budget in _budgets(recipe) if (score := _score_on(budget, prepared)) is not None]
    if not scores:
        measured = {
            m.data for choice in load_all("recipes").values() for budget in choice.budgets for m in budget.scores
        }
        known = ", ".join(sorted(measured))
        raise UsageError(
            f"What reaches {target:.1%} on {prepared.name} was not measured; it is known for {known}.",
            fix="Use --time-budget, which takes the best that fits into a time.",
        )
    for budget, score in scores:
        if score >= target:
            say(f"budget: {_describe(budget.changes)}; it reached {score:.1%} on {prepared.name} before")
            return change(recipe, budget.changes)
    best = max(score for _, score in scores)
    raise UsageError(
        f"Nothing that was measured on {prepared.name} reaches {target:.1%}; the best is {best:.1%}.",
        fix="Ask for less, or choose model and epochs yourself.",
    )


def check_target(target: float | None) -> None:
    """Raises UsageError for a target accuracy that is no fraction."""
    if target is not None and not 0 < target < 1:
        raise UsageError(f"--target-accuracy can't be {target}.", fix="Give a fraction, such as 0.9.")


def choose_for_time(
    recipe: Recipe,
    prepared: PreparedData,
    device: Device,
    usual: Callable[[Setup], Plan],
    left_s: float,
    head: FrozenHead | None = None,
) -> Recipe:
    """The recipe with the most expensive budget that fits into `left_s` seconds from now, its epochs stretched or cut
    to fill them; after a `head` on frozen features, none if all layers have no time or reason. `usual` gives the plan
    by which a training is timed. Raises UsageError where there is no time for a few steps and an evaluation."""
    deadline = time.perf_counter() + left_s
    if head is not None:
        return _choose_after_head(recipe, prepared, device, usual, deadline, head)
    changes = [budget.changes for budget in _budgets(recipe)] or [{}]
    choice = cheapest = _Estimate(recipe, changes[0], prepared, device, usual)
    for more in changes[:0:-1]:
        candidate = _Estimate(recipe, more, prepared, device, usual)
        # By its operations first: even one step may take longer than there is time.
        may_fit = candidate.flops <= WIDE_SPEEDUP * cheapest.flops_per_s * _training_s(deadline)
        if may_fit and candidate.fits_memory and candidate.seconds <= _training_s(deadline):
            choice = candidate
            break
    left_s = _training_s(deadline)
    if left_s < choice.least_s:
        raise UsageError(
            f"The time budget is too short: it leaves {duration(left_s)} for training, and a few steps with an "
            f"evaluation take {duration(choice.least_s)}.",
            fix="Give a longer --time-budget.",
        )
    seconds = choice.seconds
    longest = LONGEST * change(recipe, changes[-1]).epochs
    epochs = min(choice.recipe.epochs * _training_s(deadline) / seconds, longest)
    text = _describe({**choice.changes, "epochs": round(epochs, 2)})
    say(f"budget: {text}, about {duration(seconds * epochs / choice.recipe.epochs)} of training")
    return _stretch(choice.recipe, max(round(epochs, 2), 0.01))


def _choose_after_head(
    recipe: Recipe,
    prepared: PreparedData,
    device: Device,
    usual: Callable[[Setup], Plan],
    deadline: float,
    head: FrozenHead,
) -> Recipe:
    whole = unfreezing.with_all_layers(recipe)
    least, examples = unfreezing.EPOCHS, len(prepared.splits["train"])
    reason, epochs = unfreezing.why_enough(head), 0.0
    if reason is None:
        least_s = unfreezing.epochs_s(head, examples, least)  # about: even one step may take longer than there is time
        if least_s is None or least_s <= WIDE_SPEEDUP * _training_s(deadline):
            estimate = _Estimate(whole, {}, prepared, device, usual)
            least_s = estimate.seconds * least / whole.epochs if estimate.fits_memory else math.inf
            epochs = min(whole.epochs * _training_s(deadline) / estimate.seconds, LONGEST * whole.epochs)
        if epochs < least:
            left = duration(_training_s(deadline))
            reason = f"{plural(least, 'epoch')} of all layers take about {duration(least_s)}, and {left} are left"
    if reason is not None:
        say(f"budget: the head alone, since {reason}")
        return change(recipe, {"epochs": 0})
    text = _describe({"epochs": round(epochs, 2)})
    say(f"budget: all layers for {text}, about {duration(estimate.seconds * epochs / whole.epochs)} of training")
    return _stretch(whole, round(epochs, 2))


def _stretch(recipe: Recipe, epochs: float) -> Recipe:
    """With so many epochs, of which the final ones keep their share."""
    return change(recipe, {"epochs": epochs, "final_epochs": recipe.final_epochs * epochs / recipe.epochs})


def _training_s(deadline: float) -> float:
    """Seconds that are left for training steps and validations."""
    return max(0.0, (deadline - time.perf_counter() - FINISHING_S) * (1 - RESERVE) / (1 + PLANNING))


class _Estimate:
    """What a budget costs on this data and device, with the usual speedups."""

    def __init__(
        self,
        recipe: Recipe,
        changes: Mapping[str, Json],
        prepared: PreparedData,
        device: Device,
        usual: Callable[[Setup], Plan],
    ) -> None:
        self.changes, self.recipe = changes, change(recipe, changes)
        with explain_out_of_memory(device):
            setup = Setup(self.recipe, prepared, device, fresh=False)  # no value of a weight matters here
            self._loop = setup.trial(usual(setup))
        self._device = device
        self._steps = self._loop.full_size_steps_left + validation_steps(self._loop)

    @cached_property
    def flops(self) -> float:
        """Operations of the whole training."""
        return count_step_flops(self._loop) * self._steps

    @property
    def fits_memory(self) -> bool:
        try:
            check_memory(self._loop, self._device)
        except OutOfMemory:
            return False
        return True

    @cached_property
    def seconds(self) -> float:
        """Of the whole training."""
        return self._step_s * self._steps

    @property
    def least_s(self) -> float:
        """Seconds of a few steps and a validation."""
        return self._step_s * (LEAST_STEPS + validation_steps(self._loop, 1))

    @cached_property
    def _step_s(self) -> float:
        """Of one step, from a few of them."""
        loop = self._loop
        with explain_out_of_memory(self._device), apply_settings(loop.compute):
            loop.advance()
            return timing.spread([timing.seconds(loop.advance) for _ in range(TIMED_STEPS)]).median

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds


def budget_fields(recipe: Recipe) -> set[str]:
    """The fields of the recipe that its budgets change."""
    fields = {"epochs"}.union(*(budget.changes for budget in _budgets(recipe)))
    return fields | ({"model"} if "model_args" in fields else set())


def _budgets(recipe: Recipe) -> tuple[Budget, ...]:
    choice: RecipeChoice | None = load_all("recipes").get(recipe.name)
    return choice.budgets if choice is not None else ()


def _score_on(budget: Budget, prepared: PreparedData) -> float | None:
    """The score that was measured on this data; None: there is none."""
    examples = len(prepared.splits["train"])
    for measured in budget.scores:
        same = measured.data == prepared.name and measured.classes == len(prepared.task.classes)
        if same and abs(examples - measured.examples) <= SIZE_TOLERANCE * measured.examples:
            return measured.score
    return None


def _describe(changes: Mapping[str, Json]) -> str:
    widths = changes.get("model_args", {}).get("widths")
    network = f"widths {'/'.join(map(str, widths))}, " if widths else ""
    return f"{network}{plural(changes['epochs'], 'epoch')}"
