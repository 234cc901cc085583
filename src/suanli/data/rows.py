"""Rows of a table, stored by column: raw inputs of the kind "table".

A column keeps its different cells once and a code for each row, which is small for categories, dates and most numbers.
Where there are too many different cells, it keeps numbers, or texts one after another. So millions of rows are a few
arrays, which lie in a temporary file when they are large, and a row becomes an object only when somebody reads it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from typing import Any, TypeAlias, overload

import numpy as np

from suanli.core.types import Raw, RawBlock

Cell: TypeAlias = "str | float | int | None"  # as a file has it; None: missing
NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9]*|0?(?=\.[0-9]))(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")  # no leading zeros
_NAN = np.uint64(0x7FF8 << 48)  # the code of a cell that is no number is in the lowest bits of a NaN
_CODE = np.uint64(0xFFFF_FFFF)


class Cells:
    """N cells of one column. `codes` (N,) are positions in `values`, or `numbers` (N,) float64 has the cells that are
    numbers and, as NaNs, the codes of others; or `texts` are the cells."""

    def __init__(
        self,
        values: Sequence[Cell],
        codes: np.ndarray | None = None,
        numbers: np.ndarray | None = None,
        texts: Sequence[str] | None = None,
        cache: dict[object, Any] | None = None,
    ) -> None:
        self.values, self.codes, self.numbers, self.texts = values, codes, numbers, texts
        self._cache = {} if cache is None else cache  # of all parts of a column

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Cells:
        positions: dict[Cell, int] = {}
        codes = [positions.setdefault(cell, len(positions)) for cell in cells]
        return cls(list(positions), codes=np.array(codes, np.int32))

    def __len__(self) -> int:
        stored = next(s for s in (self.codes, self.numbers, self.texts) if s is not None)
        return len(stored)

    def __getitem__(self, position: int) -> Cell:
        if self.texts is not None:
            return self.texts[position]
        if self.codes is not None:
            return self.values[int(self.codes[position])]
        assert self.numbers is not None
        number = float(self.numbers[position])
        if math.isnan(number):
            return self.values[int(self.numbers[position : position + 1].view(np.uint64)[0] & _CODE)]
        return int(number) if number.is_integer() and abs(number) < 1 << 53 else number

    def to_list(self) -> list[Cell]:
        """All cells, as one after another gives them."""
        if self.codes is not None:
            values = self.values
            return [values[code] for code in self.codes.tolist()]
        return [self[i] for i in range(len(self))]

    def take(self, positions: np.ndarray | slice) -> Cells:
        if self.texts is not None:
            at = np.arange(len(self.texts))[positions] if isinstance(positions, slice) else positions
            return Cells((), texts=[self.texts[i] for i in at.tolist()])
        codes = None if self.codes is None else np.asarray(self.codes[positions])
        numbers = None if self.numbers is None else np.asarray(self.numbers[positions])
        return Cells(self.values, codes=codes, numbers=numbers, cache=self._cache)

    def to_numbers(self, parse: Callable[[Cell], float], key: object = None) -> np.ndarray:
        """(N,) float64: `parse` of each cell. Different cells are parsed once; with a `key`, once for all parts of the
        column."""
        if self.texts is not None:
            return np.fromiter(map(parse, self.texts), np.float64, len(self.texts))
        table = self._parse_values(parse, key)
        if self.codes is not None:
            looked_up: np.ndarray = table[self.codes]
            return looked_up
        return np.fromiter((parse(self[i]) for i in range(len(self))), np.float64, len(self))

    def numbers_or(self, parse: Callable[[Cell], float], key: object = None) -> np.ndarray:
        """(N,) float64: as `to_numbers`, but a cell that is kept as a number is that."""
        if self.numbers is None:
            return self.to_numbers(parse, key)
        table = self._parse_values(parse, key)
        numbers = np.array(self.numbers, np.float64)
        words = np.isnan(numbers)
        if words.any():
            numbers[words] = table[(numbers[words].view(np.uint64) & _CODE).astype(np.int64)]
        return numbers

    def find(self, test: Callable[[Cell], bool], key: object = None) -> np.ndarray:
        """(N,) bool: which cells, of those that aren't kept as numbers, pass the test."""
        if self.numbers is None:
            return self.to_numbers(test, key) > 0
        found = np.zeros(len(self), bool)
        words = np.flatnonzero(np.isnan(self.numbers))
        if len(words):
            codes = (np.asarray(self.numbers)[words].view(np.uint64) & _CODE).astype(np.int64)
            found[words] = self._parse_values(test, key)[codes] > 0
        return found

    def _parse_values(self, parse: Callable[[Cell], float], key: object) -> np.ndarray:
        table: np.ndarray | None = self._cache.get(key) if key is not None else None
        if table is None or len(table) != len(self.values):
            table = np.array([parse(value) for value in self.values], np.float64)
            if key is not None:
                self._cache[key] = table
        return table

    def count(self) -> tuple[list[Cell], np.ndarray]:
        """The different cells and how often each occurs (V,). Of numbers as such, and of texts, as they come."""
        if self.codes is not None:
            counts = np.bincount(self.codes, minlength=len(self.values))
            found = np.flatnonzero(counts)
            return [self.values[i] for i in found.tolist()], counts[found]
        if self.texts is not None:
            return list(self.texts), np.ones(len(self.texts), np.int64)
        assert self.numbers is not None
        distinct, counts = np.unique(self.numbers[~np.isnan(self.numbers)], return_counts=True)
        words = (self.numbers[np.isnan(self.numbers)].view(np.uint64) & _CODE).astype(np.int64)
        of_words = np.bincount(words, minlength=len(self.values))
        there = np.flatnonzero(of_words)
        return [*distinct.tolist(), *(self.values[i] for i in there.tolist())], np.append(counts, of_words[there])

    def hashes(self) -> np.ndarray:
        """(N,) uint64: equal for cells that say the same, such as 1 and "1.0"."""
        if self.texts is not None:
            return hash_cells(self.texts)
        table: np.ndarray | None = self._cache.get("hashes")
        if table is None or len(table) != len(self.values):
            table = self._cache["hashes"] = hash_cells(self.values)
        if self.codes is not None:
            looked_up: np.ndarray = table[self.codes]
            return looked_up
        assert self.numbers is not None
        hashes = _mix(np.asarray(self.numbers, np.float64).view(np.uint64))
        words = np.flatnonzero(np.isnan(self.numbers))
        if len(words):
            hashes[words] = table[(self.numbers[words].view(np.uint64) & _CODE).astype(np.int64)]
        return hashes


