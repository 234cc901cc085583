"""What the columns of a table are: found by the cells of the training rows, or as the user says.

The rules, in this order, are those of docs/tables.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from suanli.core.console import plural
from suanli.core.errors import UsageError, suggest
from suanli.data.preprocess._dates import PARTS, find_forms, is_ambiguous, parse_date, part_of
from suanli.data.rows import Cell, Cells, text_of

TYPES = ("number", "category", "yes/no", "date", "text", "identifier", "constant", "ignore")
USED = ("number", "category", "yes/no", "date")
MISSING = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil", "?", "-", "--", ".", "nat"})
YES_NO = frozenset({*("yes", "no", "y", "n", "true", "false", "t", "f"), *("ja", "nein", "oui", "non", "是", "否")})
INTERVALS = 128  # of the quantiles of a number
NEARLY_ALL = 0.95  # of the cells of a column, that decide its type
VALUE_SHARE = 0.01  # of the cells of a column of words, from which on `None` is one of its values
SAMPLED = 100_000  # cells that decide the type of a column with very many different ones
FEWEST_ROWS = 20  # from which on a column may be taken for an identifier
WORDS_OF_TEXT = 4  # that the cells of a column have on average, from which on it may be free text
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_CURRENCIES = "$€£¥ "
_ID_NAME = re.compile(
    r"(?:^|[_\W])(?:id|ids|uuid|guid|key|index|idx|rowid|row_?number|nr|no)(?:[_\W]|$)|(?<=[a-z])(?:ID|Id)$|^id",
)
_DATE_NAME = re.compile(r"date|day|time|datum|日期|时间", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class TableColumn:
    """One column of the training table."""

    name: str
    type: str  # one of TYPES
    note: str = ""  # what a person should know: why it is left out, what was read as missing
    values: tuple[str, ...] = ()  # of a category, the most frequent first
    rare: int = 0  # more values of a category, which share one code with those that training hasn't seen
    forms: tuple[str, ...] = ()  # of a date
    parts: tuple[str, ...] = ()  # of a date, each a number
    none_is_value: bool = False  # the word None is a category
    quantiles: tuple[tuple[float, ...], ...] = ()  # of the number, or of each part of a date

    def __post_init__(self) -> None:
        for name in ("values", "forms", "parts"):  # lists when read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "quantiles", tuple(tuple(row) for row in self.quantiles))

    @property
    def is_used(self) -> bool:
        return self.type in USED

    @property
    def number_names(self) -> tuple[str, ...]:
        """Of the numbers that it becomes."""
        if self.type == "number":
            return (self.name,)
        return tuple(f"{self.name} {part}" for part in self.parts) if self.type == "date" else ()

    def is_missing(self, text: str) -> bool:
        return is_missing(text) and not (self.none_is_value and text.casefold() == "none")


def is_missing(text: str) -> bool:
    return len(text) <= 4 and text.casefold() in MISSING


def parse_number(cell: Cell) -> float:
    """NaN where the cell is missing or no number, such as a word or infinity. "$1,234.50" and "12 %" are numbers."""
    if isinstance(cell, str):
        text = cell.strip()
        if not _PLAIN_NUMBER.fullmatch(text):
            text = text.removesuffix("%").strip(_CURRENCIES)
            if not _PLAIN_NUMBER.fullmatch(text) and not _THOUSANDS.fullmatch(text):
                return math.nan
            text = text.replace(",", "")
        cell = float(text)
    if cell is None or not math.isfinite(cell) or abs(cell) > 3.4e38:
        return math.nan
    return float(cell) + 0.0  # so that -0 is 0


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The different cells of a column that aren't missing, as texts, and how often each occurs."""

    texts: list[str]
    counts: np.ndarray
    missing: int
    rows: int  # of the column; where there are very many different cells, a sample was looked at
    none_is_value: bool = False
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the texts, NaN where one is none

    @property
    def filled(self) -> int:
        return int(self.counts.sum())

    @property
    def number_share(self) -> float:
        return float(self.counts[~np.isnan(self.numbers)].sum()) / max(self.filled, 1)


