"""What an ablation runs: its plans, the steps of each block, the shortened recipe, and a survey of one training."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from suanli.compute.plan import PLAIN, plain_plan
from suanli.core.types import Plan, Recipe
from suanli.machine.timing import percentile
from suanli.training.setup import Setup
from suanli.training.timed_run import TimedRun

WARM_UP = 10  # steps at most; compiling and recording are over by then
SURVEY_STEPS = 3  # from which the time of all is estimated


def cumulative_plans(plan: Plan) -> list[tuple[str, Plan]]:
    """Names and plans from plain PyTorch to `plan`, each with one change more than the one before."""
    plans = [("plain PyTorch", Plan(device=plan.device, speedups=(), origin=PLAIN))]
    if plan.threads not in (None, torch.get_num_threads()):
        plans.append((f"+ threads={plan.threads}", replace(plans[-1][1], threads=plan.threads)))
    for name in plan.speedups:
        before = plans[-1][1]
        plans.append((f"+ {name}", replace(before, speedups=(*before.speedups, name), threads=plan.threads)))
    return plans


def divide_steps(steps: int, rounds: int) -> list[int]:
    """The steps of each block of a run: first the one that warms up, then the timed ones, whose numbers differ by at
    most one. They add up to `steps` >= 2; where these are few, there are fewer rounds."""
    rounds = min(rounds, steps - 1)
    warm_up = max(1, min(WARM_UP, steps // (rounds + 1)))
    each, more = divmod(steps - warm_up, rounds)
    return [warm_up, *(each + (number < more) for number in range(rounds))]


def shorten(recipe: Recipe, steps: int, steps_per_epoch: int) -> Recipe:
    """The recipe with a schedule of so many steps; warm-up, unfreezing and final epochs keep their shares, and nothing
    stops early."""
    epochs = steps / steps_per_epoch
    share = epochs / recipe.epochs if recipe.epochs else 0.0
    change = {
        "epochs": epochs,
        "warmup_epochs": recipe.warmup_epochs * share,
        "unfreeze_epochs": recipe.unfreeze_epochs * share,
        "final_epochs": recipe.final_epochs * share,
        "early_stop": None,
    }
    return recipe.model_copy(update=change)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is measured once, on a copy that plain PyTorch trains a few steps."""

    steps: int  # of the whole recipe
    steps_per_epoch: int
    batch_size: int
    step_s: float
    training_flops: float  # of an example
    evaluation_flops: float  # of an example


def survey(setup: Setup) -> Survey:
    plain = plain_plan(setup.device)
    loop = setup.trial(plain)
    order, steps = loop.order, loop.steps
    if steps < SURVEY_STEPS + 1:
        recipe = shorten(setup.recipe, SURVEY_STEPS + 1, order.steps_per_epoch)  # longer, in fact
        loop = with_recipe(setup, recipe).trial(plain)
    run = TimedRun(loop, setup.device)
    step_flops, batch_flops = run.count_flops()
    run.train(SURVEY_STEPS)
    return Survey(
        steps=steps,
        steps_per_epoch=order.steps_per_epoch,
        batch_size=order.batch_size,
        step_s=percentile(run.training.step_s, 0.5),
        training_flops=step_flops / order.batch_size,
        evaluation_flops=batch_flops / run.evaluation_batch,
    )


def with_recipe(setup: Setup, recipe: Recipe) -> Setup:
    """The same weights and splits under a recipe that differs in its schedule only."""
    other = copy.copy(setup)
    other.recipe = recipe
    return other