class Rows(RawBlock):
    """N rows by columns, a sequence of mappings from the name of a column to its cell."""

    def __init__(self, columns: Mapping[str, Cells], count: int) -> None:
        self.columns, self._count = columns, count

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Rows:
        """Of rows that may lack some of the columns: those cells are missing."""
        if isinstance(first := next(iter(rows), None), Row):
            views = [row for row in rows if isinstance(row, Row) and row.rows is first.rows]
            if len(views) == len(rows):
                return first.rows.take(np.array([row.position for row in views]))
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: Cells.of(to_cell(row.get(name)) for row in rows) for name in names}
        return cls(columns, len(rows))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, position: int) -> Raw: ...
    @overload
    def __getitem__(self, position: slice) -> Rows: ...
    def __getitem__(self, position: int | slice) -> Raw | Rows:
        if isinstance(position, slice):
            return self.take(np.arange(self._count)[position])
        if not -self._count <= position < self._count:
            raise IndexError(position)
        return Row(self, position % self._count)

    def cell(self, name: str, position: int) -> Cell:
        columns = self.columns
        return columns.cell(name, position) if isinstance(columns, _Taken) else columns[name][position]

    def take(self, positions: np.ndarray) -> Rows:
        return Rows(_Taken.of(self.columns, positions), len(positions))

    def to_dicts(self) -> list[dict[str, Cell]]:
        """The rows as plain values."""
        names = list(self.columns)
        columns = [cells.to_list() for cells in self.columns.values()]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def digests(self) -> np.ndarray:
        """(N, 16) uint8, equal for rows whose cells say the same, in any order of the columns."""
        halves = np.zeros((2, self._count), np.uint64)
        for name in sorted(self.columns):
            own, hashes = hash_cells([f"column {name}"])[0], self.columns[name].hashes()
            halves[0] = _mix(halves[0] ^ (hashes + own))
            halves[1] = _mix(halves[1] + _mix(hashes ^ own))
        return np.ascontiguousarray(halves.T).astype(">u8").view(np.uint8)


class Row(Mapping[str, Cell]):
    """One of some rows."""

    __slots__ = ("position", "rows")

    def __init__(self, rows: Rows, position: int) -> None:
        self.rows, self.position = rows, position

    def __getitem__(self, name: str) -> Cell:
        return self.rows.cell(name, self.position)

    def __contains__(self, name: object) -> bool:
        return name in self.rows.columns

    def keys(self) -> KeysView[str]:
        return self.rows.columns.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.columns)

    def __len__(self) -> int:
        return len(self.rows.columns)


class _Taken(Mapping[str, Cells]):
    """The cells at some positions, of which a column is copied when it is asked for."""

    @classmethod
    def of(cls, columns: Mapping[str, Cells], positions: np.ndarray) -> _Taken:
        if isinstance(columns, _Taken):
            return cls(columns._columns, columns._positions[positions])
        return cls(columns, positions)

    def cell(self, name: str, position: int) -> Cell:
        return self._columns[name][int(self._positions[position])]

    def __init__(self, columns: Mapping[str, Cells], positions: np.ndarray) -> None:
        self._columns, self._positions = columns, positions

    def __getitem__(self, name: str) -> Cells:
        return self._columns[name].take(self._positions)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def to_cell(value: Any) -> Cell:
    """A value of any type, as JSON, Parquet and data frames have them, as a cell: numbers, texts, None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | float | np.number):
        number = float(value)
        return None if math.isnan(number) else value if isinstance(value, int) else number
    if hasattr(value, "isoformat"):  # dates and times; pandas' NaT has it, too
        text = value.isoformat()
        return None if text == "NaT" else str(text)
    return str(value)


def text_of(cell: Cell) -> str:
    """A cell as text, equal for those that say the same: " yes" and "yes", 1 and "1.0"."""
    if cell is None:
        return ""
    text = cell.strip() if isinstance(cell, str) else repr(cell)
    if NUMBER.fullmatch(text):
        number = float(text)
        if number.is_integer() and abs(number) < 1 << 53:
            return str(int(number))
        return repr(number) if math.isfinite(number) else text
    return text


def hash_cells(cells: Iterable[Cell]) -> np.ndarray:
    """(N,) uint64: of numbers their bits, mixed, else a digest of the text."""
    texts = [text_of(cell) for cell in cells]
    plain = np.array([NUMBER.fullmatch(text) is not None for text in texts], bool)
    numbers = np.array(
        [float(text) if is_number else 0 for text, is_number in zip(texts, plain, strict=True)], np.float64
    )
    hashes = _mix(numbers.view(np.uint64))
    for i in np.flatnonzero(~plain).tolist():
        content = texts[i].encode(errors="surrogatepass")
        hashes[i] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    return hashes


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit depends on every other: the end of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