def _look(cells: Cells) -> _Seen:
    rows = len(cells)
    if cells.codes is None and rows > SAMPLED:
        sample = cells.take(np.linspace(0, rows - 1, SAMPLED).astype(np.int64))
        cells = Cells.of([sample[i] for i in range(SAMPLED)])
    values, counts = cells.count()
    total = int(counts.sum())
    by_text: dict[str, int] = {}
    for value, count in zip(values, counts.tolist(), strict=True):
        text = text_of(value)
        by_text[text] = by_text.get(text, 0) + count
    missing = {text: n for text, n in by_text.items() if is_missing(text)}
    present = {text: n for text, n in by_text.items() if text not in missing}
    nones = sum(n for text, n in missing.items() if text.casefold() == "none")
    words = sum(n for text, n in present.items() if math.isnan(parse_number(text)))
    is_value = nones >= VALUE_SHARE * max(total, 1) and words > 0.5 * max(sum(present.values()), 1)
    if is_value:
        present |= {text: n for text, n in missing.items() if text.casefold() == "none"}
    texts, filled = list(present), np.array(list(present.values()), np.int64)
    numbers = np.array([parse_number(text) for text in texts], np.float64)
    missing_count = total - int(filled.sum())
    return _Seen(texts=texts, counts=filled, missing=missing_count, rows=rows, none_is_value=is_value, numbers=numbers)


def find_column(name: str, cells: Cells, wanted: str | None, settings: Mapping[str, Any]) -> TableColumn:
    """The column of this name with these training cells; `wanted`: the type that the user chose. Raises UsageError
    where the cells can't be of that type."""
    seen = _look(cells)
    kind, note = _find_type(name, seen) if wanted is None else (wanted, "")
    if wanted is not None:
        _refuse_type(name, seen, wanted)
    column = TableColumn(name=name, type=kind, note=note, none_is_value=seen.none_is_value)
    if kind == "number":
        return _fit_number(column, seen, cells)
    if kind == "date":
        return _fit_date(column, seen, cells)
    if kind in ("category", "yes/no"):
        return _fit_category(column, seen, settings)
    return column


def _find_type(name: str, seen: _Seen) -> tuple[str, str]:
    """The type and, where that isn't used, the reason."""
    if not seen.texts:
        return "constant", "no cell is filled"
    if len(seen.texts) == 1:
        if not seen.missing:
            return "constant", f"always {_short(seen.texts[0])}"
        return "category", ""
    if len(seen.texts) == 2 and {text.casefold() for text in seen.texts} <= YES_NO | {"0", "1"}:
        return "yes/no", ""
    if _DATE_NAME.search(name) and _are_compact_dates(seen):
        return "date", ""
    if seen.number_share >= NEARLY_ALL:
        return ("identifier", "numbers the rows") if _numbers_rows(name, seen) else ("number", "")
    if seen.number_share <= 1 - NEARLY_ALL and find_forms(seen.texts):
        return "date", ""
    words = np.average([text.count(" ") + 1 for text in seen.texts], weights=seen.counts)
    characters = np.average([len(text) for text in seen.texts], weights=seen.counts)
    different = len(seen.texts) / seen.filled
    if (words >= WORDS_OF_TEXT and different > 0.5) or characters > 100:
        return "text", "free text is left out"
    if different >= NEARLY_ALL and seen.filled >= FEWEST_ROWS:
        return "identifier", "nearly every row has its own"
    return "category", ""


