"""Columns of the cache on disk: one .npy file each, or for ragged ones a file of values and a file of offsets."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from suanli.core.schema import Arrays, Column, Ragged, Schema, Stored

HEADER_BYTES = 128  # of a .npy file of few dimensions

_RaggedParts = Mapping[str, Sequence[np.ndarray | None]]


class ColumnWriter:
    """Writes the columns of a schema for `count` examples into a new folder: fixed ones in any order of the examples.
    Those that are never written stay zero. A context manager: the files are complete at its end."""

    def __init__(self, folder: Path, schema: Schema, count: int) -> None:
        folder.mkdir()
        self.schema = schema
        self._writers = {
            name: _RaggedFile(folder, name, column) if column.is_ragged else _FixedFile(folder, name, column, count)
            for name, column in schema.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def write(self, start: int, examples: Sequence[Arrays | None]) -> _RaggedParts:
        """Writes the fixed columns of the examples from `start`; None: left as it is. Returns what `append` must get,
        in the order of the examples. Safe to call from threads."""
        ragged: dict[str, list[np.ndarray | None]] = {}
        for name, writer in self._writers.items():
            arrays = [None if example is None else example[name] for example in examples]
            if isinstance(writer, _FixedFile):
                writer.write(start, arrays)
            else:
                ragged[name] = arrays
        return ragged

    def write_block(self, start: int, arrays: Arrays) -> None:
        """Writes arrays (B, …) of fixed columns from the example `start` on. Safe to call from threads."""
        for name, writer in self._writers.items():
            assert isinstance(writer, _FixedFile), name
            writer.write_block(start, arrays[name])

    def append(self, parts: _RaggedParts) -> None:
        """Writes the ragged columns of the next examples."""
        for name, arrays in parts.items():
            writer = self._writers[name]
            assert isinstance(writer, _RaggedFile)
            writer.append(arrays)


class _FixedFile:
    def __init__(self, folder: Path, name: str, column: Column, count: int) -> None:
        path = folder / f"{name}.npy"
        self._column, self._lock = column, threading.Lock()
        self._offset = np.lib.format.open_memmap(path, "w+", column.dtype, (count, *column.fixed_shape)).offset
        self._stream = path.open("r+b")

    def write(self, start: int, arrays: Sequence[np.ndarray | None]) -> None:
        # Written, not through the memory map: faster, and a full disk is an error instead of killing the process.
        block = np.zeros((len(arrays), *self._column.fixed_shape), self._column.dtype)
        for i, array in enumerate(arrays):
            if array is not None:
                block[i] = array
        self.write_block(start, block)

    def write_block(self, start: int, block: np.ndarray) -> None:
        block = np.ascontiguousarray(block, self._column.dtype)
        with self._lock:
            self._stream.seek(self._offset + start * self._column.size_bytes)
            self._stream.write(block.data)

    def close(self) -> None:
        self._stream.close()


class _RaggedFile:
    def __init__(self, folder: Path, name: str, column: Column) -> None:
        self._folder, self._name, self._column = folder, name, column
        self._lengths: list[int] = []
        self._stream = (folder / f"{name}.values.npy").open("wb")
        self._stream.write(bytes(HEADER_BYTES))  # of which the length is known at the end

    def append(self, arrays: Sequence[np.ndarray | None]) -> None:
        for array in arrays:
            self._lengths.append(0 if array is None else len(array))
            if array is not None:
                self._stream.write(np.ascontiguousarray(array, self._column.dtype).data)

    def close(self) -> None:
        offsets = np.cumsum([0, *self._lengths], dtype=np.int64)
        np.save(self._folder / f"{self._name}.offsets.npy", offsets)
        header = io.BytesIO()
        shape = (int(offsets[-1]), *self._column.fixed_shape)
        description = {"descr": np.dtype(self._column.dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        if header.tell() != HEADER_BYTES:
            raise ValueError(f"column {self._name} has too many dimensions: {shape}")
        self._stream.seek(0)
        self._stream.write(header.getvalue())
        self._stream.close()


def load_columns(folder: Path, schema: Schema, count: int | None = None) -> dict[str, Stored]:
    """The columns as memory maps. Raises ValueError, EOFError or FileNotFoundError where one is damaged or doesn't have
    `count` examples."""
    columns = {name: _load_column(folder, name, column) for name, column in schema.items()}
    for name, stored in columns.items():
        if count is not None and len(stored) != count:
            raise ValueError(f"column {name} has {len(stored)} examples, not {count}")
    return columns


def _load_column(folder: Path, name: str, column: Column) -> Stored:
    if not column.is_ragged:
        fixed: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return fixed
    offsets = np.load(folder / f"{name}.offsets.npy", allow_pickle=False)
    path = folder / f"{name}.values.npy"
    # An empty file can't be mapped.
    values = np.load(path, mmap_mode="r" if offsets[-1] else None, allow_pickle=False)
    if len(values) != offsets[-1]:
        raise ValueError(f"column {name} has {len(values)} values, not {offsets[-1]}")
    return Ragged(values=values, offsets=offsets)
