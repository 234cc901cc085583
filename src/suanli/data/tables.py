"""Reads table files into rows of cells, and finds the table of each split in a folder.

All cells are text, as in the file; `table.py` decides what the columns mean. A table is read into memory as a whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from suanli.core.errors import DataError
from suanli.data.file_kinds import name_kind, name_text
from suanli.data.members import TABLE_SUFFIXES, format_of, suffix_of, table_stem
from suanli.data.split_names import parse_splits
from suanli.data.suffixes import IMAGE_SUFFIXES, is_ignored

MAX_CELL_CHARACTERS = 16 << 20  # in a longer cell a quote was never closed
MAX_SHOWN = 30  # names of columns in an error


class Cells(Protocol):
    """The cells of one row, by the position of the column."""

    def __getitem__(self, position: int, /) -> str: ...


class _SparseCells(dict[int, str]):
    """Only the cells that a row of JSON has; the others are empty. If every row has other keys, full rows would need
    memory for the square of their number."""

    def __missing__(self, position: int) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Table:
    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, Cells]]  # line number and cells
    bad: list[int]  # lines that don't have the table's columns


def find_tables(folder: Path, *, features: bool = False) -> dict[str, Path]:
    """The tables in a folder by split: {'train': train.tsv, …}; with `features`, also those in formats that are read as
    tables of features only. Empty where there are class folders, which then are the data set."""
    is_table = format_of if features else lambda name: suffix_of(name) in TABLE_SUFFIXES
    try:
        paths = [p for p in sorted(folder.iterdir()) if is_table(p.name) and p.is_file()]
        splits = parse_splits(table_stem(path.name) for path in paths)
        tables = [(splits[stem], path) for path in paths if (stem := table_stem(path.name)) in splits]
        if not tables or _has_class_folders(folder):
            return {}
    except OSError as error:
        raise DataError(
            f"The folder {folder} can't be read: {error.strerror}.", fix="Give a folder that you may read."
        ) from error
    by_split = dict(tables)
    if len(by_split) < len(tables):
        names = ", ".join(path.name for _, path in tables)
        raise DataError(f"The folder {folder} has two tables for one split: {names}.", fix="Move one away.")
    return by_split


def _has_class_folders(folder: Path) -> bool:
    classes = 0
    splits = parse_splits(inner.name for inner in _folders(folder))
    for inner in _folders(folder):
        if inner.name in splits and any(_folders(inner.path)):
            return True
        classes += inner.name not in splits and _has_images(inner.path)
        if classes == 2:
            return True
    return False


def _folders(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from [entry for entry in entries if entry.is_dir() and not is_ignored(entry.name)]


def _has_images(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(suffix_of(entry.name) in IMAGE_SUFFIXES for entry in entries)


def read_table(path: Path) -> Table:
    """The table at `path`. Raises DataError for what isn't a table in UTF-8, and for a header without rows."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"The table {path} can't be read: {error.strerror}.", fix="Give a file that you may read."
        ) from error
    return parse_table(path, content)


def parse_table(path: Path, content: bytes) -> Table:
    """As `read_table`, from the content of the file."""
    text = _decode_text(path, content)
    if not text.strip():
        raise DataError(f"The table {path} is empty.", fix="Give a file with a header and rows.")
    suffix = suffix_of(path.name)
    if suffix in ("jsonl", "ndjson"):
        table = _read_json_lines(path, text)
    else:
        records = _split_tabs(text) if suffix == "tsv" else None
        table = _make_table(path, records or _parse_csv(path, text, "\t" if suffix == "tsv" else _find_delimiter(text)))
    if not table.rows:
        raise DataError(
            f"The table {path} has no rows with its columns {format_columns(table.columns)}"
            + (f" ({len(table.bad)} lines don't fit them)." if table.bad else "."),
            fix="Give a file with a header and at least a few rows.",
        )
    return table


def format_columns(columns: Sequence[str]) -> str:
    """The names of columns, for an error."""
    more = f", … ({len(columns):,} in all)" if len(columns) > MAX_SHOWN else ""
    return ", ".join(columns[:MAX_SHOWN]) + more


def _decode_text(path: Path, content: bytes) -> str:
    fix = f"Convert it: iconv -f GB18030 -t UTF-8 {path.name} > new{path.suffix} (with its real encoding)."
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"The table {path} is UTF-16, not UTF-8.", fix=fix.replace("GB18030", "UTF-16"))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        if kind := name_kind(content):
            raise DataError(f"{path} is no table: it is {kind}.", fix="Give a CSV, TSV or JSONL file.") from error
        raise DataError(f"The table {path} is not UTF-8 (line {line}).", fix=fix) from error
    if kind := name_text(content):
        raise DataError(f"{path} is no table: it is {kind}", fix="Get the table itself.")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"The table {path} has a NUL byte in line {line}: it is damaged or not a text file.",
            fix="Save it again as UTF-8 text.",
        )
    return text


def _split_tabs(text: str) -> list[tuple[int, list[str]]] | None:
    """Records of a TSV with one per line, the usual form, in which a quote has no meaning. None: the lines differ in
    length, as where cells have quoted newlines."""
    lines = text.replace("\r\n", "\n").split("\n")
    tabs = lines[0].count("\t")
    if any(line and line.count("\t") != tabs for line in lines):
        return None
    records = ((n, line.split("\t"), '"' in line) for n, line in enumerate(lines, 1) if line)
    return [(n, [_unquote(c) for c in cells] if quoted else cells) for n, cells, quoted in records]


def _unquote(cell: str) -> str:
    """The cell without the quotes of a CSV writer, if it has them."""
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        inner = cell[1:-1].replace('""', "\0")
        if '"' not in inner:
            return inner.replace("\0", '"')
    return cell


def _find_delimiter(text: str) -> str:
    """Of a .csv: a comma, unless its header has only semicolons or tabs, as spreadsheets in many languages write."""
    header = text.split("\n", 1)[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


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
    header = [name.strip() for name in records[0][1]]
    named = [i for i, name in enumerate(header) if name]  # spreadsheets and pandas leave columns without a name
    rows: list[tuple[int, Cells]] = []
    bad = []
    for line, cells in records[1:]:
        if len(cells) != len(header) and (len(cells) < len(header) or any(cells[len(header) :])):
            bad.append(line)
        else:
            rows.append((line, tuple(cells) if len(named) == len(cells) else tuple(cells[i] for i in named)))
    return Table(path, tuple(header[i] for i in named), rows, bad)


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
    """A JSON value as the text of a cell, which for a list of texts is JSON; empty for other lists, objects and
    null."""
    if isinstance(value, str):
        return _replace_half_pairs(value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return json.dumps(value, ensure_ascii=False)
    return ""


def _replace_half_pairs(text: str) -> str:
    """JSON can state half of a surrogate pair ("\\ud83d"), which no other text can hold."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
