"""Dates and times in a column of a table: which forms they are written in, and the numbers that a model gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product

_DAYS = (
    *("%Y/%m/%d", "%Y.%m.%d", "%Y-%m", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d.%m.%y"),
    *("%d/%m/%y", "%m/%d/%y", "%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%d-%b-%y", "%b %d, %Y", "%B %d, %Y"),
    *("%a, %d %b %Y", "%Y%m%d"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", " %H:%M:%S %z")
FORMS = ("iso", *(day + clock for day, clock in product(_DAYS, _CLOCKS)))
AMBIGUOUS = (("%d/%m/%Y", "%m/%d/%Y"), ("%d-%m-%Y", "%m-%d-%Y"), ("%d/%m/%y", "%m/%d/%y"))
MOST_FORMS = 4  # in one column
TRIED = 400  # different cells that decide the forms
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The parts of a date, each a number: the days since 1970, of which a model can tell what is later, and what recurs.
PARTS: dict[str, Callable[[datetime], float]] = {
    "days": lambda date: (date - _EPOCH) / timedelta(days=1),
    "year": lambda date: date.year,
    "month": lambda date: date.month,
    "day": lambda date: date.day,
    "weekday": lambda date: date.weekday(),
    "hour": lambda date: date.hour + date.minute / 60,
}


def find_forms(cells: Sequence[str]) -> tuple[str, ...]:
    """The fewest forms in which at least 95 % of these texts are dates, the most frequent first; empty: they are none.
    Where the day or the month may come first in all of them, the day does."""
    cells = cells[:: max(1, len(cells) // TRIED)]
    found: list[str] = []
    rest = list(cells)
    while rest and len(found) < MOST_FORMS:
        counts = {form: sum(parse_date(cell, (form,)) is not None for cell in rest) for form in _likely(rest)}
        best = max(counts, key=lambda form: counts[form], default="")
        if not best or not counts[best]:
            break
        found.append(best)
        rest = [cell for cell in rest if parse_date(cell, (best,)) is None]
    return tuple(found) if cells and len(rest) <= 0.05 * len(cells) else ()


def is_ambiguous(cells: Sequence[str], forms: Sequence[str]) -> bool:
    """Whether all these dates can be read with the month first, too."""
    for day_first, month_first in AMBIGUOUS:
        for form in forms:
            if form.startswith(day_first):
                other = form.replace(day_first, month_first)
                own = [cell for cell in cells if parse_date(cell, (form,)) is not None]
                return bool(own) and all(parse_date(cell, (other,)) is not None for cell in own)
    return False


def _likely(cells: Sequence[str]) -> list[str]:
    """The forms that one of a few of the texts has."""
    return [form for form in FORMS if any(parse_date(cell, (form,)) is not None for cell in cells[:20])]


def parse_date(cell: str, forms: Sequence[str]) -> datetime | None:
    """In UTC, as which a time without a zone counts; None: the cell has none of the forms."""
    for form in forms:
        try:
            date = _parser(form)(cell)
            return date.astimezone(UTC) if date.tzinfo else date.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            continue
    return None


def part_of(cell: str, forms: Sequence[str], part: str) -> float:
    """A part of a date as a number; NaN where the cell is none."""
    date = parse_date(cell, forms)
    return math.nan if date is None else float(PARTS[part](date))


def _parser(form: str) -> Callable[[str], datetime]:
    return _iso if form == "iso" else partial(_by_format, form=form)


def _iso(cell: str) -> datetime:
    if len(cell) < 10 or cell[4:5] != "-":  # fromisoformat also reads 20240517, which most often is a number
        raise ValueError(cell)
    return datetime.fromisoformat(cell)


def _by_format(cell: str, *, form: str) -> datetime:
    if form.startswith("%Y%m%d") and not cell[:8].isdigit():
        raise ValueError(cell)
    return datetime.strptime(cell, form)
