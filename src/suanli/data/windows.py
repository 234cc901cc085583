"""Splits whose inputs are cut into windows: as examples of their own, and as people see them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from suanli.core.schema import Ragged, Stored, example_of
from suanli.core.task import Task
from suanli.core.types import Preprocess, Split


def split_windows(split: Split, task: Task) -> Split:
    """Each window as an example, with what it has of the target; those of one input are a group."""
    windows = split.windows
    if windows is None:
        return split
    owners = np.repeat(np.arange(len(windows)), np.diff(windows.offsets))
    numbers = np.arange(len(owners)) - windows.offsets[owners]
    targets = [
        task.cut(example_of(split.targets, int(owner)), geometry, windows.size)
        for owner, geometry in zip(owners, windows.geometries_of(slice(None)), strict=True)
    ]
    return Split(
        inputs=split.inputs,
        index=split.index,
        targets={name: _join([target[name] for target in targets], column) for name, column in split.targets.items()},
        names=[
            f"{split.names[owner]}#{number}" for owner, number in zip(owners.tolist(), numbers.tolist(), strict=True)
        ],
        geometries=windows.geometries,
        groups=owners if split.groups is None else split.groups[owners],
        leaks=None if split.leaks is None else split.leaks[owners],
    )


def _join(arrays: list[np.ndarray], like: Stored) -> Stored:
    if isinstance(like, Ragged):
        return Ragged.of(arrays, like=like.values)
    return np.stack(arrays).astype(like.dtype) if arrays else like[:0]


def input_of(split: Split, position: int, preprocess: Preprocess) -> dict[str, np.ndarray]:
    """The cached input of one example; one with windows as a whole."""
    rows = {name: np.asarray(array) for name, array in split.input_rows(position).items()}
    if split.windows is None:
        return rows
    return dict(preprocess.join_windows(rows, split.windows.geometries_of(split.windows.of(position))))


def values_of(columns: Mapping[str, Stored]) -> dict[str, Stored]:
    """Ragged columns, whose first axis counts windows, as columns of windows (R, …)."""
    return {name: column.values if isinstance(column, Ragged) else column for name, column in columns.items()}
