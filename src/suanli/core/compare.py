"""The gate: does a faster way of computing cost more of the primary metric than the task tolerates?

Both models answer the same examples, and the scores are compared in pairs, so that what is hard for both cancels out.
The tolerance is the task's. The examples are ones that took no part in training or planning. The interval covers the
choice of examples only: two trainings also differ by chance, which a caller rules out by training again with another
seed.

For accuracy the interval is that of Agresti and Min ("Simple improved confidence intervals for comparing matched
proportions", 2005): a normal interval after half an example is added to each of the four cells, so that it has a width
even where both models agree on every example. For any other metric it is a bootstrap over the examples with a fixed
seed.
"""

from __future__ import annotations

import math

import numpy as np

from suanli.core.types import Difference, Task

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 1000
SEED = 0  # of the bootstrap, so that the same answers give the same interval


def difference(task: Task, before: np.ndarray, after: np.ndarray, targets: np.ndarray) -> Difference:
    """The difference of the task's primary metric, from the probabilities (N, K) of both models for the same examples
    in the same order, and targets (N,). Raises ValueError for no examples."""
    if task.metric == "accuracy":
        return share_difference(before.argmax(1) == targets, after.argmax(1) == targets)
    return _bootstrap(task, before, after, targets)


def share_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """The difference of the share of right answers: bool (N,) says for each example whether a model was right.
    Raises ValueError for no examples."""
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

    def change(sample: np.ndarray) -> float:
        old, new = (task.scores(p[sample], targets[sample])[task.metric] for p in (before, after))
        return new - old

    everything = np.arange(len(targets))
    measured = change(everything)
    changes = [change(random.choice(everything, len(everything))) for _ in range(RESAMPLES)]
    low, high = np.quantile(changes, [0.025, 0.975])
    return Difference(median=measured, low=min(float(low), measured), high=max(float(high), measured))
