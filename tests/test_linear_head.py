"""The head that is fitted to features: as scikit-learn fits it, for any task, with the penalty of validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from suanli.core.task import Task
from suanli.tasks.classification import Classification
from suanli.tasks.multilabel import Multilabel
from suanli.tasks.regression import Regression
from suanli.training import linear_head
from suanli.training.linear_head import Examples, LinearHead, fit, mean_loss


def features(count: int = 120, length: int = 8, seed: int = 0) -> torch.Tensor:
    """Of different means and spreads, the last one constant."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(count, length)) * np.logspace(-2, 2, length) + np.linspace(-50, 50, length)
    values[:, -1] = 3.0
    return torch.from_numpy(values.astype(np.float32))


def noisy_classes(of: torch.Tensor) -> torch.Tensor:
    scaled = (of - of.mean(0)) / of.std(0).clamp(min=1e-3)
    noise = torch.randn(len(of), generator=torch.Generator().manual_seed(1))
    return ((scaled[:, 0] - scaled[:, 1] + noise) > 0).long()


def fit_on_halves(task: Task, of: torch.Tensor, targets: dict[str, torch.Tensor], like: nn.Linear) -> LinearHead:
    half = len(of) // 2
    sides = (slice(None, half), slice(half, None))
    train, val = (Examples(features=of[side], targets={n: t[side] for n, t in targets.items()}) for side in sides)
    return fit(task, train, val, like)


def standardised(of: torch.Tensor) -> np.ndarray:
    spread = of.std(0, correction=0)
    return np.asarray((of - of.mean(0)) / torch.where(spread > 1e-6, spread, torch.inf))


def test_classes_are_fitted_as_a_logistic_regression() -> None:
    x = features()
    y = noisy_classes(x)
    task = Classification(classes=("a", "b"))
    head = fit_on_halves(task, x, {"class": y}, nn.Linear(8, 2))
    assert head.loss is not None
    # scikit-learn's two-class model has one row of weights, ours two that are each other's negative: half the penalty.
    expected = LogisticRegression(C=2 / (head.penalty * 60), tol=1e-8, max_iter=10_000)
    expected.fit(standardised(x[:60]), y[:60])
    shown = standardised(x[:60])
    assert head(x[:60]).softmax(1)[:, 1].numpy() == pytest.approx(expected.predict_proba(shown)[:, 1], abs=2e-3)


def test_numbers_are_fitted_as_a_ridge_regression() -> None:
    x = features()
    y = 100 + 7 * standardised(x)[:, 2] + np.random.default_rng(2).normal(size=len(x))
    task = Regression(loss_function="mse").fit({"value": y[:60]})
    head = fit_on_halves(task, x, {"value": torch.from_numpy(y)}, nn.Linear(8, 1))
    expected = Ridge(alpha=head.penalty / 2 * 60).fit(standardised(x[:60]), (y[:60] - task.mean) / task.spread)
    assert head(x[:60])[:, 0].numpy() == pytest.approx(expected.predict(standardised(x[:60])), abs=2e-3)


def test_several_labels_and_a_head_without_bias_are_fitted() -> None:
    x = features() / 10
    y = noisy_classes(x)
    task = Multilabel(classes=("a", "b")).fit({"labels": torch.stack([y, 1 - y], 1).numpy().astype(np.float32)})
    name, column = next(iter(task.targets.items()))
    targets = {name: torch.stack([y, 1 - y], 1).to(getattr(torch, column.dtype))}
    head = fit_on_halves(task, x, targets, nn.Linear(8, 2, bias=False))
    assert head.bias is None
    assert head.weight.isfinite().all()
    assert float(mean_loss(task, head(x), targets)) < float(mean_loss(task, torch.zeros(len(x), 2), targets))


def test_the_penalty_is_the_one_with_the_smallest_validation_loss() -> None:
    x = features(length=30)  # more than 60 examples can tell apart: a weak penalty learns the noise
    y = noisy_classes(x)
    task = Classification(classes=("a", "b"))
    best = fit_on_halves(task, x, {"class": y}, nn.Linear(30, 2))
    assert best.penalty not in (linear_head.PENALTIES[0], linear_head.PENALTIES[-1])

    def with_penalty(penalty: float, monkeypatch: pytest.MonkeyPatch) -> LinearHead:
        monkeypatch.setattr(linear_head, "PENALTIES", (penalty,))
        return fit_on_halves(task, x, {"class": y}, nn.Linear(30, 2))

    with pytest.MonkeyPatch.context() as monkeypatch:
        for factor in (0.1, 10):
            other = with_penalty(best.penalty * factor, monkeypatch)
            assert other.loss is not None
            assert best.loss is not None
            assert other.loss >= best.loss


def test_without_validation_examples_there_is_a_head_all_the_same() -> None:
    x = features()
    y = noisy_classes(x)
    none: Any = Examples(features=x[:0], targets={"class": y[:0]})
    head = fit(Classification(classes=("a", "b")), Examples(features=x, targets={"class": y}), none, nn.Linear(8, 2))
    assert head.loss is None
    assert (head(x).argmax(1) == y).float().mean() > 0.7
