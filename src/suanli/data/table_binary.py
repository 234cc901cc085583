"""Reads the rows of Parquet, Arrow and Excel files block by block, with packages that are extras."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

from suanli.core.errors import DataError, pip_install
from suanli.data.column_store import BLOCK
from suanli.data.rows import to_cell
from suanli.data.table_text import Block, Opened, check_header


def open_arrow(path: Path, stream: IO[bytes], kind: str) -> Opened:
    try:
        import pyarrow
        from pyarrow import feather, ipc, parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a {kind} file, which needs pyarrow.", fix=f"Install it: {pip_install('suanli[parquet]')}"
        ) from error
    try:
        if kind == "parquet":
            file = parquet.ParquetFile(stream)
            names, batches = file.schema_arrow.names, file.iter_batches(BLOCK)
        else:
            try:
                table = feather.read_table(stream)
            except pyarrow.ArrowInvalid:
                table = ipc.open_stream(stream).read_all()
            names, batches = table.schema.names, iter(table.to_batches(BLOCK))
        return Opened(check_header(path, names), _arrow_blocks(path, batches))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"The table {path} is damaged: {error}.", fix="Write or copy it again.") from error


def _arrow_blocks(path: Path, batches) -> Iterator[tuple[Block, list[int]]]:  # type: ignore[no-untyped-def]
    import pyarrow

    start = 1
    try:
        for batch in batches:
            yield (
                [[to_cell(v) for v in column.to_pylist()] for column in batch.columns],
                [*range(start, start + batch.num_rows)],
            )
            start += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"The table {path} is damaged: {error}.", fix="Write or copy it again.") from error


def open_excel(path: Path, stream: IO[bytes]) -> Opened:
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(
            f"{path} is an Excel file, which needs openpyxl.", fix=f"Install it: {pip_install('suanli[excel]')}"
        ) from error
    try:
        book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
    except Exception as error:  # whatever a damaged file raises in zipfile, XML or openpyxl
        raise DataError(f"The workbook {path} is damaged: {error}.", fix="Save it again.") from error
    sheet = book.worksheets[0]
    numbered = enumerate(sheet.iter_rows(values_only=True), 1)
    header: tuple[object, ...] = next((row for _, row in numbered if any(cell is not None for cell in row)), ())
    opened = Opened(check_header(path, header), iter(()))
    if len(book.worksheets) > 1:
        opened.notes.append(f"{path.name} has {len(book.worksheets)} sheets; the first, {sheet.title}, was read")
    opened.blocks = _excel_blocks(numbered, header, opened)
    return opened


def _excel_blocks(
    numbered: Iterator[tuple[int, tuple[object, ...]]], header: tuple[object, ...], opened: Opened
) -> Iterator[tuple[Block, list[int]]]:
    while chunk := list(islice(numbered, BLOCK)):
        rows = [(number, row) for number, row in chunk if any(cell is not None for cell in row)]
        opened.headers += [number for number, row in rows if row == header]
        rows = [(number, row) for number, row in rows if row != header]
        if rows:
            columns = zip(*(row[: len(header)] + (None,) * (len(header) - len(row)) for _, row in rows), strict=True)
            yield [[to_cell(cell) for cell in column] for column in columns], [number for number, _ in rows]
