"""Chooses a shipped recipe for data, and applies a user's settings to a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from pydantic import ValidationError

from suanli.core.errors import DataError, UsageError, unknown
from suanli.core.registry import load, load_all
from suanli.core.types import Example, Json, Preprocess, Raw, Recipe, RecipeChoice, Source, Traits
from suanli.data.example_columns import ExampleColumns

MANY_SAMPLED = 20_000  # inputs that are stored by column
SAMPLED = 300  # inputs that are read before a recipe is chosen
NESTED = {name for name, field in Recipe.model_fields.items() if "dict" in str(field.annotation)}


def choose_by_traits(traits: Traits) -> Recipe:
    """The shipped recipe that suits best, for a task that learns from what the data carries. Raises UsageError if none
    suits, or several suit equally."""
    return find_choice(traits).recipe


def find_choice(traits: Traits) -> RecipeChoice:
    """As `choose_by_traits`, with all that is known of the recipe."""
    choices = list_recipes(traits.annotation)
    if not choices:
        raise UsageError(
            f"Nothing in suanli learns from targets of the kind {traits.annotation!r} yet.",
            fix="suanli prepare shows what is in the data.",
        )
    suitable = _find_suitable(choices, traits)
    if not suitable:
        raise UsageError(f"No shipped recipe suits {traits}.", fix="Name one with --recipe.")
    best = [name for name, score in suitable.items() if score == max(suitable.values())]
    if len(best) > 1:
        raise UsageError(f"{' and '.join(best)} suit {traits} equally.", fix="Name one of them with --recipe.")
    return choices[best[0]]


def has_choice(traits: Traits) -> bool:
    """Whether a shipped recipe suits the data."""
    return bool(_find_suitable(list_recipes(traits.annotation), traits))


def _find_suitable(choices: Mapping[str, RecipeChoice], traits: Traits) -> dict[str, int]:
    return {name: score for name, choice in choices.items() if (score := choice.suits(traits)) is not None}


def list_recipes(annotation: str) -> dict[str, RecipeChoice]:
    """The shipped recipes whose task learns from targets of this kind."""
    choices: dict[str, RecipeChoice] = load_all("recipes")
    return {
        name: choice for name, choice in choices.items() if load("tasks", choice.recipe.task).annotation == annotation
    }


def find_traits(source: Source, *, weights: bool, model: str | None, settings: Mapping[str, object]) -> Traits:
    """What is known of `source` and the training before a recipe is chosen; `settings` are those of preprocessing that
    the user gave: what given weights want of their inputs says nothing of the data."""
    kind = load("preprocess", source.kind)
    rows = ExampleColumns.of(source.examples)
    at = np.flatnonzero([split != "test" for split in rows.splits])
    order = at[np.random.default_rng(0).permutation(len(at))]
    if (block := rows.block) is not None:
        preprocess: Preprocess = kind.fit(lambda: block.take(order[:MANY_SAMPLED]), settings)
    else:
        preprocess = kind.fit(lambda: _read_inputs([rows[i] for i in order[:SAMPLED].tolist()]), settings)
    return Traits(
        kind=source.kind,
        annotation=source.annotation,
        input_shape=preprocess.input_shape,
        examples=len(source.examples),
        classes=len(source.classes),
        weights=weights,
        model=model,
    )


def _read_inputs(rows: Sequence[Example]) -> Iterator[Raw]:
    for row in rows:
        try:
            yield row.read()
        except (OSError, DataError):
            continue  # reported by the data check


def change(recipe: Recipe, changes: Mapping[str, Json]) -> Recipe:
    """A copy of `recipe` with fields replaced; "preprocess.size" replaces one entry of the mapping `preprocess`.

    A setting of the recipe's task, such as label_smoothing, is short for "task_args.label_smoothing". With another
    model, task or optimizer, the arguments of the old one are dropped; with another optimizer, `lr` becomes the new
    one's usual value. Raises UsageError for an unknown field (it suggests the nearest) or an impossible value.
    """
    values: dict[str, Json] = recipe.model_dump()
    for name in ("model", "task", "optimizer"):
        if changes.get(name, values[name]) != values[name]:
            values[f"{name}_args"] = {}
            if name == "optimizer":
                values["lr"] = load("optimizers", str(changes[name])).usual_lr
    of_task = load("tasks", str(changes.get("task", values["task"]))).setting_names()
    for name, value in changes.items():
        if name.startswith("columns."):
            name = f"preprocess.{name}"
        if name in of_task and name not in Recipe.model_fields:
            name = f"task_args.{name}"
        field, dot, entry = name.partition(".")
        if field not in Recipe.model_fields:
            raise unknown("recipe field", field, [*Recipe.model_fields, *of_task])
        if dot:
            if field not in NESTED:
                raise UsageError(f"{name!r} can't be set: {field!r} has no entries.", fix=f"Set {field} itself.")
            values[field] = {**values[field], entry: value}
        elif field in ("augment", "final_augment") and isinstance(value, str):
            values[field] = _split_augmentations(value)
        else:
            values[field] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        raise UsageError(
            f"The recipe field {name!r} can't be {first['input']!r}: {first['msg'].lower()}.",
            fix=f"A usual value is {getattr(recipe, str(first['loc'][0]))!r}.",
        ) from error


def _split_augmentations(text: str) -> list[str]:
    """The parts of "crop(padding=2),flip". Commas inside parentheses don't separate."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
