"""Line charts as numbers: where each axis tick, line and dot lies; `templates/charts.html` draws them.

Why not a plotting library: the page has a light and a dark mode, a phone and a printer. SVG that takes
its colours and fonts from the page's own style sheet serves all four, is a few kilobytes, and needs
no fonts, global settings or lock here. It draws lines and dots over numeric axes, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 36  # margins around the plot
POINTS = 240  # more than the eye can tell apart at this width

Point = tuple[float, float]
Range = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `colour` is a class of the style sheet; `radii` makes dots of those sizes."""

    label: str
    points: Sequence[Point]
    colour: str = "first"
    dots: bool = False
    radii: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Dot:
    x: float
    y: float
    radius: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Line:
    label: str
    colour: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, kw_only=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing of WIDTH x HEIGHT units, y downwards. `text` tells what it shows without seeing it."""

    title: str
    x_label: str
    text: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


def chart(
    title: str,
    series: Iterable[Series],
    *,
    x_label: str,
    x_range: Range = (None, None),
    y_range: Range = (None, None),
    show: Callable[[float], str] | None = None,
) -> Chart | None:
    """None where no series has a finite point. A bound of None is that of the points; `show` writes a
    y value."""
    drawn = [one for one in series if any(map(_finite, one.points))]
    finite = [point for one in drawn for point in one.points if _finite(point)]
    if not finite:
        return None
    x_low, x_high = _bounds(x_range, [x for x, _ in finite])
    x_values = ticks(x_low, x_high)
    y_values = ticks(*_bounds(y_range, [y for _, y in finite]))
    to_x = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    to_y = _scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
    written = show or _writer(y_values)
    return Chart(
        title=title,
        x_label=x_label,
        text=". ".join([title, *(_told(one, show or _short) for one in drawn)]),
        x_ticks=tuple(Tick(at=to_x(x), label=_writer(x_values)(x)) for x in x_values if x_low <= x <= x_high),
        y_ticks=tuple(Tick(at=to_y(y), label=written(y)) for y in y_values),
        lines=tuple(_line(one, to_x, to_y, show or _short, x_label) for one in drawn),
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values whose first is at most `low` and whose last is at least `high`."""
    if not high > low:
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` points: means of equally many neighbours, non-finite values left out."""
    if len(points) <= limit:
        return list(points)
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    groups = ([p for p in points[a:b] if _finite(p)] for a, b in pairwise(edges))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups if g]


def _bounds(given: Range, values: Sequence[float]) -> Point:
    low, high = given
    return (min(values) if low is None else low), (max(values) if high is None else high)


def _finite(point: Point) -> bool:
    return all(abs(value) < 1e100 for value in point)  # False for NaN; beyond, axes would overflow


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = high - low
    if span == 0:
        return lambda _: (start + stop) / 2
    return lambda value: round(start + (value - low) / span * (stop - start), 1)


def _writer(values: Sequence[float]) -> Callable[[float], str]:
    """Writes all of `values` with the same number of decimals."""
    step = abs(values[1] - values[0])
    if not 1e-4 <= step < 1e5:
        return lambda value: f"{value:.3g}" if value else "0"
    decimals = next((d for d in range(6) if abs(step - round(step, d)) < step * 1e-6), 6)
    return lambda value: f"{value + 0.0:,.{decimals}f}"


def _short(value: float) -> str:
    return f"{value:.4g}"


def _told(one: Series, show: Callable[[float], str]) -> str:
    finite = [y for x, y in one.points if _finite((x, y))]
    return f"{one.label}: from {show(finite[0])} to {show(finite[-1])}"


def _line(
    one: Series,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    show: Callable[[float], str],
    x_label: str,
) -> Line:
    path, pen = [], "M"
    for x, y in one.points:
        if not _finite((x, y)):  # a gap
            pen = "M"
            continue
        path.append(f"{pen}{to_x(x):g} {to_y(y):g}")
        pen = "L"
    radii = one.radii or ([3.0] * len(one.points) if one.dots else [])
    dots = tuple(
        Dot(x=to_x(x), y=to_y(y), radius=radius, text=f"{one.label}: {show(y)} at {x_label} {x:.4g}")
        for (x, y), radius in zip(one.points, radii, strict=False)
        if _finite((x, y))
    )
    return Line(label=one.label, colour=one.colour, path="".join(path), dots=dots)
