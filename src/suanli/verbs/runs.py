"""runs: which runs there are, and how each did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core.errors import DataError, unknown
from suanli.core.run import RUNS
from suanli.core.types import AnyPath
from suanli.reporting import words
from suanli.reporting.overview import ORDERS, RunOverview, find_runs, read_overview, sort_overviews

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table


def runs(*folders: AnyPath, sort: str = "time") -> list[RunOverview]:
    """The runs in these folders (`runs/` if none is given) and at most three levels below: data, task, model, primary
    score, training time and state of each.

    `sort` is "time" (the newest first), "name", "score" (the best first, for each data set and metric) or "training"
    (the shortest first). A run with damaged files is in the list as "broken". Raises DataError for a folder that isn't
    there.
    """
    if sort not in ORDERS:
        raise unknown("order", sort, ORDERS)
    paths = [Path(folder).expanduser() for folder in folders] or [RUNS]
    for path in paths:
        if not path.is_dir():
            fix = "Name another folder." if folders else "Name the folder that has them, or train: suanli train digits."
            raise DataError(f"There is no folder {path}.", fix=fix)
    return sort_overviews([read_overview(path) for path in find_runs(paths)], sort)


def table(overviews: Sequence[RunOverview]) -> RenderableType:
    """For people: a line for each run."""
    from rich.console import Group
    from rich.text import Text

    if not overviews:
        return "There are no runs here. To make one: suanli train DATA."
    titles = ["run", "data", "task", "model", "score", "training", "state"]
    if len({one.task for one in overviews}) == 1:
        titles.remove("task")  # it says nothing, and a terminal is narrow
    less = [title for title in titles if title != "task"]
    tables = [_rows(overviews, titles), _rows(overviews, less), _rows(overviews, less, intervals=False)]
    broken = [Text(f"{one.path}: {one.problem}") for one in overviews if one.problem]
    return Group(_FirstThatFits(tables), *([Text(), *broken] if broken else []))


def _rows(overviews: Sequence[RunOverview], titles: Sequence[str], *, intervals: bool = True) -> Table:
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        rows.add_column(title, justify="right" if title == "training" else "left", overflow="fold")
    for one in overviews:
        model = f"{one.model}, frozen" if one.frozen else one.model
        cells = {"run": one.path, "data": one.data, "task": one.task, "model": model}
        cells |= {"score": _score(one, intervals), "training": _training(one), "state": _state(one)}
        rows.add_row(*(Text(str(cells[title] or words.UNKNOWN)) for title in titles))
    return rows


class _FirstThatFits:
    """Prints the first of some tables whose lines are no longer than those of the terminal, or the last one."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        def fits(table: Table) -> bool:
            return console.measure(table, options=options.update(max_width=10_000)).maximum <= options.max_width

        yield next(filter(fits, self.tables), self.tables[-1])


def _score(one: RunOverview, interval: bool) -> str:
    if one.score is None or one.metric is None or one.unit is None:
        return ""
    bounds = words.interval(one.interval, one.unit).replace(f"{words.SPACE}%", "") if interval else ""
    name = words.with_spaces(one.metric)
    text = f"{name} {words.score(one.score, one.unit)}{f' ({bounds})' if bounds else ''}"
    text = text if one.split == "test" else f"{text}, {'validation' if interval else 'val'}"
    return f"{text}, contaminated" if one.contaminated else text


def _training(one: RunOverview) -> str:
    return "" if one.train_seconds is None else words.seconds(one.train_seconds)


def _state(one: RunOverview) -> str:
    state = "bench" if one.is_bench else one.state
    return state + (", resumable" if one.resumable else "") + (", engines" if one.engines else "")
