"""How sure a score is, and the gate: does a faster way of computing cost more of the primary metric than the task
tolerates?

Every score is a weighted function of one record an example, so one bootstrap serves all scores of all tasks: each
resample draws examples with replacement and weighs every example by how often it was drawn. Examples that aren't
independent, such as the pictures of one patient, form a group and are drawn together. The seed is fixed, so that the
same answers give the same interval. A task may give a closed form for independent examples.

Two models are compared on the same examples with the same weights, so that what is hard for both cancels out. The
examples are ones that took no part in training or planning. An interval covers the choice of examples only: two
trainings also differ by chance, which a caller rules out by training again with another seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from suanli.core.task import Records, Task
from suanli.core.types import Difference

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 1000
ROWS, BLOCK = 50, 1 << 18  # at most so many resamples, and weights (2 MB), are kept at once
SEED = 0


def intervals(task: Task, records: Records, groups: np.ndarray | None = None) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every score. `groups` (N,) says which examples belong together; None: all are independent.

    It is the task's closed form, or holds the middle 95 % of the resampled scores. Noise makes a distance (a score that
    `task.distances` names) larger: in the examples, and again in each resample. It adds to the square of a distance, so
    the squares are reduced by twice what resampling added. The measured score may lie near the upper end of such an
    interval or above; near 0 the interval is wider than it need be.
    """
    scores = task.scores(records)
    closed = task.closed_intervals(records) if groups is None else {}
    if closed.keys() >= scores.keys():
        return closed
    (samples,) = _resample(task, [records], groups)
    return {
        name: closed.get(name) or _interval(value, samples[name], name in task.distances)
        for name, value in scores.items()
    }


def difference(task: Task, before: Records, after: Records, groups: np.ndarray | None = None) -> Difference:
    """How much the second of two models gains in the task's primary metric, from their records of the same examples in
    the same order; `groups` as for `intervals`. Raises ValueError for different numbers of examples."""
    _check_counts(before, after)
    closed = task.closed_difference(before, after) if groups is None else None
    if closed is not None:
        return closed
    metric = task.metric
    measured = metric.gain(task.scores(before)[metric.name], task.scores(after)[metric.name])
    old, new = (
        np.concatenate(blocks)
        for blocks in zip(
            *(
                [task.resampled_metric(records, weights) for records in (before, after)]
                for weights in _draw_blocks(_count(before), groups)
            ),
            strict=True,
        )
    )
    low, high = _interval(measured, new - old if metric.higher_is_better else old - new)
    return Difference(median=measured, low=min(low, measured), high=max(high, measured))


def changes(
    task: Task, before: Records, after: Records, groups: np.ndarray | None = None
) -> dict[str, tuple[float, float, float]]:
    """How much every score of the second of two models is above the first one's, and the ends of the 95 % interval: as
    `difference`, with the direction of the score; those that aren't defined are left out. Raises ValueError for
    different numbers of examples."""
    _check_counts(before, after)
    old, new = task.scores(before), task.scores(after)
    olds, news = _resample(task, [before, after], groups)
    found = {}
    for name in old.keys() & new.keys():
        measured = new[name] - old[name]
        if math.isnan(measured):  # not defined for these examples
            continue
        samples = news[name] - olds[name]
        low, high = _interval(measured, samples[~np.isnan(samples)])
        found[name] = (measured, min(low, measured), max(high, measured))
    closed = task.closed_difference(before, after) if groups is None else None
    if closed is not None and task.metric.name in found:
        found[task.metric.name] = task.metric.change(closed)
    return {name: found[name] for name in new if name in found}


def independent_change(
    before: float, before_bounds: tuple[float, float], after: float, after_bounds: tuple[float, float]
) -> tuple[float, float, float]:
    """The difference of two scores of different examples, and its 95 % interval, from the interval of each. Source: G.
    Y. Zou and A. Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27 (2008).
    """
    (low_0, high_0), (low_1, high_1) = before_bounds, after_bounds
    measured = after - before
    low = measured - math.hypot(after - low_1, high_0 - before)
    return measured, low, measured + math.hypot(high_1 - after, before - low_0)


