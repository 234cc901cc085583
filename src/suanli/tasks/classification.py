"""Classification with one class per input: cross-entropy is the loss, accuracy the primary metric.

Scores are computed at every validation, so most come from three counts per class, in NumPy (`predict` must not import
more); tests compare them with scikit-learn. Not supported: several labels per input, ordered classes, or mistakes of
different cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from suanli.core.compare import share_difference, wilson_interval
from suanli.core.console import plural
from suanli.core.errors import DataError
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors
from suanli.core.sections import Section
from suanli.core.task import FITTED, Answer, Metric, Records, Task, check_predictions
from suanli.core.types import Difference, Json, Target
from suanli.tasks._classification_sections import draw_figures

if TYPE_CHECKING:
    import torch

CALIBRATION_BINS = 15
MATRIX_CLASSES = 100  # of a larger confusion matrix only the most frequent mistakes are kept
CONFUSED_PAIRS = 20


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """`label_smoothing` is the share of each target that is spread over all classes; `class_weights` "balanced" lets
    each class count the same in the loss, however many examples it has."""

    name: ClassVar[str] = "classification"
    annotation: ClassVar[str] = "class"
    metric: ClassVar[Metric] = Metric(name="accuracy", tolerance=0.005)
    units: ClassVar[Mapping[str, str]] = {"log_loss": "nats"}
    distances: ClassVar[frozenset[str]] = frozenset({"calibration_error"})
    averages_views: ClassVar[bool] = True
    text_outputs: ClassVar[tuple[str, ...]] = ("label",)

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    weights: tuple[float, ...] = field(default=(), metadata=FITTED)  # of each class in the loss; empty: all count 1

    # --- targets ---

    @property
    def targets(self) -> Schema:
        """One int64 a class."""
        return {"class": Column(shape=(), dtype="int64", role="class", names=self.classes)}

    def encode(self, target: Target, geometry: Geometry) -> Arrays:  # noqa: ARG002
        """The position of a class's name."""
        return {"class": np.array(self._positions[target], np.int64)}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def fit(self, targets: Mapping[str, Stored]) -> Self:
        """With "balanced", weights in inverse proportion to the frequency of a class; 0 for one without examples."""
        if self.class_weights == "none":
            return self
        counts = np.bincount(np.asarray(targets["class"]), minlength=len(self.classes))
        weights = np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1), 0.0)
        return replace(self, weights=tuple(weights.tolist()))

    def count_targets(self, targets: Mapping[str, Sequence[Target]]) -> dict[str, dict[str, int]]:
        """By split and class."""
        return {split: dict.fromkeys(self.classes, 0) | Counter(names) for split, names in targets.items()}

    def refuse_unlearnable(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Raises DataError for one class only, and for a class that can't be both learned and evaluated."""
        totals = {name: sum(split[name] for split in counts.values()) for name in self.classes}
        filled = [name for name, n in totals.items() if n]
        if len(filled) < 2:
            raise DataError(
                f"Only one class has usable inputs: {', '.join(map(repr, filled)) or 'none'}.",
                fix="A classifier needs at least two; add a second class.",
            )
        single = [name for name in filled if totals[name] == 1]
        if single:
            others = len(single) - 1
            do = "does" if others == 1 else "do"
            also = f", and so {do} {plural(others, 'other class', 'other classes')}" if others else ""
            raise DataError(
                f"Class {single[0]!r} has a single usable input{also}.",
                fix="Training and evaluation need different inputs: add more of that class or remove it.",
            )
        untrained = [name for name in filled if counts["train"][name] == 0]
        if untrained and any(counts["train"].values()):
            raise DataError(
                f"Class {untrained[0]!r} has no training input.",
                fix="Add some to the training split, or remove the class from the others.",
            )

    def describe_counts(self, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Classes without test inputs, and without any."""
        lines = []
        if untested := [name for name, n in counts["train"].items() if n and not counts["test"][name]]:
            lines.append(f"classes without test inputs: {', '.join(untested[:10])}")
        if empty := [name for name in self.classes if not any(split[name] for split in counts.values())]:
            lines.append(f"classes without inputs: {', '.join(empty[:10])}")
        totals = [n for name in self.classes if (n := sum(split[name] for split in counts.values()))]
        if totals and max(totals) >= 3 * min(totals):
            lines.append(
                f"the largest class has {max(totals) / min(totals):.1f} times the inputs of the smallest; "
                "--set class_weights=balanced may help"
            )
        return lines

    # --- learning ---

    @property
    def model_args(self) -> dict[str, Json]:
        return {"classes": len(self.classes)}

    def loss(self, outputs: Any, targets: Tensors) -> Tensors:
        """Cross-entropy in float32 or better: logits (B, K), targets (B,) int64 or (B, K) shares.

        With weights of classes it is the weighted sum over B, not divided by the sum of the weights as torch does: so
        the mean over micro-batches is the loss of the batch, and targets may be shares.
        """
        import torch
        from torch.nn import functional as F

        logits, target = outputs.to(torch.promote_types(outputs.dtype, torch.float32)), targets["class"]
        if target.is_floating_point():
            target = target.to(logits.dtype)
        losses = F.cross_entropy(
            logits,
            target,
            weight=_on_device(self.weights, logits.device, logits.dtype) if self.weights else None,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        return {"cross_entropy": losses.sum()}

    def guessing_loss(self) -> float:
        """Of equal probabilities, averaged over the classes."""
        import torch

        count = len(self.classes)
        total = self.loss(torch.zeros(count, count), {"class": torch.arange(count)})["cross_entropy"]
        return float(total / count)

    # --- answers ---

    @property
    def outputs(self) -> Schema:
        column = Column(shape=(len(self.classes),), dtype="float32", role="probabilities", names=self.classes)
        return {"probabilities": column}

    def predict(self, outputs: Any) -> Tensors:
        """float32 probabilities (B, K) from logits (B, K)."""
        return {"probabilities": outputs.float().softmax(dim=1)}

    def answer(self, prediction: Arrays, geometry: Geometry, *, top: int) -> Answer:  # noqa: ARG002
        """The likeliest class, its probability, and the `top` likeliest, best first."""
        probabilities = prediction["probabilities"]
        best = np.argsort(-probabilities, kind="stable")[: max(top, 1)]
        ranked = {self.classes[i]: float(probabilities[i]) for i in best}
        label, probability = next(iter(ranked.items()))
        return Answer(
            kind="classes",
            text="  ".join(f"{name} {share:.1%}" for name, share in list(ranked.items())[:3]),
            values={"label": label, "probability": probability, "probabilities": ranked},
            columns=("label", "probability"),
        )

    def texts(self, predictions: Arrays, geometries: Sequence[Geometry]) -> dict[str, list[str]]:  # noqa: ARG002
        """The likeliest class of each example, without the rest of an answer, which would take most of a server's time
        for a request."""
        return {"label": [self.classes[i] for i in predictions["probabilities"].argmax(1)]}

    def describe_target(self, target: Arrays, geometry: Geometry) -> Answer:  # noqa: ARG002
        label = self.classes[int(target["class"])]
        return Answer(kind="classes", text=label, values={"label": label}, columns=("label",))

    # --- scores ---

    def records(self, predictions: Arrays, targets: Mapping[str, Stored]) -> Records:
        """`target`, `predicted` (of equal probabilities the lowest class), `confidence` in it and the `bin` of that for
        calibration, `loss` in nats; and `rank` of the target where there are more than 5 classes."""
        probabilities, target = predictions["probabilities"], np.asarray(targets["class"])
        _check(probabilities, target)
        confidence = probabilities.max(1).astype(np.float64).clip(0, 1)
        records = {
            "target": target.astype(np.int64),
            "predicted": probabilities.argmax(1),
            "confidence": confidence,
            "bin": np.ceil(confidence * CALIBRATION_BINS).astype(np.int64).clip(1) - 1,
            "loss": _losses(probabilities, target),
        }
        return records | ({"rank": _rank(probabilities, target)} if probabilities.shape[1] > 5 else {})

    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every score as a fraction, but `log_loss` in nats. `top5_accuracy` where there are more than 5 classes.

        `balanced_accuracy` is the mean recall over the classes that occur; `macro_f1` the mean F1
        over those that occur or were predicted, as in scikit-learn.
        """
        weights = np.ones(len(records["target"])) if weights is None else weights
        return {name: float(values[0]) for name, values in self.resampled_scores(records, weights[None]).items()}

    def resampled_scores(self, records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Everything but the sums over examples is computed for all R at once."""
        count = weights.sum(1)
        right, occurring, predicted = _counts(records, weights)
        scores = {"accuracy": right.sum(1) / count}
        if "rank" in records:
            scores["top5_accuracy"] = (weights * (records["rank"] < 5)).sum(1) / count
        scores["balanced_accuracy"] = _mean_ratio(right, occurring)
        scores["macro_f1"] = _mean_ratio(2 * right, occurring + predicted)
        scores["log_loss"] = (weights * records["loss"]).sum(1) / count
        scores["calibration_error"] = _calibration_error(*_bins(records, weights))
        return scores

    def closed_intervals(self, records: Records) -> dict[str, tuple[float, float]]:
        """Wilson's, of both accuracies."""
        right = {"accuracy": records["target"] == records["predicted"]}
        if "rank" in records:
            right["top5_accuracy"] = records["rank"] < 5
        return {name: wilson_interval(int(one.sum()), len(one)) for name, one in right.items()}

    def closed_difference(self, before: Records, after: Records) -> Difference | None:
        """Agresti and Min's, of the accuracy."""
        if self.metric.name != "accuracy":
            return None
        return share_difference(*(side["predicted"] == side["target"] for side in (before, after)))

    def errors(self, records: Records) -> np.ndarray:
        """The confidence in a wrong class."""
        wrong = records["predicted"] != records["target"]
        errors: np.ndarray = wrong * records["confidence"]
        return errors

    def drift(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """The total variation distance of the probabilities."""
        difference = answered["probabilities"] - expected["probabilities"]
        distances: np.ndarray = np.abs(difference).sum(1) / 2
        return distances

    def agreement(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """Whether the likeliest class is the same."""
        same: np.ndarray = expected["probabilities"].argmax(1) == answered["probabilities"].argmax(1)
        return same

    def evaluate(self, records: Records) -> dict[str, Json]:
        """`per_class`, `confusion` (rows are true classes, columns predicted ones; None for more than 100 classes),
        `confused` (the most frequent mistakes) and `reliability`.

        A figure that isn't defined, such as the recall of a class without examples, is None.
        """
        classes = self.classes
        ones = np.ones((1, len(records["target"])))
        few = len(classes) <= MATRIX_CLASSES
        return {
            "per_class": _per_class(classes, *(counts[0] for counts in _counts(records, ones, len(classes)))),
            "confusion": confusion_matrix(records, len(classes)).tolist() if few else None,
            "confused": _confused_pairs(records, classes),
            "reliability": [
                {"confidence": confidence / n if n else None, "accuracy": right / n if n else None, "count": int(n)}
                for right, n, confidence in zip(*(sums[0].tolist() for sums in _bins(records, ones)), strict=True)
            ],
        }

    @classmethod
    def sections(cls, figures: Mapping[str, Json]) -> list[Section]:
        """Scores of each class, the confusion matrix of up to 20 classes, the most frequent mistakes, calibration."""
        return draw_figures(figures)


@lru_cache(maxsize=8)
def _on_device(weights: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(K,); read once, since a step must not wait for a copy."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.float32).to(device, dtype)


def confusion_matrix(records: Records, classes: int) -> np.ndarray:
    """Counts (K, K): rows are true classes, columns predicted ones."""
    return np.bincount(_cells(records, classes), minlength=classes * classes).reshape(classes, classes)


def _cells(records: Records, classes: int) -> np.ndarray:
    """(N,): the flat position of each example in the confusion matrix."""
    cells: np.ndarray = records["target"] * classes + records["predicted"]
    return cells


def _sums(weights: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """(R, count): the sums of weights (R, N) by the place (N,) of each example."""
    return np.stack([np.bincount(places, row, count) for row in weights])


def _right_and_all(records: Records, column: str, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums (R, count) of the weights of right answers, and of all, by the values of a column."""
    right = records["target"] == records["predicted"]
    sums = _sums(weights, 2 * records[column] + right, 2 * count)
    return sums[:, 1::2], sums[:, 1::2] + sums[:, ::2]


def _counts(records: Records, weights: np.ndarray, classes: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right answers, examples and predictions of each class (R, K): the diagonal and the sums of the confusion matrix,
    which itself would need too much memory for very many classes. Without `classes`, K is the highest class's."""
    classes = max(classes, *(int(records[column].max()) + 1 for column in ("target", "predicted")))
    right, occurring = _right_and_all(records, "target", weights, classes)
    return right, occurring, _sums(weights, records["predicted"], classes)


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(R,): the mean of part / whole (R, K) over the classes whose whole isn't 0."""
    part, whole = part[:, whole.any(0)], whole[:, whole.any(0)]
    ratios = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    means: np.ndarray = ratios.sum(1) / (whole > 0).sum(1)
    return means


def _check(probabilities: np.ndarray, targets: np.ndarray) -> None:
    check_predictions({"probabilities": probabilities}, len(targets))
    assert probabilities.ndim == 2, probabilities.shape
    assert targets.shape == probabilities.shape[:1], (targets.shape, probabilities.shape)
    assert 0 <= targets.min() <= targets.max() < probabilities.shape[1], "targets out of range"


def _rank(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many classes rank before the true one, (N,). Of equal probabilities the lower class ranks first, as in
    argmax: a model that gives all classes the same must not score 100 %."""
    own = np.take_along_axis(probabilities, targets[:, None], 1)
    lower = np.arange(probabilities.shape[1]) < targets[:, None]
    ahead: np.ndarray = ((probabilities > own) | ((probabilities == own) & lower)).sum(1)
    return ahead


def _losses(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log loss of each example in nats, (N,). Probabilities are clipped by their rounding unit, as in scikit-learn, so
    that one zero doesn't make the mean infinite."""
    own = np.take_along_axis(probabilities, targets[:, None], 1)[:, 0].astype(np.float64)
    unit = np.finfo(probabilities.dtype).eps
    losses: np.ndarray = -np.log(own.clip(unit, 1 - unit))
    return losses


def _bins(records: Records, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right answers, examples and the sum of confidences in each of 15 equally wide bins of confidence (R, 15)."""
    right, count = _right_and_all(records, "bin", weights, CALIBRATION_BINS)
    return right, count, _sums(weights * records["confidence"], records["bin"], CALIBRATION_BINS)


def _calibration_error(right: np.ndarray, count: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Expected calibration error (R,): the mean difference between confidence and accuracy. Source: C. Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599."""
    full = np.where(count > 0, count, 1)
    gaps = np.abs(confidence / full - right / full) * count
    errors: np.ndarray = np.array([sum(row) for row in gaps.tolist()]) / count.sum(1)  # NumPy's sum rounds differently
    return errors


def _per_class(
    classes: Sequence[str], right: np.ndarray, occurring: np.ndarray, predicted: np.ndarray
) -> list[dict[str, object]]:
    def share(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
        return [float(p / w) if w else None for p, w in zip(part, whole, strict=True)]

    precision, recall = share(right, predicted), share(right, occurring)
    f1 = share(2 * right, occurring + predicted)
    return [
        {"name": name, "count": int(occurring[i]), "precision": precision[i], "recall": recall[i], "f1": f1[i]}
        for i, name in enumerate(classes)
    ]


def _confused_pairs(records: Records, classes: Sequence[str]) -> list[dict[str, object]]:
    """The most frequent mistakes, at most 20; equal counts in the order of the classes."""
    wrong = _cells(records, len(classes))[records["predicted"] != records["target"]]
    pairs, counts = np.unique(wrong, return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:CONFUSED_PAIRS]
    return [
        {"true": classes[true], "predicted": classes[predicted], "count": int(counts[i])}
        for i in worst
        for true, predicted in [divmod(int(pairs[i]), len(classes))]
    ]


TASK = Classification
