"""Targets that are likely wrong, by what a linear model on embeddings says of examples that it hasn't learned from.

Classes by confident learning: C. G. Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels",
arXiv:1911.00068. Values by their residuals: those that are too large for chance, with the share of false discoveries of
Y. Benjamini and Y. Hochberg, 1995.
"""

from __future__ import annotations

import math

import numpy as np

from suanli.core.similarity import principal_components
from suanli.core.task import SuspectTarget
from suanli.tasks import _linear

FOLDS = 5
COMPONENTS = 64  # of the embeddings that the linear model sees
MOST_LABELS = 40  # in which errors are looked for: each takes some milliseconds
LEAST = 2 * FOLDS  # examples of a class: with fewer, none of it is judged
TEMPERATURES = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)
MOST_WRONG = 0.2  # of all targets: if more seem wrong, the embeddings don't say what the classes are
FALSE_SHARE = 0.1  # of the values that are listed, about this many at most are right


def suspect_classes(features: np.ndarray, classes: np.ndarray, count: int) -> list[SuspectTarget] | None:
    """Of examples with embeddings (N, F) and classes (N,), those whose class is likely wrong. None: can't be said."""
    probabilities = predict_classes(reduce(features), classes, count)
    if probabilities is None:
        return None
    found = find_wrong_classes(probabilities, classes)
    if len(found) > MOST_WRONG * len(classes):
        return None
    return [
        SuspectTarget(position=i, suggested={"class": np.array(label, np.int64)}, confidence=confidence)
        for i, label, confidence in found
    ]


def suspect_labels(features: np.ndarray, labels: np.ndarray) -> list[SuspectTarget]:
    """The same of labels (N, K) uint8, each of the most frequent by itself."""
    reduced, suggested, confidences = reduce(features), labels.copy(), np.zeros(len(labels))
    frequent = np.argsort(-labels.sum(0, dtype=np.int64), kind="stable")[:MOST_LABELS]
    for label in frequent.tolist():
        own = labels[:, label].astype(np.int64)
        if (probabilities := predict_classes(reduced, own, 2)) is None:
            continue
        found = find_wrong_classes(probabilities, own)
        if len(found) > MOST_WRONG * len(own):
            continue
        for i, other, confidence in found:
            suggested[i, label] = other
            confidences[i] = max(confidences[i], confidence)
    order = np.argsort(-confidences, kind="stable")[: np.count_nonzero(confidences)]
    return [
        SuspectTarget(position=int(i), suggested={"labels": suggested[i]}, confidence=float(confidences[i]))
        for i in order
    ]


def suspect_values(features: np.ndarray, values: np.ndarray) -> list[SuspectTarget]:
    """The same of values (N,) float64."""
    return [
        SuspectTarget(position=i, suggested={"value": np.array(estimate, np.float32)}, confidence=confidence)
        for i, estimate, confidence in find_wrong_values(reduce(features), values)
    ]


def divide(strata: np.ndarray, seed: int = 0) -> np.ndarray:
    """The fold (N,) of each example: all folds have about as many of each stratum (N,)."""
    shuffled = np.random.default_rng(seed).permutation(len(strata))
    order = shuffled[np.argsort(strata[shuffled], kind="stable")]
    folds = np.empty(len(strata), np.int64)
    folds[order] = np.arange(len(strata)) % FOLDS
    return folds


def reduce(features: np.ndarray) -> np.ndarray:
    """Embeddings (N, F) as what the linear model sees: few numbers, rows of a length of about 1."""
    components = principal_components(features, COMPONENTS)
    length = math.sqrt(float(np.mean(np.sum(components.astype(np.float64) ** 2, axis=1)))) or 1.0
    return np.asarray(components / length, np.float32)


def predict_classes(reduced: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray | None:
    """Probabilities (N, count), each by a model that hasn't seen the example. None: there are too few examples, or they
    are of one class."""
    folds = divide(classes)
    probabilities = np.zeros((len(classes), count), np.float32)
    for fold in range(FOLDS):
        own = folds == fold
        if not own.any():
            return None
        predicted = _linear.discriminate(reduced[~own], classes[~own], count, reduced[own])
        if predicted is None:
            return None
        probabilities[own] = predicted
    return soften(probabilities, classes)


def soften(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Probabilities (N, K) that are only as sure as they may be of these classes (N,): those of a discriminant analysis
    are nearly all 0 or 1. Source of the temperature: C. Guo et al., "On Calibration of Modern Neural Networks",
    2017."""
    logs = np.log(probabilities.astype(np.float64).clip(1e-30))

    def at(temperature: float) -> np.ndarray:
        scaled = logs / temperature
        scaled -= scaled.max(1, keepdims=True)
        return np.asarray(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))

    rows = np.arange(len(classes))
    best = max(TEMPERATURES, key=lambda temperature: at(temperature)[rows, classes].mean())
    softened: np.ndarray = np.exp(at(best))
    return softened


def find_wrong_classes(probabilities: np.ndarray, given: np.ndarray) -> list[tuple[int, int, float]]:
    """Position, suggested class and confidence of the examples whose class (N,) contradicts the probabilities (N, K),
    the surest first.

    A class is likely where its probability is at least the mean of that of the examples that are given it. An example
    is suspect where the likeliest of these classes is another than the given one. The confidence is 1 less the
    normalised margin: 0.5 where both are equally likely, 1 where the suggested class is certain.
    """
    count = probabilities.shape[1]
    sizes = np.bincount(given, minlength=count)
    own = probabilities[np.arange(len(given)), given]
    sums = np.bincount(given, weights=own, minlength=count)
    thresholds = np.where(sizes >= LEAST, sums / np.maximum(sizes, 1), np.inf)
    likely = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = likely.argmax(1)
    is_suspect = (likely.max(1) > own) & (suggested != given) & (sizes[given] >= LEAST)
    confidence = (1 + likely.max(1) - own) / 2
    suspects = np.flatnonzero(is_suspect)
    order = suspects[np.argsort(-confidence[suspects], kind="stable")]
    return [(int(i), int(suggested[i]), float(confidence[i])) for i in order]


def find_wrong_values(reduced: np.ndarray, values: np.ndarray) -> list[tuple[int, float, float]]:
    """Position, estimate and confidence of the examples whose value (N,) is too far from what others suggest, the
    farthest first. The confidence is 1 less the expected share of right values among this one and those before it, were
    the residuals of right values normal."""
    if len(values) < 2 * LEAST:
        return []
    folds = divide(np.zeros(len(values), np.int64))
    middle, width = float(values.mean()), float(values.std()) or 1.0
    estimates, scaled = np.empty(len(values)), (values - middle) / width
    for fold in range(FOLDS):
        own = folds == fold
        estimates[own] = _linear.estimate(reduced[~own], scaled[~own], reduced[own])
    estimates = estimates * width + middle
    residuals = values - estimates
    residuals -= np.median(residuals)
    spread = 1.4826 * float(np.median(np.abs(residuals)))
    if not spread > 0:
        return []
    order = np.argsort(-np.abs(residuals), kind="stable")
    chances = [math.erfc(float(abs(residuals[i])) / spread / math.sqrt(2)) for i in order]
    shares = np.array(chances) * len(values) / np.arange(1, len(values) + 1)
    shares = np.minimum.accumulate(shares[::-1])[::-1]
    listed = order[: int((shares <= FALSE_SHARE).sum())]
    return [(int(i), float(estimates[i]), float(1 - share)) for i, share in zip(listed, shares, strict=False)]
