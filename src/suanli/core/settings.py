"""Reads what a user writes for settings and times, and applies settings to a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from suanli.core.errors import UsageError, unknown
from suanli.core.registry import load
from suanli.core.types import Json, Recipe

NESTED = {name for name, field in Recipe.model_fields.items() if "dict" in str(field.annotation)}


def parse_assignment(assignment: str) -> tuple[str, Json]:
    """("lr", 0.1) from "lr=0.1". The value is read as JSON; what isn't JSON is text. Raises UsageError."""
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set takes field=value, not {assignment!r}.", fix="For example: --set lr=0.01.")
    try:
        return name.strip(), json.loads(text)
    except ValueError:
        return name.strip(), text


_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_duration(text: str | float) -> float:
    """Seconds from "90", "90s", "5m", "1.5h" or a number. Raises UsageError for anything else, and for zero."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-z]*)\s*", str(text))
    if match is None or match[2] not in _SECONDS or not float(match[1]):
        raise UsageError(f"{text!r} is not a time.", fix="Write it like 90s, 5m or 1.5h.")
    return float(match[1]) * _SECONDS[match[2]]


def change(recipe: Recipe, changes: Mapping[str, Json]) -> Recipe:
    """A copy of `recipe` with fields replaced; "preprocess.size" replaces one entry of the mapping `preprocess`.

    With another model or optimizer, the arguments of the old one are dropped; with another optimizer, `lr` becomes the
    new one's usual value. Raises UsageError for an unknown field (it suggests the nearest) or an impossible value.
    """
    values: dict[str, Any] = recipe.model_dump()
    for name in ("model", "optimizer"):
        if changes.get(name, values[name]) != values[name]:
            values[f"{name}_args"] = {}
            if name == "optimizer":
                values["lr"] = load("optimizers", str(changes[name])).usual_lr
    for name, value in changes.items():
        field, dot, entry = name.partition(".")
        if field not in Recipe.model_fields:
            raise unknown("recipe field", field, Recipe.model_fields)
        if dot:
            if field not in NESTED:
                raise UsageError(f"{name!r} can't be set: {field!r} has no entries.", fix=f"Set {field} itself.")
            values[field] = {**values[field], entry: value}
        elif field == "augment" and isinstance(value, str):
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
