"""Reads the rows of text tables block by block: CSV and TSV in any encoding, and JSON lines.

The delimiter, the encoding and the decimal comma are found by the start of the file; what was found is a note.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from suanli.core.errors import DataError
from suanli.data.column_store import BLOCK
from suanli.data.file_kinds import name_kind, name_text
from suanli.data.rows import Cell, to_cell
from suanli.data.tables import MAX_CELL_CHARACTERS, format_columns

START_BYTES = 1 << 18  # of a file, by which its form is found
_DELIMITERS = ",;\t|"
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_HIGH = re.compile(rb"[\x80-\xff]+")
_FIX = "Save it again as a CSV in UTF-8."

Block = Sequence[Sequence[Cell]]  # the cells of some rows, column after column


@dataclass(slots=True)
class Opened:
    """A file of which the header is read."""

    names: list[str]
    blocks: Iterator[tuple[Block, list[int]]]  # and the lines of the rows
    bad: list[int] = field(default_factory=list)  # lines with missing or surplus cells
    headers: list[int] = field(default_factory=list)  # lines that repeat the header
    notes: list[str] = field(default_factory=list)


def find_encoding(stream: IO[bytes]) -> str:
    """By a mark at the start, or else the first of UTF-8, GB18030 and Windows-1252 that all bytes fit; characters of
    GB18030 beyond ASCII come in pairs of high bytes, nearly always."""
    start = stream.read(4)
    stream.seek(0)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    decoder = codecs.getincrementaldecoder("utf-8")()
    pairs: Counter[bool] = Counter()
    valid = True
    while chunk := stream.read(1 << 20):
        if chunk.isascii():
            continue
        pairs.update(len(run) % 2 == 0 for run in _HIGH.findall(chunk))
        if valid:
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                valid = False
    if valid:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            valid = False
    stream.seek(0)
    if valid:
        return "utf-8-sig"
    return "gb18030" if pairs[True] > 9 * pairs[False] else "cp1252"


def _open_text(path: Path, stream: IO[bytes], notes: list[str]) -> tuple[io.TextIOWrapper, str]:
    """The text of a file and its start, in whatever encoding."""
    start = stream.read(START_BYTES)
    stream.seek(0)
    if not start.strip():
        raise DataError(f"The table {path} is empty.", fix="Give a file with a header and rows.")
    if kind := name_text(start) or (None if _is_text(start) else name_kind(start)):
        raise DataError(f"{path} is no table: it is {kind}.", fix="Give a CSV, TSV, JSONL, Parquet or Excel file.")
    encoding = find_encoding(stream)
    if encoding not in ("utf-8-sig", "utf-16") and b"\0" in start:
        raise _nul_error(path, start[: start.index(b"\0")].count(b"\n") + 1)
    if encoding != "utf-8-sig":
        notes.append(f"{path.name} read as {encoding.upper()}")
    text = io.TextIOWrapper(
        stream, encoding=encoding, errors="strict" if encoding == "utf-8-sig" else "replace", newline=""
    )
    return text, start.decode(encoding, errors="replace")


def _is_text(start: bytes) -> bool:
    """Whether the start of a file is UTF-8, such as a header whose first letters are those of a program."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def _nul_error(path: Path, line: int) -> DataError:
    return DataError(
        f"The table {path} has a NUL byte in line {line}: it is damaged or not a text file.",
        fix="Save it again as UTF-8 text.",
    )


def _checked_lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    with text:
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise _nul_error(path, number)
            yield line


def find_delimiter(start: str, suffix: str) -> str:
    """The one that divides most of the first lines into as many cells as the first, more than one; of equal ones the
    tab in a .tsv, else the one that makes most cells. A comma where none does."""
    lines = [line for line in start.splitlines() if line.strip()][:50]
    lines = lines[:-1] if len(lines) > 2 else lines  # the last may be cut
    usual = "\t" if suffix == "tsv" else ","
    best = (0.0, False, 0, usual)
    for mark in _DELIMITERS:
        try:
            counts = [len(cells) for cells in csv.reader(lines, delimiter=mark) if cells]
        except csv.Error:
            continue
        if counts and counts[0] > 1:
            share = sum(count == counts[0] for count in counts) / len(counts)
            best = max(best, (share, mark == "\t" == usual, counts[0], mark))
    return best[3]


