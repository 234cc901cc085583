"""Reads the rows of a table file in any format: CSV and TSV, JSON lines, Parquet, Arrow and Excel; text also as .gz.

`table_text.py` and `table_binary.py` open the formats; `rows.py` says how rows are stored.
"""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from suanli.core.console import plural
from suanli.core.errors import DataError
from suanli.data.column_store import ColumnStore
from suanli.data.members import format_of
from suanli.data.rows import Cells, Rows
from suanli.data.table_binary import open_arrow, open_excel
from suanli.data.table_text import Opened, open_csv, open_json_lines
from suanli.data.tables import format_columns


@dataclass(slots=True)
class TableRows:
    """The rows of one file."""

    path: Path
    names: tuple[str, ...]  # of the columns
    rows: Rows
    lines: np.ndarray  # (N,) int64, where each row is in the file
    notes: list[str]


def read_rows(path: Path, content: bytes | None = None) -> TableRows:
    """The rows of the table at `path`, or of one of that name with this content. Raises DataError for what is no table,
    or is damaged."""
    kind = format_of(path.name) if content is None else _kind_of(content)
    try:
        with _Stream(path, content) as stream:
            if kind in ("parquet", "arrow", "feather"):
                opened = open_arrow(path, stream, kind)
            elif kind == "xlsx":
                opened = open_excel(path, stream)
            elif kind in ("jsonl", "ndjson"):
                opened = open_json_lines(path, stream)
            else:
                opened = open_csv(path, stream, kind)
            return _collect(path, opened)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"The table {path} is damaged: {error}.", fix="Download or copy it again.") from error
    except OSError as error:
        raise DataError(
            f"The table {path} can't be read: {error.strerror or error}.", fix="Give another file."
        ) from error


def _kind_of(content: bytes) -> str:
    """The format of a table that has no name, by how it starts."""
    for start, kind in ((b"PK\x03\x04", "xlsx"), (b"PAR1", "parquet"), (b"ARROW1", "arrow")):
        if content.startswith(start):
            return kind
    return "jsonl" if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else "csv"


def _collect(path: Path, opened: Opened) -> TableRows:
    stores: dict[str, ColumnStore] = {}
    parts: list[np.ndarray] = []
    count = 0
    for block, numbers in opened.blocks:
        for name, cells in zip(opened.names, block, strict=False):
            if name not in stores:  # of JSON lines, where a column may come late
                stores[name] = ColumnStore()
                stores[name].append([None] * count)
            stores[name].append(cells)
        parts.append(np.array(numbers, np.int64))
        count += len(numbers)
    if not count:
        more = f" ({len(opened.bad)} lines don't fit them)" if opened.bad else ""
        raise DataError(
            f"The table {path} has no rows with its columns {format_columns(opened.names)}{more}.",
            fix="Give a file with a header and at least a few rows.",
        )
    notes = [*opened.notes]
    if opened.headers:
        notes.append(
            f"{path.name} repeats its header in line {opened.headers[0]}: {plural(len(opened.headers), 'line')} skipped"
        )
    if opened.bad:
        some = ", ".join(map(str, opened.bad[:3])) + (", …" if len(opened.bad) > 3 else "")
        note = f"{plural(len(opened.bad), 'line')} of {path.name} with missing or surplus cells (line {some})"
        if len(opened.bad) > count:
            raise DataError(f"The table {path} is mostly damaged: {note}.", fix="Save it again.")
        notes.append(f"{note}, skipped")
    names = [name for name in opened.names if name and name in stores]
    if unnamed := len(opened.names) - len(names):
        notes.append(f"{plural(unnamed, 'column')} of {path.name} without a name, left out")
    columns: dict[str, Cells] = {name: stores[name].close() for name in names}
    return TableRows(path, tuple(names), Rows(columns, count), np.concatenate(parts), notes)


class _Stream:
    """The bytes of a file, decompressed."""

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        self._path, self._content = path, content

    def __enter__(self) -> IO[bytes]:
        self._raw: IO[bytes] = self._path.open("rb") if self._content is None else io.BytesIO(self._content)
        self._stream = self._raw
        packed = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        if packed:
            self._stream = gzip.open(self._raw)  # type: ignore[assignment]
        return self._stream

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._raw.close()
