"""What a task shows in the report: tables, charts and matrices as plain values, which the report knows how to draw.

A task makes them of the figures in evaluation/<split>.json (`Task.sections`), so that a new task needs no line of the
report. Examples with their answers aren't sections: each has an `Answer`, whose kind says how to draw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Cell: TypeAlias = "str | float | int | None"  # None: not known
Format: TypeAlias = Literal["text", "count", "percent", "number"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Its last column gets bars where that is in percent."""

    title: str  # of a section; empty: it belongs to the one before, and stands beside it
    columns: tuple[str, ...]
    formats: tuple[Format, ...]  # of each column
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""  # one sentence below the title


@dataclass(frozen=True, kw_only=True)
class Line:
    label: str
    points: tuple[tuple[float, float], ...]
    weights: tuple[float, ...] = ()  # one a point: drawn as dots whose area grows with it; empty: a line
    is_joined: bool = False  # dots are joined by a line, too
    is_rule: bool = False  # drawn faintly: what a perfect model would give


@dataclass(frozen=True, kw_only=True)
class Plot:
    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_range: tuple[float | None, float | None] = (None, None)  # None: from the points
    y_range: tuple[float | None, float | None] = (None, None)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Counts of true against predicted."""

    title: str
    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # rows are true, columns predicted
    note: str = ""


Section: TypeAlias = Table | Plot | Matrix
