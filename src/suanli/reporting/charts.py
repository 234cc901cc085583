"""Charts as numbers: where each axis tick, line and dot lies; `templates/charts.html` draws them.

Why not a plotting library: the page has a light and a dark mode, a phone and a printer. SVG that takes
its colours and fonts from the page's own style sheet serves all four, is a few kilobytes, and needs
no fonts, global settings or lock here. It draws lines and dots over numeric axes, linear or logarithmic;
`bars.py` draws bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 36  # margins around the plot; at the left "100.0 %" must fit
LETTER = 7  # the width of one in a mark
POINTS = 240  # more than the eye can tell apart at this width

Point = tuple[float, float]
Range = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `colour` is a class of the style sheet; `radii` makes dots of those sizes, `texts` describes each of
    them, `marks` is written beside it."""

    label: str
    points: Sequence[Point]
    colour: str = "first"
    dots: bool = False
    radii: Sequence[float] = ()
    texts: Sequence[str] = ()
    marks: Sequence[str] = ()
    line: bool = True


@dataclass(frozen=True, kw_only=True)
class Dot:
    x: float
    y: float
    radius: float
    text: str
    mark: str = ""
    mark_x: float = 0.0
    mark_y: float = 0.0


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
    """A drawing of WIDTH x HEIGHT units, y downwards. `text` describes it to people who can't see it."""

    title: str
    x_label: str
    y_label: str
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
    y_label: str = "",
    y_most: float = math.inf,
    log: str = "",
) -> Chart | None:
    """None where no series has a point that can be drawn. A bound of None is that of the points; `show` writes values
    of y, and no tick is above `y_most`, the largest that there can be. `log` names the axes that are logarithmic ("x",
    "xy"): what isn't positive has no place there."""
    usable = _usable(log)
    visible = [one for one in series if any(map(usable, one.points))]
    finite = [point for one in visible for point in one.points if usable(point)]
    if not finite:
        return None
    x_low, x_high = _bounds(x_range, [x for x, _ in finite])
    y_low, y_high = _bounds(y_range, [y for _, y in finite])
    x_values = decades(x_low, x_high) if "x" in log else ticks(x_low, x_high)
    y_values = decades(y_low, y_high) if "y" in log else ticks(y_low, y_high)
    y_values = [y for y in y_values if y <= y_most * (1 + 1e-9)] or y_values
    if "y" not in log:
        y_low, y_high = y_values[0], y_values[-1]
    to_x = (_log_scale if "x" in log else _scale)(x_low, x_high, LEFT, WIDTH - RIGHT)
    to_y = (_log_scale if "y" in log else _scale)(y_low, y_high, HEIGHT - BOTTOM, TOP)
    write_y = show or (_short if "y" in log else _writer(y_values))
    write_x = _short if "x" in log else _writer(x_values)
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        text=". ".join([title, *(_describe(one, show or _short, usable) for one in visible)]),
        x_ticks=tuple(Tick(at=to_x(x), label=write_x(x)) for x in x_values if x_low <= x <= x_high),
        y_ticks=tuple(Tick(at=to_y(y), label=write_y(y)) for y in y_values),
        lines=_place_marks([_line(one, to_x, to_y, show or _short, x_label, usable) for one in visible]),
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


def decades(low: float, high: float) -> list[float]:
    """Round values between two positive bounds: 1, 2 and 5 times powers of ten where these are few, else at
    most seven powers. Empty where none lies between."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    times = (1, 2, 5) if last - first <= 2 else (1,)
    stride = max(1, math.ceil((last - first) / 6))
    return [v for p in range(first, last + 1, stride) for t in times if low <= (v := t * 10.0**p) <= high]


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` points: means of equally many neighbours, non-finite values left out."""
    if len(points) <= limit:
        return list(points)
    edges, usable = [round(i * len(points) / limit) for i in range(limit + 1)], _usable("")
    groups = ([p for p in points[a:b] if usable(p)] for a, b in pairwise(edges))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups if g]


