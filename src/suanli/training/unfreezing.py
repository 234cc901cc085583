"""Whether all layers are trained after the head, and which of the two models is kept."""

from __future__ import annotations

from pathlib import Path

from suanli.core.console import duration, plural
from suanli.core.task import Metric
from suanli.core.types import Recipe
from suanli.training.frozen_head import FrozenHead
from suanli.training.recipe import change

EPOCHS = 3.0  # that are offered, and the fewest for which a time budget trains all layers
USUAL_EPOCHS = 8.0  # of all layers, where a recipe for the head alone doesn't say
# Of wrong answers on validation. A training of all layers that corrects half of them, and breaks none, is then hardly
# chance: the probability that 5 of 5 changes are for the better is 1 in 32.
LEAST_WRONG = 10
BACKWARD = 3.0  # times a forward pass is one with gradients and an optimizer step, about


def is_better(metric: Metric, head: FrozenHead, score: float | None) -> bool:
    """Whether a model of this validation score replaces the one with the frozen backbone, which stays on a tie."""
    before = head.scores.get(metric.name)
    return before is None or score is None or metric.gain(before, score) > 0


def why_enough(head: FrozenHead) -> str | None:
    """Why training all layers isn't worth a time budget; None: it is."""
    if head.scores and head.wrong < LEAST_WRONG:
        answers = plural(head.wrong, "validation answer")
        return f"{answers} {'is' if head.wrong == 1 else 'are'} wrong, too few to measure a gain"
    return None


def with_all_layers(recipe: Recipe) -> Recipe:
    """Of a recipe for the head alone, one that trains all layers, too."""
    return recipe if recipe.epochs else change(recipe, {"epochs": USUAL_EPOCHS})


def without_head(recipe: Recipe) -> Recipe:
    """For a network whose head can't be fitted first."""
    return change(with_all_layers(recipe), {"frozen_views": 0})


def epochs_s(head: FrozenHead, images: int, epochs: float) -> float | None:
    """Seconds of training all layers, about, by the rate of the forward passes; None: it isn't known."""
    rate = head.figures.tried.get("float32")
    return None if rate is None else BACKWARD * images * epochs / rate


def offer(recipe: Recipe, head: FrozenHead, images: int, run: Path) -> str:
    """How to train all layers, and how long that takes, as a sentence."""
    seconds = epochs_s(head, images, EPOCHS)
    takes = "" if seconds is None else f" (about {duration(seconds)})"
    more = f"suanli train {run} --more-epochs {EPOCHS:g}"
    return f"finished: the head is trained, and {recipe.model} is as it was; to train all layers{takes}: {more}"
