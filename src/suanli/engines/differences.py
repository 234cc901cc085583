"""How far answers are from a reference's, for outputs of any kind: in shares of what each output's values range over.

An output whose values are in 0 to 1, such as probabilities, is measured as it is; others by how far the reference's
values spread, so that a price of 300,000 may be rounded more than a share of 0.3. Where an output isn't made of
floating-point numbers, what counts is the share of its values that differ. Where shapes differ, all does. Lists, such
as boxes, aren't compared like this but by the task's own `drift`, which pairs their entries.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from suanli.core.schema import Arrays
from suanli.engines.examples import Examples

LEAST_SPREAD = 1e-3  # of the largest value: a smaller spread is near what rounding alone causes
LIST_DRIFT = 2e-2  # the largest mean drift of lists, in which rounding may swap or drop an entry


def value_range(expected: Examples, listed: Collection[str] = ()) -> dict[str, float]:
    """What differences of each output are divided by: infinity for `listed` ones, whose values aren't compared."""
    return {
        name: math.inf if name in listed else _range([block[name] for block in expected.blocks()])
        for name in next(expected.blocks())
    }


def _range(blocks: list[np.ndarray]) -> float:
    values = [block for block in blocks if block.dtype.kind == "f" and block.size]
    low = min((float(block.min()) for block in values), default=0.0)
    high = max((float(block.max()) for block in values), default=1.0)
    if low >= 0 and high <= 1:
        return 1.0
    return max(high - low, LEAST_SPREAD * max(abs(low), abs(high)))


def largest_difference(expected: Arrays, answered: Arrays, ranges: dict[str, float]) -> float:
    """Of a single value of any output."""
    return max(float(_differences(expected[n], answered[n], ranges[n]).max(initial=0.0)) for n in expected)


def _differences(expected: np.ndarray, answered: np.ndarray, value_range: float) -> np.ndarray:
    differences: np.ndarray
    if expected.shape != answered.shape:
        return np.ones(1)
    if expected.dtype.kind == "f":
        differences = np.abs(answered - expected) / value_range
    else:
        differences = np.asarray((answered != expected).mean() / value_range, np.float64)
    return differences
