"""Baselines of gradient-boosted trees by scikit-learn, which is imported only when one is fitted."""

from __future__ import annotations

import numpy as np

from suanli.core.types import TreeColumns

NAME = "gradient-boosted trees"
MOST_VALUES = 255  # of a category; the codes of one that has more are taken as numbers


def classify(columns: TreeColumns, classes: np.ndarray, count: int, others: TreeColumns) -> np.ndarray | None:
    """Probabilities (M, count) of other rows, from rows of the classes (N,). None: fewer than two classes occur."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    if len(np.unique(classes)) < 2:
        return None
    model = HistGradientBoostingClassifier(categorical_features=_categories(columns), random_state=0)
    model.fit(columns.values, classes)
    probabilities = np.zeros((len(others.values), count), np.float32)
    probabilities[:, model.classes_] = model.predict_proba(others.values)
    return probabilities


def estimate(columns: TreeColumns, values: np.ndarray, others: TreeColumns) -> np.ndarray:
    """Values (M,) of other rows, from rows of the values (N,)."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    model = HistGradientBoostingRegressor(categorical_features=_categories(columns), random_state=0)
    estimates: np.ndarray = model.fit(columns.values, values).predict(others.values)
    return estimates


def _categories(columns: TreeColumns) -> np.ndarray:
    return np.array([0 < limit <= MOST_VALUES for limit in columns.cardinalities])
