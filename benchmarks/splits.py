"""The arrays of a split of classified pictures or texts, for programs that know nothing of schemas."""

from __future__ import annotations

import numpy as np

from suanli.core.types import Split


def inputs_of(split: Split) -> np.ndarray:
    """(N, …) of its only input."""
    (column,) = split.inputs.values()
    assert isinstance(column, np.ndarray)
    inputs: np.ndarray = column[split.index]
    return inputs


def classes_of(split: Split) -> np.ndarray:
    """(N,) int64."""
    return np.asarray(split.targets["class"])
