"""Table files as rows of cells: which file is which split, and what is in it.

All cells are text, as the file has them; what the columns mean is decided in `table.py`. A table is
read whole: its rows are the data set.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from suanli.core.errors import DataError
from suanli.data.readers._class_folders import TABLE_SUFFIXES, is_ignored, parse_split, suffix_of
from suanli.data.suffixes import IMAGE_SUFFIXES

MAX_CELL_CHARACTERS = 16 << 20  # a longer one is a quote that was never closed
MAX_SHOWN = 30  # names of columns in an error


class Cells(Protocol):
    """The cells of one row by the position of the column."""

    def __getitem__(self, position: int, /) -> str: ...


class _SparseCells(dict[int, str]):
    """The cells that a row has; the others are empty. Rows that each have keys of their own would
    otherwise need the square of their number."""

    def __missing__(self, position: int) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Table:
    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, Cells]]  # line number and cells
    bad: list[int]  # lines that don't have the table's columns


def find_tables(folder: Path) -> dict[str, Path]:
    """The tables in a folder by split: {'train': train.tsv, …}. Empty where class folders are,
    because the folders then say more than a list lying beside them."""
    try:
        paths = [p for p in sorted(folder.iterdir()) if suffix_of(p.name) in TABLE_SUFFIXES and p.is_file()]
        found = [(split, path) for path in paths if (split := parse_split(path.stem))]
        if not found or _has_class_folders(folder):
            return {}
    except OSError as error:
        raise DataError(
            f"The folder {folder} can't be read: {error.strerror}.", fix="Give a folder that you may read."
        ) from error
    by_split = dict(found)
    if len(by_split) < len(found):
        names = ", ".join(path.name for _, path in found)
        raise DataError(f"The folder {folder} has two tables for one split: {names}.", fix="Move one away.")
    return by_split


def _has_class_folders(folder: Path) -> bool:
    holding = 0
    for inner in _folders(folder):
        if parse_split(inner.name) and any(_folders(inner.path)):
            return True
        holding += not parse_split(inner.name) and _holds_image(inner.path)
        if holding == 2:
            return True
    return False


def _folders(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from [entry for entry in entries if entry.is_dir() and not is_ignored(entry.name)]


def _holds_image(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(suffix_of(entry.name) in IMAGE_SUFFIXES for entry in entries)


def read_table(path: Path) -> Table:
    """Raises DataError for what isn't a table in UTF-8, or has a header only."""
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"The table {path} is empty.", fix="Give a file with a header and rows.")
    suffix = suffix_of(path.name)
    if suffix in ("jsonl", "ndjson"):
        table = _read_json_lines(path, text)
    else:
        records = _split_tabs(text) if suffix == "tsv" else None
        table = _make_table(path, records or _parse_csv(path, text, "\t" if suffix == "tsv" else ","))
    if not table.rows:
        raise DataError(
            f"The table {path} has no rows with its columns {format_columns(table.columns)}"
            + (f" ({len(table.bad)} lines don't fit them)." if table.bad else "."),
            fix="Give a file with a header and at least a few rows.",
        )
    return table


def format_columns(columns: Sequence[str]) -> str:
    """The names of columns for an error."""
    more = f", … ({len(columns):,} in all)" if len(columns) > MAX_SHOWN else ""
    return ", ".join(columns[:MAX_SHOWN]) + more


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"The table {path} can't be read: {error.strerror}.", fix="Give a file that you may read."
        ) from error
    way_out = f"Convert it: iconv -f GB18030 -t UTF-8 {path.name} > new{path.suffix} (with its real encoding)."
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"The table {path} is UTF-16, not UTF-8.", fix=way_out.replace("GB18030", "UTF-16"))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"The table {path} is not UTF-8 (line {line}).", fix=way_out) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"The table {path} has a NUL byte in line {line}: it is damaged or no text file.",
            fix="Save it again as UTF-8 text.",
        )
    return text


def _split_tabs(text: str) -> list[tuple[int, list[str]]] | None:
    """Records of a TSV that has one on each line, which is how they are usually written: a quote in a
    text then means nothing. None where lines differ in length, as when cells have quoted newlines."""
    lines = text.replace("\r\n", "\n").split("\n")
    tabs = lines[0].count("\t")
    if any(line and line.count("\t") != tabs for line in lines):
        return None
    return [(n, [_unquote(c) for c in line.split("\t")]) for n, line in enumerate(lines, 1) if line]


def _unquote(cell: str) -> str:
    """Without the quotes that a CSV writer would have put around it."""
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        inner = cell[1:-1].replace('""', "\0")
        if '"' not in inner:
            return inner.replace("\0", '"')
    return cell


def _parse_csv(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Records with quoted cells (RFC 4180)."""
    before = csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    line = 1
    try:
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"The table {path} can't be read from line {line} on: {error}.",
            fix="Look for a quote that is never closed, or that should be doubled.",
        ) from error
    finally:
        csv.field_size_limit(before)
    return records


def _make_table(path: Path, records: list[tuple[int, list[str]]]) -> Table:
    columns = tuple(name.strip() for name in records[0][1])
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise DataError(f"The table {path} has more than one column named {min(repeated)!r}.", fix="Rename one.")
    rows: list[tuple[int, Cells]] = []
    bad = []
    for line, cells in records[1:]:
        if len(cells) == len(columns):
            rows.append((line, tuple(cells)))
        else:
            bad.append(line)
    return Table(path, columns, rows, bad)


def _read_json_lines(path: Path, text: str) -> Table:
    positions: dict[str, int] = {}  # of the columns, in the order in which they first occur
    rows: list[tuple[int, Cells]] = []
    bad = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            cells = ((positions.setdefault(key, len(positions)), _format_cell(v)) for key, v in value.items())
            rows.append((number, _SparseCells(cells)))
        else:
            bad.append(number)
    return Table(path, tuple(positions), rows, bad)


def _format_cell(value: object) -> str:
    """A JSON value as a table would have it; what has no such form is a missing cell."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return ""
