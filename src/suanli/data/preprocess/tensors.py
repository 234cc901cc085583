"""Named arrays as they are, for graphs whose inputs suanli knows nothing else about: .npz and .npy files, or arrays.

Nothing is trained on these: the columns come from the signature of an ONNX file (`engines/onnx_signature.py`).
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import numpy as np

from suanli.core.console import size
from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors, format_shape
from suanli.core.types import EncodedInput, Json, Preprocess, Preview, Raw

SUFFIXES = (".npz", ".npy")
MAX_BYTES = 4 << 30  # of the arrays in one file
_DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, KeyError)


@dataclass(frozen=True, kw_only=True)
class TensorsPreprocess(Preprocess):
    """A raw input is a mapping from names to arrays, one array where there is one column, or the bytes of an .npz or
    .npy file with these. None in the shape of a column is any size."""

    kind: ClassVar[str] = "tensors"
    roles: ClassVar[tuple[str, ...]] = ()
    media_types: ClassVar[tuple[str, ...]] = ("application/octet-stream", "application/x-www-form-urlencoded")  # curl's

    columns: Mapping[str, Column]  # of one example

    def __post_init__(self) -> None:
        columns = {
            name: column if isinstance(column, Column) else _to_column(column) for name, column in self.columns.items()
        }
        object.__setattr__(self, "columns", columns)  # JSON has mappings and lists; equal objects need equal types

    @classmethod
    def fit(cls, raws: Callable[[], Iterable[Raw]], settings: Mapping[str, Json]) -> Self:  # noqa: ARG003
        """Raises UsageError: arrays of unknown meaning are no data to train with."""
        raise UsageError(
            "Arrays of any kind are inputs of an ONNX file; no network is trained on them.",
            fix="Give images, texts or a table.",
        )

    def encode(self, raw: Raw) -> EncodedInput:
        """Raises BadInput for arrays that aren't one example, or that the graph doesn't take."""
        examples = self.split(raw)
        if len(examples) != 1:
            raise BadInput(f"it holds {len(examples):,} examples", fix="Give one at a time.")
        digest = hashlib.blake2b(digest_size=16)
        for name, array in examples[0].items():
            digest.update(f"{name}\0{array.shape}\0".encode())
            digest.update(array.tobytes())
        return EncodedInput(arrays=examples[0], digest=digest.digest(), geometry=Geometry.unchanged(()))

    def split(self, raw: Raw) -> list[dict[str, np.ndarray]]:
        """The examples in a raw input, which is one, or a batch: then every array has one axis more, in front. Raises
        BadInput."""
        arrays = self._name_arrays(_read(raw) if isinstance(raw, bytes) else raw)
        checked = {name: _check(name, arrays[name], column) for name, column in self.columns.items()}
        more = {array.ndim - len(self.columns[name].shape) for name, array in checked.items()}
        if more == {0}:
            return [checked]
        counts = {name: len(array) for name, array in checked.items() if array.ndim > len(self.columns[name].shape)}
        if more != {1} or len(set(counts.values())) > 1:
            raise BadInput(f"it is neither one example nor a batch: {_describe(checked)}", fix=self._describe_needs())
        return [{name: array[i] for name, array in checked.items()} for i in range(next(iter(counts.values())))]

    def split_file(self, name: str, read: Callable[[], Raw]) -> Iterable[tuple[str, Callable[[], Raw]]]:
        try:
            examples = self.split_batch(read())
        except OSError:  # reading it again raises that again
            examples = None
        if examples is None:
            return [(name, read)]
        return [(f"{name}[{i}]", partial(_give, example)) for i, example in enumerate(examples)]

    def split_batch(self, raw: Raw) -> Sequence[Raw] | None:
        try:
            examples = self.split(raw)
        except BadInput:  # `encode` raises it again
            return None
        return examples if len(examples) > 1 else None

    def check_size(self, raw: Raw, max_pixels: int) -> None:
        """Raises BadInput for a file that unpacks to much more than it has: 8 bytes for each of as many values."""
        try:
            members = zipfile.ZipFile(io.BytesIO(raw)).infolist() if isinstance(raw, bytes) else []
        except _DAMAGE:  # it is an .npy file, or `encode` says what is wrong
            return
        total = sum(member.file_size for member in members)
        if total > 8 * max_pixels:
            raise BadInput(f"its arrays have {size(total)}; the limit is {size(8 * max_pixels)}")

    def _name_arrays(self, arrays: object) -> Mapping[str, np.ndarray]:
        if isinstance(arrays, np.ndarray) and len(self.columns) == 1:
            return dict.fromkeys(self.columns, arrays)
        if isinstance(arrays, np.ndarray):
            raise BadInput("it is one array, and there are several inputs", fix=self._describe_needs())
        if not isinstance(arrays, Mapping):
            raise BadInput(f"an input can't be {type(arrays).__name__}", fix=self._describe_needs())
        missing = [name for name in self.columns if name not in arrays]
        if missing:
            raise BadInput(
                f"it has no array {missing[0]!r}, only {', '.join(map(repr, arrays)) or 'none'}",
                fix=self._describe_needs(),
            )
        return {name: np.asarray(arrays[name]) for name in self.columns}

    def _describe_needs(self) -> str:
        needs = ", ".join(f"{name} {c.dtype} {format_shape(c.shape)}" for name, c in self.columns.items())
        return f"Give {needs}; for a batch, each with one axis more in front."

    def measure(self, inputs: Mapping[str, Stored]) -> Self:  # noqa: ARG002
        return self

    def to_model(self, inputs: Tensors) -> Tensors:
        return inputs

    @property
    def inputs(self) -> Schema:
        return self.columns

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Open sizes count as 1."""
        return tuple(1 if side is None else side for side in next(iter(self.columns.values())).shape)

    @property
    def model_args(self) -> dict[str, Json]:
        return {}

    def preview(self, inputs: Arrays) -> Preview:
        return Preview(media_type="text/plain", content=_describe(inputs).encode())

    @classmethod
    def find_inputs(cls, path: Path) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """An .npz or .npy file, all of them below a folder, or standard input ("-"), which is the content of one."""
        if path == Path("-"):
            return [("-", sys.stdin.buffer.read)]
        if path.is_dir():
            return [(str(file.relative_to(path)), file.read_bytes) for file in find_files(path)]
        if not path.exists():
            raise DataError(f"There is no {path}.", fix="Give an .npz or .npy file, a folder of them, or '-'.")
        return [(str(path), path.read_bytes)]


