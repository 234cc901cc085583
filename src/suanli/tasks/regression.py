"""Regression: one number per input. The network learns it on the scale of the training targets (mean 0, spread 1), and
answers in the user's unit. The primary metric is the mean absolute error.

Not supported: several numbers per input, counts, or intervals around an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from suanli.core.errors import BadInput, DataError
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors
from suanli.core.sections import Line, Plot, Section, Table
from suanli.core.task import (
    FITTED,
    Answer,
    MapColors,
    Metric,
    Records,
    SuspectTarget,
    Task,
    check_predictions,
)
from suanli.core.types import Json, Positive, Target, TreeColumns
from suanli.tasks import _linear, _trees
from suanli.tasks._label_errors import suspect_values

if TYPE_CHECKING:
    import torch

RANGES = 10  # about so many of targets, in tables
ERROR_BINS = 25
POINTS = 400  # of predicted against true that the report draws, at most


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """`loss_function` is the squared ("mse") or absolute ("mae") error, or "huber": squared up to `delta`, in spreads
    of the training targets, and absolute beyond, which outliers move less."""

    name: ClassVar[str] = "regression"
    annotation: ClassVar[str] = "value"
    metric: ClassVar[Metric] = Metric(
        name="mean_absolute_error", tolerance=0.01, relative=True, higher_is_better=False, unit=""
    )
    units: ClassVar[Mapping[str, str]] = {"median_absolute_error": "", "root_mean_squared_error": ""}
    averages_views: ClassVar[bool] = True
    text_outputs: ClassVar[tuple[str, ...]] = ()

    loss_function: Literal["mse", "mae", "huber"] = "mse"
    delta: Positive = 1.0
    mean: float = field(default=0.0, metadata=FITTED)  # of the training targets
    spread: float = field(default=1.0, metadata=FITTED)  # their standard deviation
    median: float | None = field(default=None, metadata=FITTED)  # older versions didn't keep it

    # --- targets ---

    @property
    def targets(self) -> Schema:
        """One float32: predictions are no finer, and some devices have nothing wider."""
        return {"value": Column(shape=(), dtype="float32", role="value")}

    def encode(self, target: Target, geometry: Geometry) -> Arrays:  # noqa: ARG002
        """A number, as it is."""
        value = _to_float32([target])
        if not np.isfinite(value[0]):
            raise BadInput(f"Its target {target!r} is not a finite number below 3.4e38.", fix="Correct or remove it.")
        return {"value": value[0]}

    def fit(self, targets: Mapping[str, Stored]) -> Self:
        """With the mean, the median and the spread (1 where all targets are equal)."""
        values = np.asarray(targets["value"], np.float64)
        if not len(values):
            return self
        spread = float(np.ptp(values) and values.std()) or 1.0
        return replace(self, mean=float(values.mean()), spread=spread, median=float(np.median(values)))

    def count_targets(self, targets: Mapping[str, Sequence[Target]]) -> dict[str, dict[str, int]]:
        """By split and range of values, which includes its lower end, the last one both; or by value, if there are at
        most 10."""
        values = {split: _to_float32(numbers) for split, numbers in targets.items()}
        values = {split: numbers[np.isfinite(numbers)].astype(np.float64) for split, numbers in values.items()}
        names, edges = _divide(np.concatenate([*values.values()]))
        return {
            split: dict(zip(names, np.histogram(numbers, edges)[0].tolist(), strict=True))
            for split, numbers in values.items()
        }

    def refuse_unlearnable(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Raises DataError where all targets are equal, or there are none."""
        names = list(next(iter(counts.values())))
        if not names:
            raise DataError("No example has a usable target.", fix="Give examples with numbers as targets.")
        if len(names) == 1:
            raise DataError(
                f"Every target is {names[0]}: there is nothing to learn.", fix="Check where the targets come from."
            )

    def describe_counts(self, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Ranges that training doesn't cover."""
        unknown = [
            name for name, n in counts["train"].items() if not n and any(split[name] for split in counts.values())
        ]
        return [f"ranges of targets without training examples: {', '.join(unknown[:5])}"] if unknown else []

    # --- learning ---

    @property
    def model_args(self) -> dict[str, Json]:
        return {"classes": 1}

    def loss(self, outputs: Any, targets: Tensors) -> Tensors:
        """Outputs (B, 1), or (B, M, 1) of M members, on the scale of the training targets, targets (B,) in the user's
        unit. In float32 or better."""
        import torch
        from torch.nn import functional as F

        from suanli.core.members import flatten_members

        outputs, target, members = flatten_members(outputs, targets["value"])
        answers = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).squeeze(1)
        expected = ((target - self.mean) / self.spread).to(answers.dtype)
        if self.loss_function == "mse":
            total = F.mse_loss(answers, expected, reduction="sum")
        elif self.loss_function == "mae":
            total = F.l1_loss(answers, expected, reduction="sum")
        else:
            total = F.huber_loss(answers, expected, reduction="sum", delta=self.delta)
        return {self.loss_function: total / members}

    def guessing_loss(self) -> float:
        """Of always answering the mean, at most: each loss is concave in the squared error, whose mean is then 1."""
        import torch

        one_spread_off = {"value": torch.tensor([self.mean + self.spread], dtype=torch.float64)}
        return float(self.loss(torch.zeros(1, 1), one_spread_off)[self.loss_function])

    # --- answers ---

    @property
    def outputs(self) -> Schema:
        return {"value": Column(shape=(), dtype="float32", role="value")}

    def predict(self, outputs: Any) -> Tensors:
        """float32 values (B,) in the user's unit from outputs (B, 1), or the means of those of members (B, M, 1)."""
        from suanli.core.members import mean_of_members

        value: torch.Tensor = mean_of_members(outputs.float()).squeeze(1) * self.spread + self.mean
        return {"value": value}

    def answer(self, prediction: Arrays, geometry: Geometry, *, top: int) -> Answer:  # noqa: ARG002
        """The number; its text is rounded to a thousandth of the spread, or to a whole number."""
        value = float(prediction["value"])
        digits = max(0, 3 - math.floor(math.log10(self.spread)))
        return Answer(kind="value", text=f"{round(value, digits):.12g}", values={"value": value}, columns=("value",))

    def describe_target(self, target: Arrays, geometry: Geometry) -> Answer:
        return self.answer(target, geometry, top=1)

    # --- scores ---

    def records(self, predictions: Arrays, targets: Mapping[str, Stored]) -> Records:
        """`target` and `predicted`, in the user's unit."""
        target = np.asarray(targets["value"], np.float64)
        check_predictions(predictions, len(target))
        return {"target": target, "predicted": predictions["value"].astype(np.float64)}

    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:
        """All but `r2` are in the user's unit. `r2` is the share of the targets' variance that the answers explain, as
        in scikit-learn: where the targets have no variance, 1 for answers that are all exact, and else 0."""
        weights = np.ones(len(records["target"])) if weights is None else weights
        return {name: float(values[0]) for name, values in self.resampled_scores(records, weights[None]).items()}

    def resampled_scores(self, records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
        """All R at once."""
        errors, distances = _absolute_errors(records), records["target"] - records["target"].mean()
        sums = weights @ np.stack([errors, errors**2, distances, distances**2], axis=1)
        count, squared = weights.sum(1), sums[:, 1]
        variation = _variation(sums[:, 2:], records["target"], weights)
        explained = 1 - np.divide(squared, variation, out=np.zeros_like(squared), where=variation > 0)
        return {
            "mean_absolute_error": sums[:, 0] / count,
            "median_absolute_error": _median(errors, weights),
            "root_mean_squared_error": np.sqrt(squared / count),
            "r2": np.where(variation > 0, explained, squared == 0),
        }

    def constant_baseline(self, targets: Mapping[str, Stored]) -> tuple[str, Records] | None:
        """The median of the training targets, whose mean absolute error is the smallest."""
        if self.median is None:
            return None
        predictions = {"value": np.full(len(targets["value"]), self.median, np.float32)}
        return f"always answering {self.median:.4g}, the training median", self.records(predictions, targets)

    def linear_baseline(
        self, features: Any, targets: Mapping[str, Stored], other_features: Any, other_targets: Mapping[str, Stored]
    ) -> tuple[str, Records]:
        """A ridge regression."""
        values = (np.asarray(targets["value"], np.float64) - self.mean) / self.spread
        predicted = _linear.estimate(features, values, other_features) * self.spread + self.mean
        return "ridge regression", self.records({"value": predicted.astype(np.float32)}, other_targets)

    def tree_baseline(
        self,
        columns: TreeColumns,
        targets: Mapping[str, Stored],
        other_columns: TreeColumns,
        other_targets: Mapping[str, Stored],
    ) -> tuple[str, Records]:
        values = np.asarray(targets["value"], np.float64)
        predicted = _trees.estimate(columns, values, other_columns)
        return _trees.NAME, self.records({"value": predicted.astype(np.float32)}, other_targets)

    def find_suspects(self, features: np.ndarray, targets: Mapping[str, Stored]) -> list[SuspectTarget]:
        """By the residuals of a ridge regression."""
        return suspect_values(features, np.asarray(targets["value"], np.float64))

    def map_colors(self, targets: Mapping[str, Stored]) -> MapColors:
        return MapColors(values=np.asarray(targets["value"], np.float64))

    def errors(self, records: Records) -> np.ndarray:
        """The absolute error."""
        return _absolute_errors(records)

    def drift(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """The distance in spreads of the training targets."""
        distances: np.ndarray = np.abs(answered["value"].astype(np.float64) - expected["value"]) / self.spread
        return distances

    def evaluate(self, records: Records) -> dict[str, Json]:
        """`ranges` of true values with their errors, `points` (true, predicted) of some examples, evenly spread over
        the true values, and how often errors (predicted less true) are within the bins of `errors`."""
        target, predicted = records["target"], records["predicted"]
        order = np.argsort(target, kind="stable")
        some = order[np.linspace(0, len(order) - 1, min(POINTS, len(order))).round().astype(int)]
        counts, edges = np.histogram(predicted - target, ERROR_BINS)
        return {
            "ranges": _errors_by_range(target, predicted - target),
            "points": [[float(target[i]), float(predicted[i])] for i in some],
            "errors": [
                {"from": float(low), "to": float(high), "count": int(n)}
                for (low, high), n in zip(pairwise(edges), counts, strict=True)
            ],
        }

    @classmethod
    def sections(cls, figures: Mapping[str, Json]) -> list[Section]:
        sections: list[Section] = []
        if points := figures.get("points"):
            ends = [f([value for point in points for value in point]) for f in (min, max)]
            exact = Line(label="exact", points=tuple((end, end) for end in ends), is_rule=True)
            dots = Line(label="examples", points=tuple((x, y) for x, y in points), weights=(1.0,) * len(points))
            sections.append(
                Plot(
                    title="Predicted against true",
                    x_label="true value",
                    lines=(exact, dots),
                    note="Exact answers lie on the line.",
                )
            )
        if ranges := figures.get("ranges"):
            sections.append(
                Table(
                    title="Errors by true value",
                    columns=("true value", "examples", "mean absolute error", "mean error"),
                    formats=("text", "count", "number", "number"),
                    rows=tuple((r["name"], r["count"], r["mean_absolute_error"], r["mean_error"]) for r in ranges),
                    note="A mean error above 0: the answers are too high.",
                )
            )
        if bins := figures.get("errors"):
            shape = tuple(((one["from"] + one["to"]) / 2, float(one["count"])) for one in bins)
            sections.append(
                Plot(
                    title="Distribution of errors",
                    x_label="predicted less true value",
                    lines=(Line(label="examples", points=shape),),
                    y_range=(0, None),
                )
            )
        return sections


def _to_float32(values: Sequence[Target]) -> np.ndarray:
    """(N,); NaN for what is not a number. Too large ones become infinite."""
    numbers = [float(value) if isinstance(value, int | float | np.number) else math.nan for value in values]
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)


def _divide(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names and ends (one more) of about `RANGES` ranges that contain the values: each value by itself, where they
    are so few, or else ranges of equal width with round ends. None without values."""
    distinct = np.unique(values)
    if len(distinct) <= RANGES:
        edges = np.concatenate([distinct[:1], (distinct[1:] + distinct[:-1]) / 2, distinct[-1:]])
        return [f"{value:.9g}" for value in distinct], edges
    low, high = float(distinct[0]), float(distinct[-1])
    step = (high - low) / RANGES
    unit = 10.0 ** math.floor(math.log10(step))
    step = unit * min((1, 2, 2.5, 5, 10), key=lambda times: abs(times - step / unit))
    edges = np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
    digits = max(7, 3 + math.floor(math.log10(np.abs(edges).max())) - math.floor(math.log10(step)))
    texts = [f"{edge:.{digits}g}" for edge in edges]
    edges[[0, -1]] = min(low, edges[0]), max(high, edges[-1])  # which rounding may have moved inside
    return [f"{low} to {high}" for low, high in pairwise(texts)], edges


def _errors_by_range(target: np.ndarray, error: np.ndarray) -> list[dict[str, Json]]:
    """A mean is None where a range has no examples."""
    names, edges = _divide(target)
    places = np.clip(np.searchsorted(edges, target, side="right") - 1, 0, len(names) - 1)
    counts, sums, totals = (np.bincount(places, w, len(names)) for w in (None, error, np.abs(error)))
    return [
        {
            "name": name,
            "count": int(n),
            "mean_absolute_error": float(total / n) if n else None,
            "mean_error": float(net / n) if n else None,
        }
        for name, n, net, total in zip(names, counts, sums, totals, strict=True)
    ]


def _absolute_errors(records: Records) -> np.ndarray:
    """(N,)."""
    errors: np.ndarray = np.abs(records["predicted"] - records["target"])
    return errors


def _variation(sums: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,): the weighted sum of squared distances of values (N,) from their weighted mean, from the weighted sums
    (R, 2) of their distances from any number and of the squares of these. Where these nearly cancel out, it is computed
    anew, from one of the values: so it is exactly 0 where all that have a weight are equal."""
    count = weights.sum(1)
    variation: np.ndarray = sums[:, 1] - sums[:, 0] ** 2 / count
    for row in np.flatnonzero(variation <= 1e-3 * sums[:, 1]):
        distances = values - values[weights[row].argmax()]
        mean = weights[row] @ distances / count[row]
        variation[row] = weights[row] @ (distances - mean) ** 2
    return variation


def _median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,): the weighted median of values (N,). Where half of the weight lies exactly between two values, their mean:
    so whole weights give the median of repeated values."""
    order = np.argsort(values)
    sums = weights.take(order, axis=1).cumsum(1)  # faster than by an index
    places = [[np.searchsorted(row, row[-1] / 2, side) for side in ("left", "right")] for row in sums]
    medians: np.ndarray = values[order][np.array(places)].mean(1)
    return medians


TASK = Regression