def _are_compact_dates(seen: _Seen) -> bool:
    """Whether all cells are like 20240517."""
    sample = seen.texts[:: max(1, len(seen.texts) // 400)]
    return all(re.fullmatch(r"(?:19|20)[0-9]{6}", text) and parse_date(text, ("%Y%m%d",)) for text in sample)


def _numbers_rows(name: str, seen: _Seen) -> bool:
    """Whether whole numbers, all different, are consecutive or have the name of an identifier."""
    numbers = seen.numbers[~np.isnan(seen.numbers)]
    if seen.filled < FEWEST_ROWS or len(numbers) < 0.999 * seen.filled or not (numbers == np.floor(numbers)).all():
        return False
    span = numbers.max() - numbers.min() + 1
    # Training rows are a part of all rows, so a running number has gaps here.
    return _ID_NAME.search(name) is not None or (span <= 2 * seen.rows and numbers.min() <= seen.rows / 100)


def _refuse_type(name: str, seen: _Seen, wanted: str) -> None:
    if wanted not in TYPES:
        raise UsageError(f"The column {name!r} can't be of the type {wanted!r}.", fix=suggest(str(wanted), TYPES))
    if wanted == "number" and seen.filled and not seen.number_share:
        raise UsageError(
            f"The column {name!r} has no numbers: {', '.join(map(_short, seen.texts[:3]))}, ….",
            fix="Choose category, text or ignore.",
        )
    if wanted == "date" and not find_forms(seen.texts):
        raise UsageError(
            f"The column {name!r} has no dates of a known form: {', '.join(map(_short, seen.texts[:3]))}, ….",
            fix="Write them like 2024-05-17 or 2024-05-17T09:30:00, or choose another type.",
        )


def _fit_number(column: TableColumn, seen: _Seen, cells: Cells) -> TableColumn:
    note = column.note
    if wrong := [text for text, number in zip(seen.texts, seen.numbers, strict=True) if math.isnan(number)]:
        count = round(int(seen.counts[np.isnan(seen.numbers)].sum()) * seen.rows / max(seen.filled + seen.missing, 1))
        note = f"{plural(count, 'cell')} without a number read as missing: {', '.join(map(_short, wrong[:3]))}"
    return replace(column, note=note, quantiles=(find_quantiles(cells.numbers_or(parse_number)),))


def _fit_date(column: TableColumn, seen: _Seen, cells: Cells) -> TableColumn:
    forms = ("%Y%m%d",) if _are_compact_dates(seen) else find_forms(seen.texts)
    notes = [f"in {len(forms)} forms"] if len(forms) > 1 else []
    if is_ambiguous(seen.texts[:1000], forms):
        notes.append("the day is read before the month")
    if wrong := [text for text in seen.texts[:1000] if parse_date(text, forms) is None]:
        notes.append(f"cells that are no date are read as missing: {', '.join(map(_short, wrong[:3]))}")
    column = replace(column, forms=forms, note="; ".join(notes))
    quantiles = {part: find_quantiles(cells.to_numbers(date_parser(column, part))) for part in PARTS}
    used = {part: values for part, values in quantiles.items() if values and values[0] < values[-1]}
    return replace(column, parts=tuple(used), quantiles=tuple(used.values()))


def _fit_category(column: TableColumn, seen: _Seen, settings: Mapping[str, Any]) -> TableColumn:
    least = settings["min_count"] if seen.filled >= 100 and len(seen.texts) > 2 else 1
    order = sorted(range(len(seen.texts)), key=lambda i: (-seen.counts[i], seen.texts[i]))
    kept = [seen.texts[i] for i in order if seen.counts[i] >= least][: settings["max_categories"]]
    return replace(column, values=tuple(kept), rare=len(seen.texts) - len(kept))


def date_parser(column: TableColumn, part: str) -> Callable[[Cell], float]:
    def parse(cell: Cell) -> float:
        text = text_of(cell)
        return math.nan if column.is_missing(text) else part_of(text, column.forms, part)

    return parse


def find_quantiles(numbers: np.ndarray) -> tuple[float, ...]:
    """At INTERVALS equal steps of probability, of the numbers (N,) that aren't missing; empty where none is there."""
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        return ()
    quantiles = np.quantile(numbers, np.linspace(0, 1, INTERVALS + 1)).astype(np.float32)
    return tuple(quantiles.tolist())


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else f"{text[:29]}…")


def describe_types(columns: Sequence[TableColumn]) -> list[str]:
    """ "number columns: age, income", one line a type."""
    lines = []
    for kind in TYPES:
        if names := [column.name for column in columns if column.type == kind]:
            shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
            lines.append(f"{kind} columns: {shown}")
    if rare := [f"{column.name} ({column.rare:,})" for column in columns if column.rare]:
        shown = ", ".join(rare[:6]) + (", …" if len(rare) > 6 else "")
        lines.append(f"rare values share one code with those that training hasn't seen: {shown}")
    return lines
