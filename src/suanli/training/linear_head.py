"""Fits a linear head to features: by L-BFGS, with the L2 penalty whose loss on validation data is the smallest.

Each task says its own loss, so this is a logistic regression for classes and labels, and a linear one for numbers. The
penalty is chosen by the loss, not by the primary metric: on a few hundred validation examples, a score such as accuracy
is the same for many penalties, while the loss still tells them apart, and every task has one.

Source of the optimizer: D. Liu, J. Nocedal, "On the limited memory BFGS method", 1989, as torch has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from suanli.core.schema import Tensors
from suanli.core.task import Task

# Of the mean loss over examples, for features of spread 1; from the strongest, since each fit starts from the last.
PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(2, -11, -1))
UNKNOWN = 0.1  # the penalty where there are no validation examples
WORSE = 2  # fits in a row whose validation loss rises, after which no weaker penalty is tried
ITERATIONS = 60  # of each fit
LEAST_SPREAD = 1e-6  # of a feature that tells examples apart


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Of N examples: features (N, F), and targets as `Task.loss` takes them."""

    features: torch.Tensor
    targets: Tensors


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    weight: torch.Tensor  # (K, F)
    bias: torch.Tensor | None  # (K,)
    penalty: float
    loss: float | None  # on the validation examples; None: there are none

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight, self.bias)


def fit(task: Task, train: Examples, val: Examples, like: nn.Linear) -> LinearHead:
    """A head of the form of `like`, for features of spread and mean as they are."""
    scaled, mean, spread = _standardise(train.features, centred=like.bias is not None)
    val_scaled = (val.features - mean) / spread
    weight = torch.zeros(like.weight.shape, device=scaled.device, requires_grad=True)
    bias = None if like.bias is None else torch.zeros(len(weight), device=scaled.device, requires_grad=True)
    best: tuple[float, float, torch.Tensor, torch.Tensor | None] | None = None
    worse = 0
    for penalty in PENALTIES if len(val_scaled) else (UNKNOWN,):
        _minimise(task, Examples(features=scaled, targets=train.targets), weight, bias, penalty)
        loss = math.nan
        if len(val_scaled):
            with torch.no_grad():
                loss = float(mean_loss(task, F.linear(val_scaled, weight, bias), val.targets))
        if best is None or loss < best[0]:
            best, worse = (loss, penalty, weight.detach().clone(), None if bias is None else bias.detach().clone()), 0
        else:
            worse += 1
        if worse == WORSE:
            break
    assert best is not None
    loss, penalty, best_weight, best_bias = best
    unscaled = best_weight / spread
    return LinearHead(
        weight=unscaled,
        bias=None if best_bias is None else best_bias - unscaled @ mean,
        penalty=penalty,
        loss=None if math.isnan(loss) else loss,
    )


def mean_loss(task: Task, outputs: Any, targets: Tensors) -> torch.Tensor:
    """The loss over these examples, as the training loop has it."""
    sums = task.loss(outputs, targets)
    examples = len(next(iter(targets.values())))
    counts = task.counts(targets) if task.has_counts else dict.fromkeys(sums, torch.tensor(float(examples)))
    return torch.stack([total / counts[name].clamp(min=1) for name, total in sums.items()]).sum()


def _standardise(features: torch.Tensor, *, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The features with mean 0, where they are `centred`, and spread 1; their mean; their spread."""
    if centred:
        spread, mean = torch.std_mean(features, dim=0, correction=0)
    else:  # without a bias, nothing could take the place of the mean
        spread, mean = features.square().mean(0).sqrt(), torch.zeros(features.shape[1], device=features.device)
    spread = torch.where(spread > LEAST_SPREAD, spread, torch.inf)  # a constant feature takes no part
    return (features - mean) / spread, mean, spread


def _minimise(task: Task, train: Examples, weight: torch.Tensor, bias: torch.Tensor | None, penalty: float) -> None:
    """Changes weight and bias in place."""
    parameters = [weight] if bias is None else [weight, bias]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = mean_loss(task, F.linear(train.features, weight, bias), train.targets)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
