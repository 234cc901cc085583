"""How long something takes, and whether one thing is faster than another: timing in interleaved pairs.

Other programs always use the machine too. So two things are timed in turn, round by round, and each round gives one
ratio: what slows down both sides of a round cancels out. The spread is half the interquartile range, which a few
outliers don't change.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

STEADY = 0.1  # a larger relative spread means that something else used the machine

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The distribution of repeated measurements, in their unit."""

    median: float
    half_iqr: float  # half the interquartile range; 0 for fewer than two values
    low: float
    high: float
    count: int

    @property
    def relative(self) -> float:
        return self.half_iqr / abs(self.median) if self.median else math.inf


def spread(values: Sequence[float]) -> Spread:
    """The distribution of `values`. Raises ValueError for none."""
    if not values:
        raise ValueError("no values")
    half = (percentile(values, 0.75) - percentile(values, 0.25)) / 2
    return Spread(median=statistics.median(values), half_iqr=half, low=min(values), high=max(values), count=len(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours: 0.5 is the median. Raises ValueError
    for no values."""
    ranked = sorted(values)
    if not ranked:
        raise ValueError("no values")
    position = share * (len(ranked) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (position - below)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How many times as fast the second of a pair is."""

    ratio: float  # median of the rounds' ratios
    spread: float  # half the interquartile range of the ratios
    rounds: int

    @property
    def proven(self) -> bool:
        """Whether the gain is larger than its spread, and than `TRIFLE`."""
        return self.ratio - 1 > max(self.spread, TRIFLE)


TRIFLE = 0.01  # a smaller gain isn't worth a speedup


def gain(before_s: Sequence[float], after_s: Sequence[float]) -> Gain:
    """The gain, from the seconds of both sides in each round. Raises ValueError for no rounds or unequal numbers."""
    ratios = spread([before / after for before, after in zip(before_s, after_s, strict=True)])
    return Gain(ratio=ratios.median, spread=ratios.half_iqr, rounds=ratios.count)


def seconds(work: Callable[[], object], settle: Callable[[], object] | None = None) -> float:
    """How long one call takes; `settle` waits for work that a device does asynchronously."""
    if settle is not None:
        settle()
    started = time.perf_counter()
    work()
    if settle is not None:
        settle()
    return time.perf_counter() - started


def time_interleaved(
    works: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    budget_s: float = math.inf,
    settle: Callable[[], object] | None = None,
) -> dict[Key, list[float]]:
    """Seconds of each work in each round. The works run in turn, every other round in reverse, so that none always
    follows the same one. No further round starts once `budget_s` is spent, but one timed round always runs."""
    times: dict[Key, list[float]] = {key: [] for key in works}
    started = time.perf_counter()
    for number in range(warm_up + rounds):
        if number > warm_up and time.perf_counter() - started > budget_s:
            break
        keys = list(works) if number % 2 == 0 else list(works)[::-1]
        for key in keys:
            took = seconds(works[key], settle)
            if number >= warm_up:
                times[key].append(took)
    return times
