"""What formats of boxes share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from suanli.core.console import plural
from suanli.data.file_names import normalise_name

Corners: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom
MAX_LABEL = 200  # characters


def parse_number(value: object) -> float:
    """A finite number, also one in a text. Raises ValueError."""
    if type(value) is float and math.isfinite(value):  # nearly always
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"has {_show(value)} where a number belongs")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (isinstance(value, str) and "_" in value):
        raise ValueError(f"has {_show(value)} where a number belongs")
    return number


def parse_numbers(values: object, count: int) -> list[float]:
    """So many finite numbers in a list. Raises ValueError."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise ValueError(f"has {_show(values)} where {count} numbers belong")
    return [parse_number(value) for value in values]


def parse_label(value: object) -> str:
    """The name of a class. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:g}" if isinstance(value, float) else str(value)
    label = normalise_name(value.strip()) if isinstance(value, str) else ""
    if not label or len(label) > MAX_LABEL or not label.isprintable():
        raise ValueError(f"has {_show(value)} where the name of a class belongs")
    return label


def enclose(points: Iterable[Sequence[float]]) -> Corners:
    """The box around points (x, y). Raises ValueError for none."""
    columns = list(zip(*points, strict=True))
    if len(columns) != 2:
        raise ValueError("has an outline without points")
    (x, y) = columns
    return min(x), min(y), max(x), max(y)


def enclose_rotated(x: float, y: float, width: float, height: float, degrees: float) -> Corners:
    """The upright box around a box with this centre that was rotated."""
    angle = math.radians(degrees)
    half_width = (abs(width * math.cos(angle)) + abs(height * math.sin(angle))) / 2
    half_height = (abs(width * math.sin(angle)) + abs(height * math.cos(angle))) / 2
    return x - half_width, y - half_height, x + half_width, y + half_height


def describe_thin(count: int) -> str:
    """A note on shapes without an area."""
    return plural(count, "point or line, which has no box, left out", "points or lines, which have no box, left out")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
