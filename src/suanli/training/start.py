"""What a new training starts from: the complete recipe, the prepared data, weights, and a head that fits them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from suanli.compute import planner
from suanli.core.console import plural, say
from suanli.core.errors import UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import Run, refuse_inside
from suanli.core.settings import parse_duration
from suanli.core.types import AnyPath, Device, Pretrained, Recipe
from suanli.data.cache import PreparedData
from suanli.models import weights
from suanli.parallel.group import Group
from suanli.training import budget, unfreezing
from suanli.training.frozen_head import FrozenHead
from suanli.training.given_weights import bring
from suanli.training.head_fitting import fit_for_all
from suanli.training.options import RecipeOptions
from suanli.training.prepare import DataOptions, choose_recipe, find_data, refuse_other_kind, resolve
from suanli.training.usual_weights import choose_weights


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a new training starts from."""

    data: DataOptions
    recipe: Recipe  # complete
    splits: PreparedData
    given: Pretrained | None  # the weights that the recipe names, where they were found here
    head: FrozenHead | None  # that the training begins with; None: a random one, or the run's own


def prepare_start(
    data: DataOptions,
    learned: RecipeOptions,
    *,
    device: Device,
    group: Group,
    threads: int | None,
    out: AnyPath | None,
    trust_code: bool,
    begun: Run | None,
) -> Start:
    """A collective, for a run in `out`. `begun` is that run, where another process has begun it."""
    started = time.perf_counter()
    refuse_inside(data.subject, out)
    time_budget, target = learned.time_budget, learned.target_accuracy
    budget.check_target(target)
    budget_s = None if time_budget is None else parse_duration(time_budget)
    found = find_data(data, recipe=learned.recipe, settings=learned.changes)
    given, chosen = choose_weights(found.traits, learned), learned.recipe
    fields: dict[str, object] = {}
    if given is not None:
        weights.announce(given)
        model = learned.changes.get("model", given.model)
        refuse_other_kind(found.source, given.fitted_preprocess, model)
        chosen = choose_recipe(found, chosen, weights=True)
        fields, preprocess = bring(given, chosen, learned.changes, kind=found.source.kind, trust_code=trust_code)
        data = replace(data, preprocess=preprocess)
    recipe, prepared = resolve(data, recipe=chosen, settings=learned.changes, brought=fields, found=found)
    if target is not None or budget_s is not None:
        _refuse_two_choices(recipe, learned.changes, target, budget_s)
    if target is not None:
        recipe = budget.choose_for_score(recipe, prepared, target)
    if begun is not None:
        if not begun.recipe.frozen_views:
            recipe = unfreezing.without_head(recipe)
        # A time budget chose its recipe when it began.
        recipe = recipe if budget_s is None else begun.recipe
        return Start(data=data, recipe=recipe, splits=prepared, given=given, head=None)
    cache, head = cache_dir_of(data.cache_dir), None
    if recipe.frozen_views:
        head = fit_for_all(group, recipe, prepared, device, cache, given=given, started=started)
        if head is None:
            recipe = unfreezing.without_head(recipe)
            say(f"all layers are trained from a new head, for {plural(recipe.epochs, 'epoch')}")
    if budget_s is not None:
        if group.is_first:
            left_s = budget_s - (time.perf_counter() - started)
            usual = partial(planner.short_list, threads=threads, cache=cache)
            recipe = budget.choose_for_time(recipe, prepared, device, usual, left_s, head)
        recipe = Recipe.model_validate(group.broadcast(recipe.model_dump(mode="json")))
    return Start(data=data, recipe=recipe, splits=prepared, given=given, head=head)


def keep_weights(run: Run, recipe: Recipe, given: Pretrained | None) -> None:
    """Write what is known of the weights that `run` starts from into it, without a place on this machine."""
    if recipe.weights is not None:
        run.write("weights.json", weights.describe(given or weights.find(recipe.weights)))


def _refuse_two_choices(
    recipe: Recipe, changes: Mapping[str, object], target_accuracy: float | None, budget_s: float | None
) -> None:
    if target_accuracy is not None and budget_s is not None:
        raise UsageError("--target-accuracy and --time-budget both choose the training.", fix="Give one of them.")
    fields = {name.partition(".")[0] for name in changes}
    if target_accuracy is not None and (fixed := fields - {"seed"}):
        raise UsageError(
            f"--target-accuracy takes a recipe as it was measured, so {', '.join(sorted(fixed))} can't be changed.",
            fix="Leave one or the other out, or use --time-budget.",
        )
    if chosen := fields & budget.budget_fields(recipe):
        raise UsageError(
            f"--time-budget chooses {', '.join(sorted(chosen))} itself.", fix="Leave one or the other out."
        )
