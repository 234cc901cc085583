"""Named arrays and what they must look like: inputs, targets, the cache, a graph's ends and the tensors of a request.

A `Schema` says of each array its shape for one example, its type and its role. `Ragged` holds arrays whose first axis
differs from example to example, as values and offsets. `Geometry` remembers how an input was resized, so that boxes and
masks find their way back to the user's own coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

Arrays: TypeAlias = Mapping[str, np.ndarray]
Tensors: TypeAlias = "Mapping[str, torch.Tensor]"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array of a schema."""

    shape: tuple[int | None, ...]  # of one example, without the batch; None first: it differs, see `Ragged`
    dtype: str
    # Of inputs "image", "tokens", "wave", "number", "category", "features"; of targets and outputs "class", "labels",
    # "boxes", "mask", "value", "text", "identity", "probabilities".
    role: str
    names: tuple[str, ...] = ()  # of the entries of the last axis, such as the classes; empty: they have none
    limit: int | None = None  # integers are below it, such as the size of a vocabulary; None: any that the type holds
    limits: tuple[int, ...] = ()  # of each entry of the last axis, where they differ; the largest is `limit`

    @property
    def bounds(self) -> np.ndarray | None:
        """Integers are below these numbers, one for all or one for each entry of the last axis; None: there are
        none."""
        return None if self.limit is None else np.array(self.limits or self.limit)

    @property
    def is_ragged(self) -> bool:
        return bool(self.shape) and self.shape[0] is None

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of one example, or of one value of a ragged column."""
        return tuple(side for side in self.shape if side is not None)

    @property
    def size_bytes(self) -> int:
        """Of one example, or of one value of a ragged column."""
        return int(np.prod(self.fixed_shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


Schema: TypeAlias = Mapping[str, Column]


def schema_bytes(schema: Schema) -> int:
    """Of one example; a ragged column counts as one value."""
    return sum(column.size_bytes for column in schema.values())


def format_shape(shape: Sequence[int | str | None]) -> str:
    """Such as "(3, ?)": a question mark is any size."""
    sides = ["?" if side is None else str(side) for side in shape]
    return f"({', '.join(sides)}{',' if len(sides) == 1 else ''})"


def zeros(schema: Schema, count: int) -> dict[str, np.ndarray]:
    """`count` examples of zeros. Ragged columns have one value an example, of length 1."""
    return {name: np.zeros((count, *_sides(column)), column.dtype) for name, column in schema.items()}


def random_inputs(schema: Schema, count: int) -> dict[str, np.ndarray]:
    """`count` random examples, from all zeros to the full range of values: noise of full strength alone may make a
    network so certain that no difference shows."""
    random = np.random.default_rng(0)
    inputs = {}
    for name, column in schema.items():
        shape, kind = (count, *_sides(column)), np.dtype(column.dtype).kind
        values: np.ndarray
        share = np.linspace(0, 1, count).reshape(count, *[1] * (len(shape) - 1))
        if kind == "f":
            values = random.standard_normal(shape) * share
        elif kind == "b":
            values = random.random(shape) < share / 2
        else:
            limit = column.limit or min(int(np.iinfo(column.dtype).max) + 1, 256)
            values = random.integers(0, np.geomspace(1, limit, count).round().astype(int).reshape(share.shape), shape)
            if column.bounds is not None:
                values = values % column.bounds
        inputs[name] = values.astype(column.dtype)
    return inputs


def pick(arrays: Arrays, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names, in this order; a single one whatever its name is. Raises ValueError for others."""
    if len(names) == len(arrays) == 1:
        return {names[0]: next(iter(arrays.values()))}
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"there is no {', '.join(missing)} among {', '.join(arrays) or 'no arrays'}")
    return {name: arrays[name] for name in names}


