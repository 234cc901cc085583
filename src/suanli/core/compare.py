"""The gate: does a faster way of computing cost more of the score than the task tolerates?

Two models answer the same examples, so their scores are compared in pairs: what is hard for both cancels
out. The interval is that of the examples alone; that two trainings also differ by chance is the caller's
to rule out, by training again with another seed. The tolerance is the task's, and the examples are ones
that took no part in training or planning.

For accuracy the interval is that of Agresti and Min ("Simple improved confidence intervals for comparing
matched proportions", 2005): a normal one after half an example is added to each of the four cells, so that
it has a width even where both models agree everywhere. For any other metric it is a bootstrap over
the examples with a fixed seed.
"""

from __future__ import annotations

import math

import numpy as np

from suanli.core.types import Difference, Task

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 1000
SEED = 0  # of the bootstrap: the same answers get the same interval


def difference(task: Task, before: np.ndarray, after: np.ndarray, targets: np.ndarray) -> Difference:
    """Of the task's primary metric: probabilities (N, K) of both models for the same examples, in the same
    order, and targets (N,). Raises ValueError for no examples."""
    if task.metric == "accuracy":
        return share_difference(before.argmax(1) == targets, after.argmax(1) == targets)
    return _bootstrap(task, before, after, targets)


def share_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """Of two shares of the same examples: bool (N,), whether each was right. Raises ValueError for none."""
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"not the same examples: {before.shape} and {after.shape}")
    lost = int(np.count_nonzero(before & ~after))
    won = int(np.count_nonzero(after & ~before))
    count = len(before) + 2
    middle = (won - lost) / count
    half = Z_95 * math.sqrt(won + lost + 1 - count * middle**2) / count
    measured = (won - lost) / len(before)
    return Difference(median=measured, low=max(-1.0, middle - half), high=min(1.0, middle + half))


def _bootstrap(task: Task, before: np.ndarray, after: np.ndarray, targets: np.ndarray) -> Difference:
    if not len(targets):
        raise ValueError("no examples")
    random = np.random.default_rng(SEED)

    def drop(picked: np.ndarray) -> float:
        old, new = (task.scores(p[picked], targets[picked])[task.metric] for p in (before, after))
        return new - old

    everything = np.arange(len(targets))
    measured = drop(everything)
    found = [drop(random.choice(everything, len(everything))) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Difference(median=measured, low=min(float(low), measured), high=max(float(high), measured))
