"""Linear baselines by scikit-learn, which is imported only when one is fitted. Features (N, F) are arrays or sparse
matrices whose rows have a length of about 1."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

C = 10.0  # inverse strength of the penalty on weights, for rows of length 1
SHRINKAGE = 0.1  # of the covariance of features within a class, towards equal ones in all directions
ITERATIONS = 50  # of the solver: what it reaches by then is near enough
MOST_WORK = 1e8  # products in one iteration: about two seconds in all


def classify(features: Any, classes: np.ndarray, count: int, others: Any) -> np.ndarray | None:
    """Probabilities (M, count) of `others` (M, F), from features of the classes (N,). None: fewer than two classes
    occur, or it would take too long."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(classes)) < 2 or features.size * max(1, count if count > 2 else 1) > MOST_WORK:
        return None
    model = LogisticRegression(C=C, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, classes)
    probabilities = np.zeros((others.shape[0], count), np.float32)
    probabilities[:, model.classes_] = model.predict_proba(others)
    return probabilities


def discriminate(features: np.ndarray, classes: np.ndarray, count: int, others: np.ndarray) -> np.ndarray | None:
    """As `classify`, by linear discriminant analysis, which has a closed form and takes a hundredth of the time. The
    features should be few, such as principal components."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    if not 1 < len(np.unique(classes)) < len(classes):
        return None
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(features, classes)
    probabilities = np.zeros((len(others), count), np.float32)
    probabilities[:, model.classes_] = model.predict_proba(others)
    return probabilities


def estimate(features: Any, values: np.ndarray, others: Any) -> np.ndarray:
    """Values (M,) of `others` (M, F), from features of the values (N,)."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1 / C, solver="lsqr").fit(features, values)
    estimates: np.ndarray = model.predict(others)
    return estimates