def _sides(column: Column) -> tuple[int, ...]:
    return tuple(1 if side is None else side for side in column.shape)


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """An array for each of N examples, all in one: example i has `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray  # (total, …)
    offsets: np.ndarray  # (N + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, position: int) -> np.ndarray:
        return self.values[self.offsets[position] : self.offsets[position + 1]]

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The arrays at these positions, padded with zeros (B, longest, …), and their lengths (B,) int64."""
        lengths = self.offsets[positions + 1] - self.offsets[positions]
        padded = np.zeros((len(positions), int(lengths.max(initial=0)), *self.values.shape[1:]), self.values.dtype)
        for row, position, length in zip(padded, positions, lengths, strict=True):
            row[:length] = self[int(position)]
        return padded, lengths

    def select(self, positions: np.ndarray) -> Ragged:
        """The examples at these positions, in memory."""
        return Ragged.of([self[int(position)] for position in positions], like=self.values)

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], *, like: np.ndarray) -> Ragged:
        """From arrays (n, …) of the type and inner shape of `like` (…, …), which may have no values."""
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(values=np.concatenate([like[:0], *arrays]), offsets=offsets)


Stored: TypeAlias = np.ndarray | Ragged  # a column of many examples: (N, …), or of different lengths
LENGTHS = "_lengths"  # a padded column of a batch is followed by its lengths (B,), under its name and this


def take(column: Stored, positions: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """The examples of a column at these positions (B,): (B, …); a ragged one padded, with its lengths."""
    if isinstance(column, Ragged):
        padded, lengths = column.take(positions)
        return {name: padded, f"{name}{LENGTHS}": lengths}
    return {name: column[positions]}


def select(column: Stored, positions: np.ndarray) -> Stored:
    """The examples of a column at these positions, in memory."""
    return column.select(positions) if isinstance(column, Ragged) else column[positions]


def example_of(columns: Mapping[str, Stored], position: int) -> dict[str, np.ndarray]:
    """One example of every column."""
    return {name: np.asarray(column[position]) for name, column in columns.items()}


def example_bytes(columns: Mapping[str, Stored]) -> int:
    """Of one example, of a ragged column on average; at least 1."""
    total = 0.0
    for column in columns.values():
        if isinstance(column, Ragged):
            total += column.values.nbytes / max(len(column), 1)
        else:
            total += column.dtype.itemsize * np.prod(column.shape[1:], dtype=np.int64)
    return max(1, int(total))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How an input became the model's: a coordinate c of axis a is c * scale[a] + shift[a] there. Axes are those of
    `size`: height and width of a picture in pixels, the length of a text in tokens."""

    size: tuple[int, ...]  # of the input as it was
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    # Of a picture: the EXIF orientation that was undone first, since annotations may be of the pixels as they are
    # stored. It is known while targets are encoded only; the cache doesn't keep it.
    orientation: int = 1

    @classmethod
    def unchanged(cls, size: Sequence[int]) -> Geometry:
        return cls(size=tuple(size), scale=(1.0,) * len(size), shift=(0.0,) * len(size))

    def to_model(self, points: np.ndarray) -> np.ndarray:
        """Points (…, axes) of the input in the model's coordinates."""
        moved: np.ndarray = points * np.asarray(self.scale) + np.asarray(self.shift)
        return moved

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """The inverse of `to_model`."""
        moved: np.ndarray = (points - np.asarray(self.shift)) / np.asarray(self.scale)
        return moved

    def to_array(self) -> np.ndarray:
        """(3, axes) float64, as the cache holds it."""
        return np.array([self.size, self.scale, self.shift], np.float64)

    @classmethod
    def from_array(cls, array: np.ndarray) -> Geometry:
        size, scale, shift = array.tolist()
        return cls(size=tuple(int(side) for side in size), scale=tuple(scale), shift=tuple(shift))


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The parts that N inputs were cut into, one after the other, R in all: see core/windows.py."""

    offsets: np.ndarray  # (N + 1,) int64: example i has those from offsets[i] to before offsets[i + 1]
    geometries: np.ndarray  # (R, 3, axes) float64, each a Geometry, from the whole input to the window
    size: tuple[int, ...]  # of a window, along the axes of its geometry

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def parts(self) -> Iterator[slice]:
        """The windows of each example."""
        return (slice(start, stop) for start, stop in pairwise(self.offsets.tolist()))

    def of(self, position: int) -> slice:
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))

    def geometries_of(self, part: slice) -> list[Geometry]:
        return [Geometry.from_array(array) for array in self.geometries[part]]
