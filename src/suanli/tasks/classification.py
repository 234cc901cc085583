"""Classification with one class per input: cross-entropy is the loss, accuracy the primary metric.

Scores are computed at every validation, so most come from three counts per class, in NumPy (`predict` must not import
more); tests compare them with scikit-learn. Not supported: several labels per input, ordered classes, or mistakes of
different cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from suanli.core.compare import share_difference, wilson_interval
from suanli.core.errors import DataError, Diverged
from suanli.core.types import Difference, Records, Task

if TYPE_CHECKING:
    import torch

CALIBRATION_BINS = 15
MATRIX_CLASSES = 100  # of a larger confusion matrix only the most frequent mistakes are kept
CONFUSED_PAIRS = 20


class Classification(Task):
    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    tolerance: ClassVar[float] = 0.005
    distances: ClassVar[frozenset[str]] = frozenset({"calibration_error"})

    def loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        *,
        label_smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy in float32 or better: logits (B, K), targets (B,) int64 or (B, K) shares.

        With `class_weights` (K,) it is the weighted sum over B, not divided by the sum of the weights as torch does:
        so the mean over micro-batches is the loss of the batch, and targets may be shares.
        """
        import torch
        from torch.nn import functional as F

        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        if class_weights is not None:
            class_weights = class_weights.to(logits.dtype)
        losses = F.cross_entropy(
            logits, targets, weight=class_weights, label_smoothing=label_smoothing, reduction="none"
        )
        return losses.mean()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(dim=1)

    def records(self, probabilities: np.ndarray, targets: np.ndarray) -> Records:
        """`target`, `predicted` (of equal probabilities the lowest class), `confidence` in it and the `bin` of that for
        calibration, `loss` in nats; and `rank` of the target where there are more than 5 classes."""
        _check(probabilities, targets)
        confidence = probabilities.max(1).astype(np.float64).clip(0, 1)
        records = {
            "target": targets.astype(np.int64),
            "predicted": probabilities.argmax(1),
            "confidence": confidence,
            "bin": np.ceil(confidence * CALIBRATION_BINS).astype(np.int64).clip(1) - 1,
            "loss": _losses(probabilities, targets),
        }
        return records | ({"rank": _rank(probabilities, targets)} if probabilities.shape[1] > 5 else {})

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
        if self.metric != "accuracy":
            return None
        return share_difference(*(side["predicted"] == side["target"] for side in (before, after)))

    def evaluate(self, records: Records, classes: Sequence[str]) -> dict[str, object]:
        """`per_class`, `confusion` (rows are true classes, columns predicted ones; None for more than 100 classes),
        `confused` (the most frequent mistakes) and `reliability`.

        A figure that isn't defined, such as the recall of a class without examples, is None.
        """
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
    if not len(targets):
        raise DataError("The split has no examples to evaluate.", fix="Give one with labelled inputs.")
    assert probabilities.ndim == 2, probabilities.shape
    assert targets.shape == probabilities.shape[:1], (targets.shape, probabilities.shape)
    assert 0 <= targets.min() <= targets.max() < probabilities.shape[1], "targets out of range"
    if not np.isfinite(probabilities).all():
        raise Diverged("The model's answers are not finite numbers.", fix="Train again with a lower lr or clip_norm.")


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
