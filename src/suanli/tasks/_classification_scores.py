"""The counts and sums that the scores of a classification are made of. N examples, R resamples, K classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from suanli.core.task import Records, check_predictions

CALIBRATION_BINS = 15
CONFUSED_PAIRS = 20


def confusion_matrix(records: Records, classes: int) -> np.ndarray:
    """Counts (K, K): rows are true classes, columns predicted ones."""
    return np.bincount(flat_cells(records, classes), minlength=classes * classes).reshape(classes, classes)


def flat_cells(records: Records, classes: int) -> np.ndarray:
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


def count_classes(records: Records, weights: np.ndarray, classes: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right answers, examples and predictions of each class (R, K): the diagonal and the sums of the confusion matrix,
    which itself would need too much memory for very many classes. Without `classes`, K is the highest class's."""
    classes = max(classes, *(int(records[column].max()) + 1 for column in ("target", "predicted")))
    right, occurring = _right_and_all(records, "target", weights, classes)
    return right, occurring, _sums(weights, records["predicted"], classes)


def mean_ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(R,): the mean of part / whole (R, K) over the classes whose whole isn't 0."""
    part, whole = part[:, whole.any(0)], whole[:, whole.any(0)]
    ratios = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    means: np.ndarray = ratios.sum(1) / (whole > 0).sum(1)
    return means


def check_probabilities(probabilities: np.ndarray, targets: np.ndarray) -> None:
    check_predictions({"probabilities": probabilities}, len(targets))
    assert probabilities.ndim == 2, probabilities.shape
    assert targets.shape == probabilities.shape[:1], (targets.shape, probabilities.shape)
    assert 0 <= targets.min() <= targets.max() < probabilities.shape[1], "targets out of range"


def rank_targets(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many classes rank before the true one, (N,). Of equal probabilities the lower class ranks first, as in
    argmax: a model that gives all classes the same must not score 100 %."""
    own = np.take_along_axis(probabilities, targets[:, None], 1)
    lower = np.arange(probabilities.shape[1]) < targets[:, None]
    ahead: np.ndarray = ((probabilities > own) | ((probabilities == own) & lower)).sum(1)
    return ahead


def log_losses(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log loss of each example in nats, (N,). Probabilities are clipped by their rounding unit, as in scikit-learn, so
    that one zero doesn't make the mean infinite."""
    own = np.take_along_axis(probabilities, targets[:, None], 1)[:, 0].astype(np.float64)
    unit = np.finfo(probabilities.dtype).eps
    losses: np.ndarray = -np.log(own.clip(unit, 1 - unit))
    return losses


def sum_bins(records: Records, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right answers, examples and the sum of confidences in each of 15 equally wide bins of confidence (R, 15)."""
    right, count = _right_and_all(records, "bin", weights, CALIBRATION_BINS)
    return right, count, _sums(weights * records["confidence"], records["bin"], CALIBRATION_BINS)


def calibration_error(right: np.ndarray, count: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Expected calibration error (R,): the mean difference between confidence and accuracy. Source: C. Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599."""
    full = np.where(count > 0, count, 1)
    gaps = np.abs(confidence / full - right / full) * count
    errors: np.ndarray = np.array([sum(row) for row in gaps.tolist()]) / count.sum(1)  # NumPy's sum rounds differently
    return errors


def per_class(
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


def confused_pairs(records: Records, classes: Sequence[str]) -> list[dict[str, object]]:
    """The most frequent mistakes, at most 20; equal counts in the order of the classes."""
    wrong = flat_cells(records, len(classes))[records["predicted"] != records["target"]]
    pairs, counts = np.unique(wrong, return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:CONFUSED_PAIRS]
    return [
        {"true": classes[true], "predicted": classes[predicted], "count": int(counts[i])}
        for i in worst
        for true, predicted in [divmod(int(pairs[i]), len(classes))]
    ]
