"""How large a network and how long a training: from the score that is wanted, or from the time there is.

A recipe may come in several efforts, each a few changes of its fields, from the cheapest to the dearest, with what
each was measured to reach on which data (`Budget`). For a score the cheapest that reaches it is taken, and only
where that was measured: nothing is promised about other data. For a time, a few real steps give the machine's speed;
the dearest effort that fits is taken, its epochs stretched or cut to fill the time.

What this doesn't do: watch the clock while it trains. The learning rate must know the end beforehand, and a run that
ended by the clock could not be repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property

from suanli.compute import planner
from suanli.compute.flops import flops
from suanli.compute.step_runner import apply_settings
from suanli.core.console import duration, plural, say
from suanli.core.errors import OutOfMemory, UsageError
from suanli.core.registry import load_all
from suanli.core.settings import change
from suanli.core.types import Budget, Device, Json, Recipe, RecipeChoice
from suanli.data.cache import PreparedData
from suanli.machine import timing
from suanli.training.forecast import check_memory, explain_out_of_memory, validation_steps
from suanli.training.setup import Setup

PLANNING = 0.05  # of the training, for choosing the plan
RESERVE = 0.1  # of the time that is left: steps never take the same time twice
FINISHING_S = 3.0  # the last check, the model and the run's files
LONGEST = 3.0  # times the epochs of the dearest effort
TIMED_STEPS = 3
COUNTED = 4  # examples whose operations are counted
ALIKE = 0.05  # of the examples more or fewer: the same data in another encoding, so split otherwise
WIDER = 2.0  # times as fast, at most, a wider network computes each operation


def choose_for_score(recipe: Recipe, prepared: PreparedData, wanted: float) -> Recipe:
    """The cheapest effort that reached `wanted` (a fraction) on this data. Raises UsageError where none did, or
    nothing is known."""
    if not 0 < wanted < 1:
        raise UsageError(f"--target-accuracy can't be {wanted}.", fix="Give a fraction, such as 0.9.")
    known = [(effort, score) for effort in _efforts(recipe) if (score := _reached(effort, prepared)) is not None]
    if not known:
        listed = {r.data for c in load_all("recipes").values() for e in c.budgets for r in e.scores}
        raise UsageError(
            f"What reaches {wanted:.1%} on {prepared.name} was not measured; known is {', '.join(sorted(listed))}.",
            fix="Use --time-budget, which takes the best that fits into a time.",
        )
    for effort, score in known:
        if score >= wanted:
            say(f"effort: {_told(effort.changes)}; it reached {score:.1%} on {prepared.name} before")
            return change(recipe, effort.changes)
    best = max(score for _, score in known)
    raise UsageError(
        f"Nothing that was measured on {prepared.name} reaches {wanted:.1%}; the best is {best:.1%}.",
        fix="Ask for less, or choose model and epochs yourself.",
    )


def choose_for_time(
    recipe: Recipe, prepared: PreparedData, device: Device, threads: int | None, left_s: float
) -> Recipe:
    """The dearest effort that fits into `left_s` seconds from now, its epochs stretched or cut to fill them."""
    until = time.perf_counter() + left_s
    efforts: list[Mapping[str, Json]] = [effort.changes for effort in _efforts(recipe)] or [{}]
    chosen = cheapest = _Subject(recipe, efforts[0], prepared, device, threads)
    for changes in efforts[:0:-1]:
        dearer = _Subject(recipe, changes, prepared, device, threads)
        # Its operations are counted before a step is taken, which may take longer than there is.
        quick = dearer.flops <= WIDER * cheapest.flops_per_s * _room(until)
        if quick and dearer.fits and dearer.seconds <= _room(until):
            chosen = dearer
            break
    whole_s = chosen.seconds
    epochs = min(chosen.recipe.epochs * _room(until) / whole_s, LONGEST * change(recipe, efforts[-1]).epochs)
    told = _told({**chosen.changes, "epochs": round(epochs, 2)})
    say(f"effort: {told}, about {duration(whole_s * epochs / chosen.recipe.epochs)} of training")
    return change(chosen.recipe, {"epochs": max(round(epochs, 2), 0.01)})


def _room(until: float) -> float:
    """Seconds for training steps and validations."""
    return max(0.0, (until - time.perf_counter() - FINISHING_S) * (1 - RESERVE) / (1 + PLANNING))


class _Subject:
    """One effort on this data and device, computed with the usual speedups."""

    def __init__(
        self, recipe: Recipe, changes: Mapping[str, Json], prepared: PreparedData, device: Device, threads: int | None
    ) -> None:
        self.changes, self.recipe = changes, change(recipe, changes)
        with explain_out_of_memory(device):
            setup = Setup(self.recipe, prepared, device)
            self._loop = setup.trial(planner.short_list(setup, threads))
        self._device = device
        self._work = self._loop.full_size_steps_left + validation_steps(self._loop)

    @cached_property
    def flops(self) -> float:
        """Operations of the whole training."""
        loop = self._loop
        examples = min(COUNTED, loop.order.batch_size)
        with apply_settings(loop.compute), loop.preserve_weights():
            counted = flops(lambda: loop.try_step(examples, whole=True))
        return counted / examples * loop.order.batch_size * self._work

    @property
    def fits(self) -> bool:
        """Whether memory has room for it."""
        try:
            check_memory(self._loop, self._device)
        except OutOfMemory:
            return False
        return True

    @cached_property
    def seconds(self) -> float:
        """Of the whole training, from a few of its steps."""
        loop = self._loop
        with explain_out_of_memory(self._device), apply_settings(loop.compute):
            loop.advance()
            took = timing.spread([timing.seconds(loop.advance) for _ in range(TIMED_STEPS)]).median
        return took * self._work

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds


def budget_fields(recipe: Recipe) -> set[str]:
    """The fields of the recipe that its efforts decide."""
    fields = {"epochs"}.union(*(effort.changes for effort in _efforts(recipe)))
    return fields | ({"model"} if "model_args" in fields else set())


def _efforts(recipe: Recipe) -> tuple[Budget, ...]:
    choice: RecipeChoice | None = load_all("recipes").get(recipe.name)
    return choice.budgets if choice is not None else ()


def _reached(effort: Budget, prepared: PreparedData) -> float | None:
    """The score that was measured on this data; None: it wasn't, or not on this data."""
    examples = len(prepared.splits["train"])
    for reached in effort.scores:
        named = reached.data == prepared.name and reached.classes == len(prepared.classes)
        if named and abs(examples - reached.examples) <= ALIKE * reached.examples:
            return reached.score
    return None


def _told(changes: Mapping[str, Json]) -> str:
    widths = changes.get("model_args", {}).get("widths")
    network = f"widths {'/'.join(map(str, widths))}, " if widths else ""
    return f"{network}{plural(changes['epochs'], 'epoch')}"
