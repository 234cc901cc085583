"""Inputs on which engines are compared and timed, and their answers.

Most examples have the same shapes: `StackedExamples`. An engine answers any number of them at once, or one where its
graph has no open batch axis. Examples of different shapes are calls of their own: `SeparateExamples`. On disk both are
one .npy file a column, which is mapped, so that processes share what they read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from suanli.core.schema import Arrays
from suanli.core.storage import read_json, write_json

INDEX = "examples.json"
CALIBRATION_BATCH = 8  # examples that a quantizer sees at once


class Examples(ABC):
    """At least one example."""

    batches: bool  # whether one call may hold several examples; else each is called alone

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """What one call gets: copies of the examples from `start` to before `stop`, going round after the last. Without
        `batches` it can only be one."""

    @abstractmethod
    def first(self, count: int) -> Self:
        """The first `count` of them."""

    @abstractmethod
    def blocks(self) -> Iterator[Arrays]:
        """All of them in order, with an axis in front that counts examples: as one block, or a block for each."""

    @abstractmethod
    def join(self, answers: Sequence[Arrays]) -> Examples:
        """The answers to these examples, of one call after the other. Raises ValueError where they aren't as many."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Into a folder that doesn't exist yet, for `load_examples`."""


@dataclass(frozen=True, kw_only=True)
class StackedExamples(Examples):
    arrays: Arrays  # (N, …)
    batches: bool = True  # False: of a graph that takes a batch of one

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        positions = np.arange(start, stop) % len(self)
        return {name: np.asarray(array[positions]) for name, array in self.arrays.items()}

    def first(self, count: int) -> Self:
        return replace(self, arrays={name: array[:count] for name, array in self.arrays.items()})

    def blocks(self) -> Iterator[Arrays]:
        yield self.arrays

    def join(self, answers: Sequence[Arrays]) -> Examples:
        if not self.batches:
            return SeparateExamples(calls=answers)  # which may differ in shape, such as found boxes
        arrays = {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}
        for name, array in arrays.items():
            if len(array) != len(self):
                raise ValueError(f"{len(self)} inputs got {len(array)} answers ({name})")
        return replace(self, arrays=arrays)

    def save(self, folder: Path) -> None:
        _save(folder, self.arrays, batches=self.batches, shapes=None)


@dataclass(frozen=True, kw_only=True)
class SeparateExamples(Examples):
    calls: Sequence[Arrays]  # all with the same names and types, of any shapes behind an axis that counts examples
    batches: bool = field(default=False, init=False)

    def __len__(self) -> int:
        return len(self.calls)

    def batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        if stop != start + 1:
            raise ValueError(f"{stop - start} examples can't be one call: each has its own shapes")
        return {name: np.array(array) for name, array in self.calls[start % len(self)].items()}

    def first(self, count: int) -> Self:
        return replace(self, calls=self.calls[:count])

    def blocks(self) -> Iterator[Arrays]:
        yield from self.calls

    def join(self, answers: Sequence[Arrays]) -> Examples:
        return replace(self, calls=answers)

    def save(self, folder: Path) -> None:
        columns = {name: np.concatenate([np.ravel(call[name]) for call in self.calls]) for name in self.calls[0]}
        _save(
            folder, columns, batches=False, shapes=[[np.shape(call[name]) for name in columns] for call in self.calls]
        )


def _save(folder: Path, columns: Arrays, *, batches: bool, shapes: object) -> None:
    folder.mkdir()
    for number, column in enumerate(columns.values()):  # names may hold what a path can't
        np.save(folder / f"{number}.npy", column, allow_pickle=False)
    write_json(folder / INDEX, {"names": list(columns), "batches": batches, "shapes": shapes})


def load_examples(folder: Path) -> Examples:
    """What `save` wrote, as memory maps."""
    index = read_json(folder / INDEX)
    columns = {name: _map(folder / f"{number}.npy") for number, name in enumerate(index["names"])}
    if index["shapes"] is None:
        return StackedExamples(arrays=columns, batches=index["batches"])
    calls: list[dict[str, np.ndarray]] = [{} for _ in index["shapes"]]
    for number, (name, values) in enumerate(columns.items()):
        shapes = [tuple(shapes[number]) for shapes in index["shapes"]]
        ends = np.cumsum([0, *(int(np.prod(shape, dtype=np.int64)) for shape in shapes)])
        for call, shape, (start, stop) in zip(calls, shapes, pairwise(ends), strict=True):
            call[name] = values[start:stop].reshape(shape)
    return SeparateExamples(calls=calls)


def _map(path: Path) -> np.ndarray:
    try:
        column: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an array without values can't be mapped
        column = np.load(path, allow_pickle=False)
    return column


def calibration_batches(examples: Examples) -> list[Arrays]:
    """What a quantizer sees, one call after the other."""
    size = CALIBRATION_BATCH if examples.batches else 1
    return [examples.batch(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
