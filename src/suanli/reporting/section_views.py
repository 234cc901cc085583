"""The sections that a task gives for its figures (`core/sections.py`), as cells, bars and charts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from suanli.core.sections import Cell, Format, Line, Matrix, Plot, Section, Table
from suanli.reporting import words
from suanli.reporting.charts import Chart, Series, chart

COLOURS = ("first", "second", "third")
FEW_DOTS = 40  # of which each can be large


@dataclass(frozen=True, kw_only=True)
class TableView:
    columns: list[tuple[str, bool]]  # and whether it holds numbers
    rows: list[list[str]]
    bars: list[float]  # 0 to 1, one a row; empty: none


@dataclass(frozen=True, kw_only=True)
class HeatCell:
    count: int
    right: bool
    strength: float  # 0 to 1: root of the share of the row's true class, so that few are visible too
    text: str


@dataclass(frozen=True, kw_only=True)
class SectionView:
    """Exactly one of the three is drawn."""

    title: str
    note: str
    table: TableView | None = None
    heat_map: list[tuple[str, list[HeatCell]]] | None = None  # rows of true classes, cells of predicted ones
    chart: Chart | None = None


def section_views(sections: Iterable[Section]) -> list[list[SectionView]]:
    """Sections that stand beside one another are in one list."""
    groups: list[list[SectionView]] = []
    for section in sections:
        view = _view(section)
        if view is None:
            continue
        if view.title or not groups:
            groups.append([])
        groups[-1].append(view)
    return groups


def _view(section: Section) -> SectionView | None:
    """None: there is nothing to draw."""
    title, note = section.title, section.note
    if isinstance(section, Table):
        return SectionView(title=title, note=note, table=_table(section)) if section.rows else None
    if isinstance(section, Matrix):
        return SectionView(title=title, note=note, heat_map=_heat_map(section))
    drawn = _plot(section)
    return None if drawn is None else SectionView(title=title, note=note, chart=drawn)


def _table(table: Table) -> TableView:
    barred = table.formats[-1] == "percent"
    return TableView(
        columns=[(name, form != "text") for name, form in zip(table.columns, table.formats, strict=True)],
        rows=[[_format(cell, form) for cell, form in zip(row, table.formats, strict=True)] for row in table.rows],
        bars=[words.bar_length(row[-1] if isinstance(row[-1], float | int) else None) for row in table.rows]
        if barred
        else [],
    )


def _format(cell: Cell, form: Format) -> str:
    if isinstance(cell, str):
        return cell
    return words.percent(cell) if form == "percent" else words.number(cell)


def _heat_map(matrix: Matrix) -> list[tuple[str, list[HeatCell]]]:
    rows = []
    for i, (true, counts) in enumerate(zip(matrix.names, matrix.counts, strict=True)):
        total = sum(counts) or 1
        cells = [
            HeatCell(
                count=n,
                right=i == j,
                strength=round(math.sqrt(max(n, 0) / total), 3),
                text=f"{words.count(n, 'input')} of {true} predicted as {predicted} ({words.percent(n / total)})",
            )
            for j, (predicted, n) in enumerate(zip(matrix.names, counts, strict=True))
        ]
        rows.append((true, cells))
    return rows


def _plot(plot: Plot) -> Chart | None:
    colours = iter(COLOURS * len(plot.lines))
    return chart(
        plot.title,
        [_series(line, "rule-line" if line.is_rule else next(colours)) for line in plot.lines],
        x_label=plot.x_label,
        x_range=plot.x_range,
        y_range=plot.y_range,
    )


def _series(line: Line, colour: str) -> Series:
    most = max(line.weights, default=0) or 1
    room = 4 if len(line.weights) <= FEW_DOTS else 0.5
    return Series(
        label=line.label,
        points=line.points,
        colour=colour,
        radii=[2 + room * math.sqrt(max(weight, 0) / most) for weight in line.weights],
        line=line.is_joined or not line.weights,
    )
