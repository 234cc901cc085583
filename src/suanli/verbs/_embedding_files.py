"""Embeddings as a file: a batch after another, so that memory holds few of them. The file appears when it is whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from suanli.core.console import plural
from suanli.core.errors import DataError, MachineError, UsageError, pip_install, unknown
from suanli.core.storage import atomic_file, raise_storage_errors
from suanli.core.types import AnyPath, Json
from suanli.verbs.embed import Embedding, csv_lines

GROUP = 1024  # rows of a Parquet file that are written at a time


@dataclass(frozen=True, kw_only=True)
class WrittenEmbeddings:
    files: tuple[Path, ...]
    count: int  # inputs with an embedding
    width: int  # numbers of each
    errors: tuple[tuple[str, str], ...]  # inputs without: name and reason

    def to_json(self) -> dict[str, Json]:
        errors = [{"name": name, "error": reason} for name, reason in self.errors]
        return {"out": [str(file) for file in self.files], "count": self.count, "width": self.width, "errors": errors}


class _Counter:
    """Passes embeddings on, and remembers what is said of them at the end."""

    def __init__(self, embeddings: Iterable[Embedding]) -> None:
        self._embeddings = embeddings
        self.count = self.width = 0
        self.errors: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Embedding]:
        for one in self._embeddings:
            if one.vector is None:
                self.errors.append((one.name, one.error or ""))
            else:
                self.count, self.width = self.count + 1, len(one.vector)
            yield one
        if not self.count:
            raise DataError(
                f"None of the {len(self.errors):,} inputs can be read, so nothing was written.",
                fix="See the reasons above.",
            )


def check_target(out: AnyPath) -> Path:
    """Where embeddings are written. Raises UsageError for a suffix that no format has and for a file that exists, and
    MachineError for a package that is missing."""
    path = Path(out).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise unknown("suffix of --out", path.suffix, FORMATS)
    for file in _files(path):
        with raise_storage_errors(file):
            occupied = file.exists() or file.is_symlink()
        if occupied:
            raise UsageError(f"{file} exists.", fix="Choose a new --out, or remove it.")
    if path.suffix.lower() == ".parquet":
        _import_pyarrow()
    return path


def write_embeddings(embeddings: Iterable[Embedding], path: Path) -> WrittenEmbeddings:
    """By the suffix of `path`: `.npy` is the matrix (N, F) float32, and <name>.names.csv beside it names its rows;
    `.parquet` has the columns name, embedding (a list of float32) and error; `.csv` those of `csv_lines`. Raises
    DataError where no input can be read."""
    counted = _Counter(embeddings)
    with ExitStack() as files:
        streams = [files.enter_context(atomic_file(file)) for file in _files(path)]
        FORMATS[path.suffix.lower()](counted, *streams)
    return WrittenEmbeddings(
        files=tuple(_files(path)), count=counted.count, width=counted.width, errors=tuple(counted.errors)
    )


def _files(path: Path) -> list[Path]:
    return [path, path.with_suffix(".names.csv")] if path.suffix.lower() == ".npy" else [path]


def _write_npy(embeddings: Iterable[Embedding], matrix: IO[bytes], names: IO[bytes]) -> None:
    """The header says how many rows follow, so it is written again at the end. NumPy leaves room for that."""
    text = _text(names)
    table = csv.writer(text)
    table.writerow(["row", "name", "error"])
    count, width = 0, 0
    for one in embeddings:
        if one.vector is None:
            table.writerow(["", one.name, one.error])
            continue
        if not count:
            width = len(one.vector)
            _write_header(matrix, 0, width)
        matrix.write(np.ascontiguousarray(one.vector, "<f4").tobytes())
        table.writerow([count, one.name, ""])
        count += 1
    matrix.seek(0)
    _write_header(matrix, count, width)
    text.flush()
    text.detach()


def _write_header(stream: IO[bytes], count: int, width: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(stream, header)


def _write_csv(embeddings: Iterable[Embedding], stream: IO[bytes]) -> None:
    for line in csv_lines(iter(embeddings)):
        stream.write(f"{line}\n".encode(errors="backslashreplace"))


def _write_parquet(embeddings: Iterable[Embedding], stream: IO[bytes]) -> None:
    pyarrow, parquet = _import_pyarrow()
    columns = {"name": pyarrow.string(), "embedding": pyarrow.list_(pyarrow.float32()), "error": pyarrow.string()}
    schema, iterator = pyarrow.schema(columns), iter(embeddings)
    with parquet.ParquetWriter(stream, schema) as writer:
        while part := list(islice(iterator, GROUP)):
            names, reasons = [_utf8(one.name) for one in part], [one.error and _utf8(one.error) for one in part]
            values = {"name": names, "embedding": [one.vector for one in part], "error": reasons}
            writer.write_table(pyarrow.table(values, schema=schema))


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MachineError(
            "Parquet files need the package pyarrow.",
            fix=f"Install it: {pip_install('suanli[parquet]')} Or write .npy or .csv.",
        ) from error
    return pyarrow, parquet


def _utf8(text: str) -> str:
    """A name may hold bytes that are no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _text(stream: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="")


FORMATS: dict[str, Callable[..., None]] = {".npy": _write_npy, ".parquet": _write_parquet, ".csv": _write_csv}


def summarize(written: WrittenEmbeddings) -> str:
    """For people."""
    failed = f"; {plural(len(written.errors), 'input')} can't be read" if written.errors else ""
    text = f"{written.files[0]}: {plural(written.count, 'input')}, {written.width} numbers each{failed}"
    return text if len(written.files) == 1 else f"{text}\n{written.files[1]}: the names of its rows"
