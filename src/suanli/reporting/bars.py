"""A waterfall as numbers: what each step of a ladder adds; `templates/charts.html` draws it.

Bars lie, so that names of any length have their own line above and a phone shows them as well. The pale
part of a bar is what the step before it reached, the strong part what this one adds or loses.
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
class Rung:
    """One step of the ladder. `value` None: not measured, so the next one builds on the one before."""

    name: str
    value: float | None
    half_iqr: float | None = None
    said: str = ""  # written at the right
    refused: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    name: str
    said: str
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


def waterfall(title: str, rungs: Sequence[Rung], *, x_label: str) -> Waterfall | None:
    """None where no rung is measured."""
    most = max((value + _half(one) for one in rungs if (value := _value(one)) is not None), default=0.0)
    if most <= 1e-100:  # nothing, or so little that a scale would overflow
        return None
    marks = ticks(0.0, most)
    scale = (WIDTH - LEFT - RIGHT) / marks[-1]
    bars, base = [], 0.0
    for number, rung in enumerate(rungs):
        bars.append(_bar(rung, base, scale, number * ROW))
        value = _value(rung)
        base = base if value is None else value
    return Waterfall(
        title=title,
        x_label=x_label,
        height=len(rungs) * ROW + BOTTOM,
        text=". ".join([title, *(bar.text for bar in bars)]),
        ticks=tuple(
            Tick(at=_place(mark, scale), label=words.number(mark) if most < 1e5 else words.si(mark)) for mark in marks
        ),
        bars=tuple(bars),
    )


def _bar(rung: Rung, base: float, scale: float, top: float) -> Bar:
    value, half = _value(rung), _half(rung)
    kind = "refused" if rung.refused else "first" if value is None or value >= base else "second"
    room = max(8, LINE_LENGTH - len(rung.said))
    name = rung.name if len(rung.name) <= room else rung.name[: room - 1] + "…"
    pale = strong = whisker = None
    if value is not None:
        low, high = min(base, value), max(base, value)
        pale, strong = _edge(0.0, low, scale), _edge(low, high, scale)
        whisker = (_place(max(0.0, value - half), scale), _place(value + half, scale)) if half else None
    text = f"{rung.name}: {rung.said}"
    return Bar(name=name, said=rung.said, top=top, kind=kind, pale=pale, strong=strong, whisker=whisker, text=text)


def _value(rung: Rung) -> float | None:
    return rung.value if words.known(rung.value) and rung.value >= 0 else None


def _half(rung: Rung) -> float:
    return rung.half_iqr if words.known(rung.half_iqr) and rung.half_iqr > 0 else 0.0


def _place(value: float, scale: float) -> float:
    return round(LEFT + value * scale, 1)


def _edge(low: float, high: float, scale: float) -> tuple[float, float]:
    return _place(low, scale), round((high - low) * scale, 1)
