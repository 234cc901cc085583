"""A comparison as text for the terminal and as one offline HTML page in the style of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.reporting import charts, words
from suanli.reporting.charts import Chart, Series, chart, thin
from suanli.reporting.comparison import Change, Comparison, Cost, Score
from suanli.reporting.page import templates
from suanli.reporting.text_chart import TextChart
from suanli.reporting.views import SPLIT_NAMES

if TYPE_CHECKING:
    from rich.console import Group

COLOURS = ("first", "second", "third", "fourth", "fifth", "sixth")
LISTED = 10  # entries of a value that is a list, such as the classes
FEW_POINTS = 40  # of a curve: each gets a dot
COSTS: tuple[tuple[str, Callable[[Cost], str]], ...] = (
    ("training", lambda one: words.seconds(one.train_seconds)),
    ("examples per second", lambda one: words.number(one.examples_per_s)),
    ("parameters", lambda one: words.number(one.parameters)),
    ("model size", lambda one: words.memory(one.model_bytes)),
    ("engine", lambda one: one.engine or words.UNKNOWN),
    ("latency of one example", lambda one: words.span(one.engine_latency_s)),
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A row a field, a column a run; cells may have a second, smaller line."""

    title: str
    heading: str  # of the first column
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    has_numbers: bool


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    parts = [Path(path).parts or (path,) for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def score_tables(one: Comparison) -> list[Table]:
    """The scores, and how they differ from the first run's."""
    names = short_names(one.runs)
    found = []
    if one.scores:
        split = SPLIT_NAMES[one.split or "test"].lower()
        rows = [(_title(score, one), _score_cells(score)) for score in one.scores]
        found.append(Table(title=f"Scores, {split} split", heading="score", columns=names, rows=rows, has_numbers=True))
    known = {name for change in one.changes for name in change.changes}
    if known:
        rows = [(_title(s, one), [_change_cell(s, c) for c in one.changes]) for s in one.scores if s.name in known]
        columns = [f"{name} ({'paired' if c.paired else 'unpaired'})" for name, c in _after(names, one.changes)]
        title = f"Differences from {names[0]}"
        found.append(Table(title=title, heading="score", columns=columns, rows=rows, has_numbers=True))
    return found


def other_tables(one: Comparison) -> list[Table]:
    """Cost, and what differs in recipe, data, plan and machine."""
    names = short_names(one.runs)
    rows = [(title, [(show(cost), "") for cost in one.costs]) for title, show in COSTS]
    rows = [row for row in rows if any(cell != (words.UNKNOWN, "") for cell in row[1])]
    found = [Table(title="Cost", heading="", columns=names, rows=rows, has_numbers=True)]
    for part, differing in one.differences.items():
        rows = [(row.name, [(_plain(value), "") for value in row.values]) for row in differing]
        title = f"{part.capitalize()}: what differs"
        found.append(Table(title=title, heading="field", columns=names, rows=rows, has_numbers=False))
    return [table for table in found if table.rows]


def _after(names: Sequence[str], changes: Sequence[Change]) -> list[tuple[str, Change]]:
    return list(zip(names[1:], changes, strict=False))  # none, where not all runs are evaluated


def _title(score: Score, one: Comparison) -> str:
    primary = " (primary)" if score.name == one.metric else ""
    unit = f", {score.unit}" if score.unit not in (words.FRACTION, "") else ""
    return f"{words.with_spaces(score.name)}{unit}{primary}"


def _score_cells(score: Score) -> list[tuple[str, str]]:
    unit = score.unit if score.unit == words.FRACTION else ""
    return [
        (words.score(value, unit), words.interval(bounds, unit))
        for value, bounds in zip(score.values, score.intervals, strict=True)
    ]


def _change_cell(score: Score, change: Change) -> tuple[str, str]:
    if (values := change.changes.get(score.name)) is None:
        return words.UNKNOWN, ""
    measured, low, high = (words.change(value, score.unit) for value in values)
    unit = " points" if score.unit == words.FRACTION else ""
    return f"{measured}{unit}", f"{low} to {high}"


def _plain(value: object) -> str:
    if not isinstance(value, list | tuple):
        return words.plain(value)
    more = f", … ({len(value):,})" if len(value) > LISTED else ""
    return ", ".join(map(words.plain, value[:LISTED])) + more or "none"


def sentences(one: Comparison) -> list[str]:
    """What the differences mean."""
    names, found = short_names(one.runs), list(one.remarks)
    primary = next((score for score in one.scores if score.name == one.metric), None)
    for name, change in _after(names, one.changes):
        if primary is not None and change.verdict:
            text, bounds = _change_cell(primary, change)
            verdict = {"no clear difference": "does not differ clearly from"}.get(
                change.verdict, f"is {change.verdict} than"
            )
            title = words.with_spaces(primary.name)
            found.append(f"{name} {verdict} {names[0]}: {title} {text} (95 % interval {bounds}).")
        if not change.paired:
            found.append(f"The difference of {name} is unpaired: {change.note}.")
        elif change.note:
            found.append(f"{name}: {change.note}.")
    if one.changes:
        found.append("Intervals cover the choice of examples, not the randomness of training, which other seeds show.")
    return found


def curves(one: Comparison) -> list[Chart]:
    names = short_names(one.runs)
    metric = one.validation_metric
    unit = metric.unit if metric else ""
    is_share = unit == words.FRACTION

    def lines(field: str) -> list[Series]:
        return [
            Series(
                label=name,
                points=thin(getattr(curve, field)),
                colour=COLOURS[i % len(COLOURS)],
                dots=len(getattr(curve, field)) <= FEW_POINTS,
            )
            for i, (name, curve) in enumerate(zip(names, one.curves, strict=True))
        ]

    found = [
        chart("Training loss", lines("loss"), x_label="epoch", x_range=(0.0, None), y_range=(0.0, None)),
        chart(
            _validation_title(one),
            lines("validation"),
            x_label="epoch",
            x_range=(0.0, None),
            show=words.percent if is_share else None,
            y_label="" if is_share else unit,
        ),
    ]
    return [drawn for drawn in found if drawn is not None]


def _validation_title(one: Comparison) -> str:
    return f"Validation {words.with_spaces(one.validation_metric.name if one.validation_metric else 'score')}"


def render(one: Comparison) -> str:
    """The HTML page."""
    names = short_names(one.runs)
    return (
        templates()
        .get_template("compare.html")
        .render(
            names=names,
            paths=one.runs,
            sentences=sentences(one),
            score_tables=score_tables(one),
            other_tables=other_tables(one),
            curves=curves(one),
            frame=charts,
        )
    )


def text(one: Comparison) -> Group:
    """For the terminal."""
    from rich.console import Group
    from rich.table import Table as Rich
    from rich.text import Text

    parts: list[Text | Rich | TextChart] = [Text(sentence) for sentence in sentences(one)]
    for table in (*score_tables(one), *other_tables(one)):
        parts.append(Text(f"\n{table.title}", style="bold"))
        rows = Rich(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        rows.add_column(table.heading, overflow="fold")
        for column in table.columns:
            rows.add_column(column, justify="right" if table.has_numbers else "left", overflow="fold")
        for name, cells in table.rows:
            rows.add_row(name, *(Text(f"{first} ({second})" if second else first) for first, second in cells))
        parts.append(rows)
    if (metric := one.validation_metric) is not None and any(curve.validation for curve in one.curves):
        parts.append(Text(f"\n{_validation_title(one)}", style="bold"))
        parts.append(
            TextChart(
                curves=list(zip(short_names(one.runs), (curve.validation for curve in one.curves), strict=True)),
                x_label="epoch",
                show=lambda value: words.score(value, metric.unit),
                best=max if metric.higher_is_better else min,
            )
        )
    return Group(*parts)