def _give(raw: Raw) -> Raw:
    return raw


def find_files(folder: Path) -> list[Path]:
    """The .npz and .npy files below a folder, sorted. Raises DataError where there are none."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise DataError(f"There is no .npz or .npy file below {folder}.", fix="Give a folder that holds some.")
    return files


def read_shapes(path: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in a file, from their headers alone; an .npy file has an array for the first of `names`.
    Raises DataError."""
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                stream.seek(0)
                return {names[0]: _read_header(stream)[0]}
            with zipfile.ZipFile(stream) as archive:
                shapes = {}
                for member in _members(archive):
                    with archive.open(member) as content:
                        shapes[member.filename.removesuffix(".npy")] = _read_header(content)[0]
                return shapes
    except _DAMAGE as error:
        raise DataError(f"{path} is not a complete .npz or .npy file ({error}).", fix="Save it again.") from error


def _to_column(values: Mapping[str, Json]) -> Column:
    return Column(
        **{**values, "shape": tuple(values["shape"]), **{n: tuple(values.get(n, ())) for n in ("names", "limits")}}
    )


def _describe(arrays: Arrays) -> str:
    return ", ".join(f"{name} {array.dtype} {format_shape(array.shape)}" for name, array in arrays.items())


def _check(name: str, array: np.ndarray, column: Column) -> np.ndarray:
    """The array in the column's type. It may have one axis more, in front."""
    more = array.ndim - len(column.shape)
    needed = f"{name} is {array.dtype} {format_shape(array.shape)}, and {column.dtype} {format_shape(column.shape)} is"
    sides = array.shape[more:] if more in (0, 1) else (None,)
    if len(sides) != len(column.shape) or any(
        side not in (None, size) for side, size in zip(column.shape, sides, strict=True)
    ):
        raise BadInput(f"{needed} needed", fix="Save arrays of that shape; for a batch, with one axis more in front.")
    dtype = np.dtype(column.dtype)
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and dtype.kind != "f"):
        raise BadInput(f"{needed} needed", fix="Save arrays of that type.")
    cast = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast, array):
        raise BadInput(f"{name} has values that {column.dtype} can't hold", fix="Save arrays of that type.")
    return cast


def _read(content: bytes) -> Mapping[str, np.ndarray] | np.ndarray:
    """The arrays of an .npz file, or the one of an .npy file. Raises BadInput."""
    stream = io.BytesIO(content)
    try:
        if not zipfile.is_zipfile(stream):
            return _read_array(content)
        with zipfile.ZipFile(stream) as archive:
            members = _members(archive)
            total = sum(member.file_size for member in members)
            if total > MAX_BYTES:
                raise BadInput(f"its arrays have {size(total)}; the limit is {size(MAX_BYTES)}")
            return {member.filename.removesuffix(".npy"): _read_array(archive.read(member)) for member in members}
    except _DAMAGE as error:
        raise BadInput(f"not a complete .npz or .npy file ({error})") from error


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if member.filename.endswith(".npy")]


def _read_array(content: bytes) -> np.ndarray:
    """Raises ValueError for a damaged array, or one of objects. A header may claim any shape; memory is only what the
    content has."""
    stream = io.BytesIO(content)
    shape, in_fortran_order, dtype = _read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    values: np.ndarray = np.frombuffer(content, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if in_fortran_order else "C")


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    return npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)


PREPROCESS = TensorsPreprocess