def open_csv(path: Path, stream: IO[bytes], suffix: str) -> Opened:
    notes: list[str] = []
    text, start = _open_text(path, stream, notes)
    delimiter = find_delimiter(start, suffix)
    reader = csv.reader(_checked_lines(path, text), delimiter=delimiter, strict=True)
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    header = next((cells for cells in _records(path, reader) if any(cell.strip() for cell in cells)), [])
    names = check_header(path, header)
    opened = Opened(names, iter(()), notes=notes)
    opened.blocks = _csv_blocks(path, reader, header, opened, comma=delimiter != ",")
    return opened


def _records(path: Path, reader: Iterator[list[str]]) -> Iterator[list[str]]:
    line = getattr(reader, "line_num", 0) + 1
    try:
        for cells in reader:
            yield cells
            line = reader.line_num + 1  # type: ignore[attr-defined]
    except csv.Error as error:
        raise DataError(
            f"The table {path} can't be read from line {line} on: {error}.",
            fix="Look for a quote that is never closed, or that should be doubled.",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"The table {path} is not {error.encoding} (line {line}).", fix=_FIX) from error


def _csv_blocks(
    path: Path, reader: Iterator[list[str]], header: list[str], opened: Opened, *, comma: bool
) -> Iterator[tuple[Block, list[int]]]:
    width = len(header)
    commas: list[int] | None = None if comma else []  # columns with a decimal comma; None: not known yet
    records = _records(path, reader)
    while True:
        rows: list[list[str]] = []
        numbers: list[int] = []
        line = reader.line_num + 1  # type: ignore[attr-defined]
        taken = 0
        for cells in islice(records, BLOCK):
            taken += 1
            if len(cells) != width:
                if len(cells) > width and not any(cells[width:]):
                    cells = cells[:width]
                else:
                    if cells:
                        opened.bad.append(line)
                    line = reader.line_num + 1  # type: ignore[attr-defined]
                    continue
            if cells == header:
                opened.headers.append(line)
            else:
                rows.append(cells)
                numbers.append(line)
            line = reader.line_num + 1  # type: ignore[attr-defined]
        if not taken:
            return
        if not rows:
            continue
        columns: list[Sequence[Cell]] = list(zip(*rows, strict=True))
        if commas is None:
            commas = [i for i, cells in enumerate(columns) if _has_decimal_comma(cells)]
            if commas:
                opened.notes.append(f"decimal commas in {format_columns([opened.names[i] for i in commas])}")
        for i in commas:
            columns[i] = [_to_point(str(cell)) for cell in columns[i]]
        yield columns, numbers


def _has_decimal_comma(cells: Sequence[Cell]) -> bool:
    """Whether nearly all cells of a column that have a comma are numbers with it, and none has a decimal point."""
    texts = [str(cell).strip() for cell in cells if cell]
    with_comma = [text for text in texts if "," in text]
    return (
        bool(with_comma) and all(map(_DECIMAL_COMMA.fullmatch, with_comma)) and not any("." in text for text in texts)
    )


def _to_point(cell: str) -> str:
    return cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell.strip()) else cell


def check_header(path: Path, header: Sequence[object]) -> list[str]:
    names = ["" if name is None else str(name).strip() for name in header]
    if not any(names):
        raise DataError(f"The table {path} has no header.", fix="Name the columns in its first line.")
    counts = Counter(name for name in names if name)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(
            f"The table {path} has more than one column named {', '.join(map(repr, twice[:3]))}.", fix="Rename one."
        )
    if len(names) > 1 and all(re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", name) for name in names if name):
        raise DataError(
            f"The first line of {path} has numbers and no names of columns: {format_columns(names)}.",
            fix="Add a line with the names of the columns.",
        )
    return names


def open_json_lines(path: Path, stream: IO[bytes]) -> Opened:
    opened = Opened([], iter(()))
    text, _ = _open_text(path, stream, opened.notes)
    opened.blocks = _json_blocks(_checked_lines(path, text), opened)
    return opened


def _json_blocks(lines: Iterator[str], opened: Opened) -> Iterator[tuple[Block, list[int]]]:
    numbered = enumerate(lines, 1)
    known: dict[str, None] = {}
    while chunk := list(islice(numbered, BLOCK)):
        rows, numbers = [], []
        for number, line in chunk:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
                numbers.append(number)
                known.update(dict.fromkeys(row))
            else:
                opened.bad.append(number)
        opened.names[:] = list(known)
        if rows:
            yield [[_json_cell(row.get(name)) for row in rows] for name in known], numbers


def _json_cell(value: object) -> Cell:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else to_cell(value)