def _bounds(bounds: Range, values: Sequence[float]) -> Point:
    low, high = bounds
    return (min(values) if low is None else low), (max(values) if high is None else high)


def _usable(log: str) -> Callable[[Point], bool]:
    """Whether a point has a place: False for NaN; beyond these bounds, axes would overflow."""
    x_least, y_least = (1e-100 if axis in log else -1e100 for axis in "xy")
    return lambda point: x_least < point[0] < 1e100 and y_least < point[1] < 1e100


def _log_scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    linear = _scale(math.log10(low), math.log10(high), start, stop)
    return lambda value: linear(math.log10(value))


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


def _describe(one: Series, show: Callable[[float], str], usable: Callable[[Point], bool]) -> str:
    values = [y for x, y in one.points if usable((x, y))]
    if not one.line:
        return f"{one.label}: {len(values)} between {show(min(values))} and {show(max(values))}"
    return f"{one.label}: from {show(values[0])} to {show(values[-1])}"


def _line(
    one: Series,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    show: Callable[[float], str],
    x_label: str,
    usable: Callable[[Point], bool],
) -> Line:
    path, pen = [], "M"
    for x, y in one.points if one.line else ():
        if not usable((x, y)):  # a gap
            pen = "M"
            continue
        path.append(f"{pen}{to_x(x):g} {to_y(y):g}")
        pen = "L"
    alone = sum(map(usable, one.points)) == 1  # a path through one point draws nothing
    radii = one.radii or ([3.0] * len(one.points) if one.dots or alone else [])
    texts = one.texts or [f"{one.label}: {show(y)} at {x_label} {x:.4g}" for x, y in one.points]
    marks = one.marks or [""] * len(one.points)
    dots = tuple(
        Dot(x=to_x(x), y=to_y(y), radius=radius, text=text, mark=mark)
        for (x, y), radius, text, mark in zip(one.points, radii, texts, marks, strict=False)
        if usable((x, y))
    )
    return Line(label=one.label, colour=one.colour, path="".join(path), dots=dots)


@dataclass(frozen=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def hides(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def _place_marks(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lines with each mark on the side of its dot where it hides nothing, and without the marks that would hide
    another one. Later lines are drawn on top, so their marks come first."""
    dots = [_Box(d.x - d.radius, d.x + d.radius, d.y - d.radius, d.y + d.radius) for line in lines for d in line.dots]
    taken: list[_Box] = []
    finished = []
    for line in reversed(lines):
        placed = []
        for dot in line.dots:
            free = [box for box in _sides(dot) if dot.mark and not any(map(box.hides, taken))]
            box = next((box for box in free if not any(map(box.hides, dots))), free[0] if free else None)
            if box is None:
                placed.append(replace(dot, mark=""))
            else:
                taken.append(box)
                placed.append(replace(dot, mark_x=round(box.left, 1), mark_y=round(box.bottom, 1)))
        finished.append(replace(line, dots=tuple(placed)))
    return tuple(reversed(finished))


def _sides(dot: Dot) -> list[_Box]:
    """Places for the mark of a dot: right, above, below, left, diagonally above, as far as they are in the frame."""
    wide, high, away = LETTER * len(dot.mark), 8, dot.radius + 2
    corners = [
        (dot.x + away, dot.y + high / 2),
        (dot.x - wide / 2, dot.y - away),
        (dot.x - wide / 2, dot.y + away + high),
        (dot.x - away - wide, dot.y + high / 2),
        (dot.x + away, dot.y - away),  # in a corner of the frame no other is free
        (dot.x - away - wide, dot.y - away),
    ]
    boxes = [_Box(left, left + wide, bottom - high, bottom) for left, bottom in corners]
    return [box for box in boxes if box.left >= LEFT and box.right <= WIDTH and box.bottom <= HEIGHT - BOTTOM]
