"""Turns the cells of a time column into numbers that can be sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import product

from suanli.core.errors import DataError

_DATES = (
    *("%Y/%m/%d", "%Y.%m.%d", "%Y-%m", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y"),
    *("%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%b %d, %Y", "%B %d, %Y", "%a, %d %b %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S %z")
_FIX = "Allowed are numbers, or dates and times of one form: best ISO (2024-05-17 or 2024-05-17T09:30:00)."


def parse_times(column: str, cells: Sequence[str], names: Sequence[str]) -> list[float]:
    """The cells as numbers: themselves, or seconds since 1970, UTC where they state no zone.

    `names` says where each cell is. Raises DataError for a missing one and where they can't be ordered: of several
    kinds, in no known form, or where the day or the month may come first.
    """
    cells = [cell.strip() for cell in cells]
    if not cells:
        return []
    results: list[list[float]] = []
    reached = 0  # the cell that the last possible form doesn't fit
    for parse, certain in _parsers():
        values = _parse_all(parse, cells)
        if len(values) == len(cells):
            results.append(values)
            if certain:
                break
        reached = max(reached, len(values))
    if not results:
        what = repr(cells[reached]) if cells[reached] else "an empty cell"
        first = f", and {cells[0]!r} in {names[0]}" if reached else ""
        raise DataError(f"The time column {column!r} has {what} in {names[reached]}{first}.", fix=_FIX)
    if any(values != results[0] for values in results):
        raise DataError(f"In the time column {column!r}, {cells[0]!r} may have the day or the month first.", fix=_FIX)
    return results[0]


def _parse_all(parse: Callable[[str], float], cells: Sequence[str]) -> list[float]:
    """The values of the cells, up to the first that has another form."""
    values: list[float] = []
    try:
        for cell in cells:
            values.append(parse(cell))
    except (ValueError, OverflowError):
        pass
    return values


def _parsers() -> Iterator[tuple[Callable[[str], float], bool]]:
    """Each reads one form of time or raises ValueError; with whether it can't be mistaken for another form."""
    yield _number, True
    yield partial(_iso, zone=False), True
    yield partial(_iso, zone=True), True
    for date, clock in product(_DATES, _CLOCKS):
        yield partial(_by_format, form=date + clock), False


def _number(cell: str) -> float:
    if not math.isfinite(value := float(cell)):
        raise ValueError("no finite number")
    return value


def _iso(cell: str, *, zone: bool) -> float:
    time = datetime.fromisoformat(cell)
    if (time.tzinfo is not None) != zone:
        raise ValueError("times with and without a zone")
    return _seconds(time)


def _by_format(cell: str, *, form: str) -> float:
    return _seconds(datetime.strptime(cell, form))


def _seconds(time: datetime) -> float:
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
