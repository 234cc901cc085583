"""Collects the cells of a column block by block, as `Cells`; large arrays go into a temporary file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np

from suanli.data.rows import NUMBER, Cell, Cells, Rows

BLOCK = 1 << 16  # rows that are read or encoded at a time
MOST_DIFFERENT = 1 << 16  # cells of a column that are kept as codes
HELD_BYTES = 4 << 20  # of a column, before it goes to the disk
_PLAIN = re.compile(r"[-+.0-9eE\x1f]*")  # cells that `float` reads as NUMBER does, but for leading zeros
_LEADING_ZERO = re.compile(r"(?:^|\x1f)[+-]?0[0-9]")


class _Numbered(dict[Cell, int]):
    """Gives each new key the next number."""

    def __missing__(self, key: Cell) -> int:
        self[key] = number = len(self)
        return number


class _Array:
    """One array that grows, on the disk once it is large."""

    def __init__(self, dtype: str) -> None:
        self._dtype, self._bytes = dtype, 0
        self._parts: list[np.ndarray] = []
        self._file: IO[bytes] | None = None

    def append(self, part: np.ndarray) -> None:
        self._parts.append(np.ascontiguousarray(part, self._dtype))
        self._bytes += self._parts[-1].nbytes
        if self._bytes > HELD_BYTES:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the array
        for part in self._parts:
            self._file.write(part.data)
        self._parts, self._bytes = [], 0

    def close(self) -> np.ndarray:
        if self._file is None:
            return np.concatenate([np.zeros(0, self._dtype), *self._parts])
        self._write()
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r")


class _Texts(Sequence[str]):
    """Texts one after another, as UTF-8."""

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        self._content, self._ends = content, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position):  # type: ignore[no-untyped-def]  # only whole numbers are asked for
        start = 0 if position == 0 else int(self._ends[position - 1])
        return self._content[start : int(self._ends[position])].tobytes().decode(errors="surrogatepass")


class ColumnStore:
    """The cells of one column, of which `append` gets the next ones."""

    def __init__(self) -> None:
        self._known = _Numbered()
        self._codes, self._numbers = _Array("i4"), _Array("f8")
        self._content, self._ends, self._length = _Array("u1"), _Array("i8"), 0
        self._append = self._append_codes

    def append(self, cells: Sequence[Cell]) -> None:
        self._append(cells)

    def close(self) -> Cells:
        values = list(self._known)
        if self._append == self._append_codes:
            return Cells(values, codes=self._codes.close())
        if self._append == self._append_numbers:
            return Cells(values, numbers=self._numbers.close())
        return Cells((), texts=_Texts(self._content.close(), self._ends.close()))

    def _append_codes(self, cells: Sequence[Cell]) -> None:
        self._codes.append(np.fromiter(map(self._known.__getitem__, cells), np.int32, len(cells)))
        if len(self._known) > MOST_DIFFERENT:
            self._widen()

    def _widen(self) -> None:
        """Keeps numbers from now on where most of the different cells are some; else texts."""
        values, codes = list(self._known), self._codes.close()
        plain = [_is_number(value) for value in values]
        self._codes = _Array("i4")
        if sum(plain) >= 0.9 * len(values):
            self._known = _Numbered()
            table = np.array(
                [_number(v, self._known) if ok else _word(v, self._known) for v, ok in zip(values, plain, strict=True)]
            )
            self._numbers.append(table[codes])
            self._append = self._append_numbers
        else:
            self._known = _Numbered()
            self._append = self._append_texts
            self._append_texts([values[code] for code in codes.tolist()])

    def _append_numbers(self, cells: Sequence[Cell]) -> None:
        try:
            joined = "\x1f".join(cells)  # type: ignore[arg-type]
            if _PLAIN.fullmatch(joined) and not _LEADING_ZERO.search(joined):
                filled = [cell or "nan" for cell in cells]
                numbers = np.fromiter(map(float, filled), np.float64, len(cells))
                if "" in cells:
                    numbers[np.isnan(numbers)] = _word("", self._known)
                if np.isinf(numbers).any():
                    raise ValueError("out of range")
                self._numbers.append(numbers + 0.0)  # so that -0 is 0
                return
        except (TypeError, ValueError):  # cells of other types, empty ones
            pass
        known = self._known
        mixed = [_number(c, known) if _is_number(c) else _word(c, known) for c in cells]
        self._numbers.append(np.array(mixed, np.float64))

    def _append_texts(self, cells: Sequence[Cell]) -> None:
        encoded = [("" if c is None else str(c)).encode(errors="surrogatepass") for c in cells]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64) + self._length
        self._content.append(np.frombuffer(b"".join(encoded), np.uint8))
        self._ends.append(ends)
        self._length = int(ends[-1]) if len(ends) else self._length


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        return NUMBER.fullmatch(cell.strip()) is not None
    return cell is not None


def _number(cell: Cell, known: _Numbered) -> float:
    number = float(cell)  # type: ignore[arg-type]
    return number + 0.0 if np.isfinite(number) else _word(cell, known)


def _word(cell: Cell, known: _Numbered) -> float:
    """A NaN that says which of the known cells it stands for."""
    return float(np.array([0x7FF8 << 48 | known[cell]], np.uint64).view(np.float64)[0])


def join_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, which have the same columns, one after another."""
    if len(parts) == 1:
        return parts[0]
    columns = {}
    for name in parts[0].columns:
        store = ColumnStore()
        for part in parts:
            cells = part.columns[name]
            for start in range(0, len(cells), BLOCK):
                store.append([cells[i] for i in range(start, min(start + BLOCK, len(cells)))])
        columns[name] = store.close()
    return Rows(columns, sum(map(len, parts)))
