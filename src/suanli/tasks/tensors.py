"""The answers of a graph that suanli knows nothing else about: named tensors as they are.

Nothing is learned or scored: an engine is judged by how far its answers are from those of the float32 graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np

from suanli.core import schema
from suanli.core.errors import UsageError
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, format_shape
from suanli.core.task import FITTED, Answer, Metric, Records, Task
from suanli.core.types import Json, Target

LEAST_SPREAD = 0.01  # of an output's values, as a share of their size: less may be rounding


@dataclass(frozen=True, kw_only=True)
class Tensors(Task):
    """`columns` are the graph's outputs for one example; None in a shape is any size. `spreads` are the standard
    deviations of the values of each output, over some examples."""

    name: ClassVar[str] = "tensors"
    annotation: ClassVar[str] = ""  # no target goes with such outputs
    metric: ClassVar[Metric] = Metric(name="agreement", tolerance=0.01)
    text_outputs: ClassVar[tuple[str, ...]] = ()  # the tensors themselves are the answer

    columns: Mapping[str, Column] = field(default_factory=dict, metadata=FITTED)
    spreads: Mapping[str, float] = field(default_factory=dict, metadata=FITTED)

    # --- answers ---

    @property
    def outputs(self) -> Schema:
        return self.columns

    def predict(self, outputs: Any) -> schema.Tensors:
        """As they are."""
        tensors: schema.Tensors = outputs
        return tensors

    def answer(self, prediction: Arrays, geometry: Geometry, *, top: int) -> Answer:  # noqa: ARG002
        """Of each output its shape, its type and the first `top` values."""
        outputs = {
            name: {
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "first": [_to_json(value) for value in np.ravel(array)[: max(top, 1)]],
            }
            for name, array in prediction.items()
        }
        text = "  ".join(_describe(name, array) for name, array in prediction.items())
        return Answer(kind="tensors", text=text, values={"outputs": outputs})

    def drift(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """Of the output that differs most: of numbers the root mean square difference, as a share of that between two
        unrelated answers (`spreads` times the square root of 2); of integers the share that differs. At most 1."""
        drifts = [
            self._number_drift(name, expected[name], answered[name])
            if column.dtype.startswith("float")
            else _share_of_differences(expected[name], answered[name])
            for name, column in self.columns.items()
        ]
        worst: np.ndarray = np.max(drifts, axis=0)
        return worst

    def _number_drift(self, name: str, expected: np.ndarray, answered: np.ndarray) -> np.ndarray:
        """(N,)"""
        if expected.shape != answered.shape:
            return np.ones(len(expected))
        spread = self.spreads.get(name) or measure_spread(expected)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(answered.astype(np.float64) - expected)
        same = (answered == expected) | (np.isnan(answered) & np.isnan(expected))
        difference = np.where(same, 0.0, np.nan_to_num(difference, nan=np.inf, posinf=np.inf))
        squares = np.square(difference).reshape(len(expected), -1)
        drift: np.ndarray = np.sqrt(squares.sum(1) / max(squares.shape[1], 1) / 2) / spread
        return drift.clip(max=1)

    # --- what only tasks with targets have ---

    @property
    def targets(self) -> Schema:
        return {}

    @property
    def model_args(self) -> dict[str, Json]:
        _refuse("trained")

    def encode(self, target: Target, geometry: Geometry) -> Arrays:  # noqa: ARG002
        _refuse("trained")

    def count_targets(self, targets: Mapping[str, Sequence[Target]]) -> dict[str, dict[str, int]]:  # noqa: ARG002
        _refuse("trained")

    def loss(self, outputs: Any, targets: schema.Tensors) -> schema.Tensors:  # noqa: ARG002
        _refuse("trained")

    def guessing_loss(self) -> float:
        _refuse("trained")

    def records(self, predictions: Arrays, targets: Mapping[str, Stored]) -> Records:  # noqa: ARG002
        _refuse("scored")

    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:  # noqa: ARG002
        _refuse("scored")

    def describe_target(self, target: Arrays, geometry: Geometry) -> Answer:  # noqa: ARG002
        _refuse("scored")

    def errors(self, records: Records) -> np.ndarray:  # noqa: ARG002
        _refuse("scored")


def measure_spread(values: np.ndarray) -> float:
    """The standard deviation of all finite values; where it is very small, a hundredth of their root mean square."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return 1.0
    return max(float(finite.std()), LEAST_SPREAD * float(np.sqrt(np.square(finite).mean()))) or 1.0


def _share_of_differences(expected: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """(N,)"""
    if expected.shape != answered.shape:
        return np.ones(len(expected))
    differs = (expected != answered).reshape(len(expected), -1)
    share: np.ndarray = differs.sum(1) / max(differs.shape[1], 1)
    return share


def _to_json(value: np.generic) -> Json:
    """A number, or the name of one that JSON doesn't have."""
    return value.item() if np.isfinite(value) else str(value)


def _describe(name: str, array: np.ndarray) -> str:
    few = ", ".join(f"{value:.4g}" for value in np.ravel(array)[:3].tolist())
    return f"{name} {format_shape(array.shape)}: {few}{', …' if array.size > 3 else ''}"


def _refuse(what: str) -> NoReturn:
    raise UsageError(
        f"A graph whose outputs are just tensors can't be {what}: they have no targets.",
        fix="Its engines are compared by their answers: suanli optimize FILE.onnx.",
    )


TASK = Tensors
