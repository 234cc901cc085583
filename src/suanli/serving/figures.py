"""Statistics of one served model: counts, times and batches. `/metrics`, `/stats` and `/status` all read them here.

Every request pays for counting, so that counting is only a few additions; the readers do the arithmetic.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque

from suanli.machine.timing import percentile
from suanli.serving.bodies import Duration

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LAST = 1000  # recent requests, whose times give the percentiles


class Times:
    """The number, the sum and a histogram of durations, in seconds."""

    __slots__ = ("buckets", "count", "total_s")

    def __init__(self) -> None:
        self.count, self.total_s = 0, 0.0
        self.buckets = [0] * (len(BUCKETS_S) + 1)

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.total_s += seconds * count
        self.buckets[bisect_left(BUCKETS_S, seconds)] += count

    def to_json(self) -> Duration:
        return {"count": self.count, "ns": round(self.total_s * 1e9)}


class Figures:
    """Statistics of one version of a model since it was loaded."""

    def __init__(self) -> None:
        self.answered, self.failed, self.queue = Times(), Times(), Times()
        self.encode, self.infer, self.output = Times(), Times(), Times()
        self.refused: Counter[int] = Counter()  # by HTTP status, with those that failed
        self.batches: dict[int, Times] = {}  # by size
        self.inputs = 0
        self.restarts = 0
        self.last_s = 0.0  # time of the last answer, since 1970
        self._recent: deque[float] = deque(maxlen=LAST)

    def count_answer(self, seconds: float, inputs: int) -> None:
        """Counts a request that was answered after `seconds`."""
        self.answered.add(seconds)
        self.inputs += inputs
        self.last_s = time.time()
        self._recent.append(seconds)

    def count_failure(self, seconds: float, status: int) -> None:
        self.failed.add(seconds)
        self.refused[status] += 1

    def add_queue_time(self, seconds: float) -> None:
        self.queue.add(seconds)

    def count_batch(self, size: int, seconds: float) -> None:
        """Counts a batch that the engine computed in `seconds`."""
        if size not in self.batches:
            self.batches[size] = Times()
        self.batches[size].add(seconds)
        self.infer.add(seconds)

    def percentile_ms(self, share: float) -> float | None:
        """A percentile of the times of recent answers; None where there are none."""
        return 1e3 * percentile(list(self._recent), share) if self._recent else None