def mean_interval(values: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % interval of the mean of a figure of each example (N,), by the same bootstrap."""
    draws = islice(_draw(len(values), groups), RESAMPLES)
    return _interval(float(values.mean()), np.array([weights @ values / weights.sum() for weights in draws]))


def resampled_interval(
    count: int, figures: Callable[[np.ndarray], np.ndarray], measured: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95 % intervals of several figures (F,) of `count` independent examples, by the same bootstrap:
    `figures` gives them (R, F) for weights (R, count), NaN where one isn't defined."""
    samples = np.concatenate([figures(weights) for weights in _draw_blocks(count, None)])
    ends = [_interval(float(value), column) for value, column in zip(measured, samples.T, strict=True)]
    low, high = np.array(ends).reshape(-1, 2).T
    return low, high


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of the share `right` of `count`; unlike the normal one it is valid for few examples and near 0 and
    1. Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927)."""
    share, z2 = right / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At 0 and 1 the exact bound is the share itself; rounding must not move it inside.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def share_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """The difference of the share of right answers: bool (N,) says for each example whether a model was right.

    A normal interval after half an example is added to each of the four cells, so that it has a width even where both
    models agree on every example. Source: A. Agresti and Y. Min, "Simple improved confidence intervals for comparing
    matched proportions", Statistics in Medicine 24 (2005). Raises ValueError for no examples.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"not the same examples: {before.shape} and {after.shape}")
    lost = int(np.count_nonzero(before & ~after))
    won = int(np.count_nonzero(after & ~before))
    count = len(before) + 2
    middle = (won - lost) / count
    half = Z_95 * math.sqrt(won + lost + 1 - count * middle**2) / count
    measured = (won - lost) / len(before)
    return Difference(median=measured, low=max(-1.0, middle - half), high=min(1.0, middle + half))


def _count(records: Records) -> int:
    return len(next(iter(records.values())))


def _check_counts(before: Records, after: Records) -> None:
    if _count(before) != _count(after):
        raise ValueError(f"not the same examples: {_count(before)} and {_count(after)}")


def _resample(task: Task, sides: Sequence[Records], groups: np.ndarray | None) -> list[dict[str, np.ndarray]]:
    """The scores (RESAMPLES,) of each side, with the same weights for all."""
    blocks = [
        [task.resampled_scores(records, weights) for records in sides]
        for weights in _draw_blocks(_count(sides[0]), groups)
    ]
    return [
        {name: np.concatenate([one[name] for one in side]) for name in side[0]} for side in zip(*blocks, strict=True)
    ]


def _draw_blocks(count: int, groups: np.ndarray | None) -> Iterator[np.ndarray]:
    """The weights of all resamples, some rows (R, N) at a time."""
    size = max(1, min(ROWS, BLOCK // count))
    draws = _draw(count, groups)
    for start in range(0, RESAMPLES, size):
        yield np.stack(list(islice(draws, min(size, RESAMPLES - start))))


def _draw(count: int, groups: np.ndarray | None) -> Iterator[np.ndarray]:
    """Weights (N,) of one resample after another: of N - 1 draws, which makes the variance of a mean unbiased. Source:
    J. N. K. Rao and C. F. J. Wu, "Resampling inference with complex survey data", JASA 83 (1988)."""
    random = np.random.default_rng(SEED)
    places = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = int(places.max()) + 1
    while True:
        drawn = np.bincount(random.integers(units, size=max(1, units - 1)), minlength=units).astype(np.float64)
        yield drawn if groups is None else drawn[places]


def _interval(measured: float, samples: np.ndarray, distance: bool = False) -> tuple[float, float]:
    """Resamples in which a score isn't defined (NaN), such as those that drew no example of a class, don't count."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return measured, measured
    if distance:
        samples = np.sqrt(np.maximum(0, samples**2 - 2 * (np.mean(samples**2) - measured**2)))
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
