"""The charts of scaling: what was measured of a few processes, and the curves that are expected of many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from suanli.reporting import words
from suanli.reporting.charts import Chart, Point, Series, chart
from suanli.reporting.scaling_records import Expectations, Expected, Scaling, Size

KINDS = ("fixed batch", "fixed share")


def drawn(scaling: Scaling) -> list[Chart]:
    """None for a training, whose two points are told by its tables."""
    if scaling.as_trained:
        return []
    found = [_here(scaling)]
    if scaling.expected is not None:
        found += [_rates(scaling, scaling.expected), _efficiencies(scaling, scaling.expected)]
    return [one for one in found if one is not None]


def _here(scaling: Scaling) -> Chart | None:
    measured = [(_x(size.processes), _y(size.images_per_s.median)) for size in scaling.sizes]
    expected = (
        [(_x(one.processes), _y(one.images_per_s)) for one in scaling.expected.checked] if scaling.expected else []
    )
    return chart(
        "Measured here, and expected there",
        [
            Series(label="expected", colour="second", points=expected, radii=[4.5] * len(expected), line=False),
            Series(label="measured", colour="first", points=measured, dots=True),
        ],
        x_label="processes",
        y_range=(0.0, None),
        y_label="images per second",
        log="x",
    )


def _rates(scaling: Scaling, expected: Expectations) -> Chart | None:
    first = expected.strong[0] if expected.strong else Expected()
    curves = [*expected.strong, *expected.weak]
    ends = [_x(one.processes) for one in curves]
    rate = _y(first.images_per_s)
    ideal = [(n, rate * n) for n in (1.0, max(ends, default=1.0))]
    return chart(
        "Images per second",
        [
            Series(label="without loss", colour="rule-line", points=ideal),
            *_curves(expected, lambda one: one.images_per_s),
            _dots(_alike(scaling, expected), lambda one: one.images_per_s.median),
        ],
        x_label="processes",
        show=words.si,
        log="xy",
    )


def _efficiencies(scaling: Scaling, expected: Expectations) -> Chart | None:
    # On one CPU the measured efficiency is against all of its cores, and the expected one against cores of its own.
    measured = [] if scaling.shared else _alike(scaling, expected)
    return chart(
        "Efficiency",
        [*_curves(expected, lambda one: one.efficiency), _dots(measured, lambda one: one.efficiency)],
        x_label="processes",
        y_range=(0.0, 1.0),
        show=lambda value: words.percent(value, 0),
        log="x",
    )


def _curves(expected: Expectations, value: Callable[[Expected], float | None]) -> list[Series]:
    def line(label: str, colour: str, curve: Sequence[Expected]) -> Series:
        points: list[Point] = [(_x(one.processes), _y(value(one))) for one in curve]
        return Series(label=label, colour=colour, points=points)

    return [line(KINDS[0], "first", expected.strong), line(KINDS[1], "second", expected.weak)]


def _dots(found: Sequence[Size], value: Callable[[Size], float | None]) -> Series:
    points = [(_x(one.processes), _y(value(one))) for one in found]
    return Series(label="measured", colour="third", points=points, radii=[3.5] * len(points), line=False)


def _alike(scaling: Scaling, expected: Expectations) -> list[Size]:
    """Those measured whose processes have what those expected have."""
    return [size for size in scaling.sizes if not scaling.shared or size.threads == expected.threads]


def _x(value: int | None) -> float:
    return math.nan if value is None else float(value)


def _y(value: float | None) -> float:
    return math.nan if value is None else value
