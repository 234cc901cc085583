"""A waterfall as numbers: what each of several changes adds; `templates/charts.html` draws it.

Bars are horizontal, so that names of any length have a line of their own above and fit on a phone. The pale part of a
bar is what the step before it reached, the strong part what this one adds or loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suanli.reporting import words
from suanli.reporting.charts import Tick, ticks

WIDTH = 360
LEFT, RIGHT, BOTTOM = 4, 14, 36  # margins around the bars
ROW, BAR_TOP, BAR = 42, 17, 13  # a row; in it, where the bar begins and how high it is
LINE_LENGTH = 52  # characters of a name and a value together


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the waterfall. `value` None: not measured, so the next one builds on the one before."""

    name: str
    value: float | None
    half_iqr: float | None = None
    label: str = ""  # written at the right
    refused: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    name: str
    label: str
    top: float  # of its row
    kind: str  # "first" adds, "second" loses, "refused"
    pale: tuple[float, float] | None  # left edge and width
    strong: tuple[float, float] | None
    whisker: tuple[float, float] | None  # left and right end
    text: str


@dataclass(frozen=True, kw_only=True)
class Waterfall:
    title: str
    x_label: str
    height: float
    text: str
    ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...]


def waterfall(title: str, steps: Sequence[Step], *, x_label: str) -> Waterfall | None:
    """None where no step is measured."""
    most = max((value + _half(one) for one in steps if (value := _value(one)) is not None), default=0.0)
    if most <= 1e-100:  # nothing, or so little that a scale would overflow
        return None
    marks = ticks(0.0, most)
    scale = (WIDTH - LEFT - RIGHT) / marks[-1]
    bars, base = [], 0.0
    for number, step in enumerate(steps):
        bars.append(_bar(step, base, scale, number * ROW))
        value = _value(step)
        base = base if value is None else value
    return Waterfall(
        title=title,
        x_label=x_label,
        height=len(steps) * ROW + BOTTOM,
        text=". ".join([title, *(bar.text for bar in bars)]),
        ticks=tuple(
            Tick(at=_place(mark, scale), label=words.number(mark) if most < 1e5 else words.si(mark)) for mark in marks
        ),
        bars=tuple(bars),
    )


def _bar(step: Step, base: float, scale: float, top: float) -> Bar:
    value, half = _value(step), _half(step)
    kind = "refused" if step.refused else "first" if value is None or value >= base else "second"
    room = max(8, LINE_LENGTH - len(step.label))
    name = step.name if len(step.name) <= room else step.name[: room - 1] + "…"
    pale = strong = whisker = None
    if value is not None:
        low, high = min(base, value), max(base, value)
        pale, strong = _edge(0.0, low, scale), _edge(low, high, scale)
        whisker = (_place(max(0.0, value - half), scale), _place(value + half, scale)) if half else None
    text = f"{step.name}: {step.label}"
    return Bar(name=name, label=step.label, top=top, kind=kind, pale=pale, strong=strong, whisker=whisker, text=text)


def _value(step: Step) -> float | None:
    return step.value if words.is_known(step.value) and step.value >= 0 else None


def _half(step: Step) -> float:
    return step.half_iqr if words.is_known(step.half_iqr) and step.half_iqr > 0 else 0.0


def _place(value: float, scale: float) -> float:
    return round(LEFT + value * scale, 1)


def _edge(low: float, high: float, scale: float) -> tuple[float, float]:
    return _place(low, scale), round((high - low) * scale, 1)
