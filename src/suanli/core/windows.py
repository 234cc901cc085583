"""Inputs that a network answers in parts, such as the tiles of a large picture: windows, which may overlap.

A `Preprocess` cuts an input into windows, the network answers each as if it were an input of its own, and
`Task.merge` makes one answer of theirs. Training has each window as an example, with the part of the target that is in
it (`Task.cut`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.schema import Arrays, Windows

if TYPE_CHECKING:
    from suanli.core.task import Task
    from suanli.core.types import EncodedInput, Preprocess


def merge_windows(task: Task, predictions: Arrays, windows: Windows | None) -> Arrays:
    """One prediction for each example (N, …), in the coordinates of the whole input, from those of its windows (R, …);
    without windows, as they are."""
    if windows is None:
        return predictions
    merged = [
        task.merge(
            {name: array[part] for name, array in predictions.items()}, windows.geometries_of(part), windows.size
        )
        for part in windows.parts()
    ]
    return {
        name: np.stack([one[name] for one in merged]) if merged else array[:0] for name, array in predictions.items()
    }


def list_windows(encoded: EncodedInput) -> list[EncodedInput]:
    """Each window of an encoded input as one of its own; itself where it has none."""
    if not encoded.windows:
        return [encoded]
    return [
        replace(encoded, arrays={name: array[i] for name, array in encoded.arrays.items()}, windows=())
        for i in range(len(encoded.windows))
    ]


def merge_answers(
    task: Task, preprocess: Preprocess, encoded: Sequence[EncodedInput], answers: Iterable[Arrays]
) -> list[Arrays]:
    """The outputs for each input from those of its windows, in their order."""
    remaining = iter(answers)
    merged: list[Arrays] = []
    for one in encoded:
        parts = list(islice(remaining, max(1, len(one.windows))))
        if one.windows:
            stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
            parts = [task.merge(stacked, one.windows, preprocess.geometry.size)]
        merged += parts
    return merged
