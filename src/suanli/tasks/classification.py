"""Classification with one class per input: cross-entropy is the loss, accuracy the primary metric.

Scores are computed at every validation, so most come from three counts per class, in NumPy (`predict` must not import
more); tests compare them with scikit-learn. Not supported: several labels per input, ordered classes, or mistakes of
different cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from suanli.core.compare import Z_95
from suanli.core.errors import DataError, Diverged
from suanli.core.types import Task

if TYPE_CHECKING:
    import torch

CALIBRATION_BINS = 15
MATRIX_CLASSES = 100  # of a larger confusion matrix only the most frequent mistakes are kept
CONFUSED_PAIRS = 20


class Classification(Task):
    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    tolerance: ClassVar[float] = 0.005

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

    def scores(self, probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Every score as a fraction, but `log_loss` in nats. `top5_accuracy` where there are more than 5 classes.

        `balanced_accuracy` is the mean recall over the classes that occur; `macro_f1` the mean F1
        over those that occur or were predicted, as in scikit-learn. Raises DataError for an empty
        split and Diverged for probabilities that aren't finite.
        """
        _check(probabilities, targets)
        right, occurring, predicted = _counts(probabilities, targets)
        present, involved = occurring > 0, occurring + predicted > 0
        scores = {"accuracy": right.sum() / len(targets)}
        if probabilities.shape[1] > 5:
            scores["top5_accuracy"] = np.mean(_rank(probabilities, targets) < 5)
        scores["balanced_accuracy"] = np.mean(right[present] / occurring[present])
        scores["macro_f1"] = np.mean(2 * right[involved] / (occurring + predicted)[involved])
        scores["log_loss"] = _log_loss(probabilities, targets)
        scores["calibration_error"] = _calibration_error(_bins(probabilities, targets))
        return {name: float(value) for name, value in scores.items()}

    def evaluate(self, probabilities: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> dict[str, object]:
        """`interval` (95 %, of the accuracy), `per_class`, `confusion` (rows are true classes, columns predicted ones;
        None for more than 100 classes), `confused` (the most frequent mistakes) and `reliability`.

        A figure that isn't defined, such as the recall of a class without examples, is None.
        Raises as `scores` does.
        """
        _check(probabilities, targets)
        right, occurring, predicted = _counts(probabilities, targets)
        few = len(classes) <= MATRIX_CLASSES
        return {
            "interval": list(wilson_interval(int(right.sum()), len(targets))),
            "per_class": _per_class(classes, right, occurring, predicted),
            "confusion": confusion_matrix(probabilities, targets).tolist() if few else None,
            "confused": _confused_pairs(probabilities, targets, classes),
            "reliability": [
                {"confidence": confidence, "accuracy": accuracy, "count": count}
                for confidence, accuracy, count in _bins(probabilities, targets)
            ],
        }


def confusion_matrix(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Counts (K, K): rows are true classes, columns predicted ones. Of equal probabilities the lowest class is the
    prediction."""
    classes = probabilities.shape[1]
    counts = np.bincount(_cells(probabilities, targets), minlength=classes * classes)
    return counts.reshape(classes, classes)


def _cells(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N,): the flat position of each example in the confusion matrix."""
    cells: np.ndarray = targets.astype(np.int64) * probabilities.shape[1] + probabilities.argmax(1)
    return cells


def _counts(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right answers, examples and predictions of each class (K,): the diagonal and the sums of the confusion matrix,
    which itself would need too much memory for very many classes."""
    answers = probabilities.argmax(1)
    right, occurring, predicted = (
        np.bincount(which, minlength=probabilities.shape[1])
        for which in (targets[answers == targets], targets, answers)
    )
    return right, occurring, predicted


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of the share `right` of `count`; unlike the normal one it is valid for few examples and near 0 and
    1. Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927)."""
    share, z2 = right / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At 0 and 1 the exact bound is the share itself; rounding must not move it inside.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


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


def _log_loss(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean log loss in nats. Probabilities are clipped by their rounding unit, as in scikit-learn, so that one zero
    doesn't make the mean infinite."""
    own = np.take_along_axis(probabilities, targets[:, None], 1).astype(np.float64)
    unit = np.finfo(probabilities.dtype).eps
    return float(-np.log(own.clip(unit, 1 - unit)).mean())


def _bins(probabilities: np.ndarray, targets: np.ndarray) -> list[tuple[float | None, float | None, int]]:
    """Mean confidence, accuracy and count of each of 15 equally wide bins of confidence."""
    confidence = probabilities.max(1).astype(np.float64).clip(0, 1)
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(np.int64).clip(1) - 1
    right = probabilities.argmax(1) == targets
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    confidences = np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS)
    correct = np.bincount(bins, weights=right, minlength=CALIBRATION_BINS)
    return [
        (float(s / n), float(c / n), int(n)) if n else (None, None, 0)
        for s, c, n in zip(confidences, correct, counts, strict=True)
    ]


def _calibration_error(bins: Sequence[tuple[float | None, float | None, int]]) -> float:
    """Expected calibration error: the mean difference between confidence and accuracy. Source: C. Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599."""
    gaps = [abs(c - a) * n for c, a, n in bins if c is not None and a is not None]
    return sum(gaps) / sum(n for _, _, n in bins)


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


def _confused_pairs(probabilities: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> list[dict[str, object]]:
    """The most frequent mistakes, at most 20; equal counts in the order of the classes."""
    cells = _cells(probabilities, targets)
    wrong = cells[probabilities.argmax(1) != targets]
    pairs, counts = np.unique(wrong, return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:CONFUSED_PAIRS]
    return [
        {"true": classes[true], "predicted": classes[predicted], "count": int(counts[i])}
        for i in worst
        for true, predicted in [divmod(int(pairs[i]), len(classes))]
    ]


TASK = Classification
