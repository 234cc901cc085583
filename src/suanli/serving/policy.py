"""The rules for batches: how many inputs make one, how long it waits for another request, when a request is refused.

They follow from the engine's curve (seconds of a batch by its size, which `suanli optimize` measured), from the time
that a request may take (`--p99-ms`), and from what is observed while serving. There is no clock and no queue here, so
that every rule can be tested by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

DEFAULT_P99_S = 1.0  # that a request may take
SIZES = (1, 2, 4, 8, 16, 32, 64)
AS_GOOD = 0.97  # the smallest batch with this share of the best rate is used, since it answers sooner
TAIL = 2.9  # mean absolute deviations between the mean and the 99th percentile of a normal distribution
NEWEST = 0.1  # weight of the newest observation in a running mean


class Curve:
    """Seconds of a batch by its size: straight lines between measured points, the last of which goes on."""

    def __init__(self, points: Mapping[int, float]) -> None:
        """`points` has at least one size. A larger batch never takes less time than a smaller one."""
        self._sizes = sorted(points)
        self._seconds: list[float] = []
        for size in self._sizes:
            self._seconds.append(max(points[size], self._seconds[-1] if self._seconds else 0.0))

    def seconds(self, size: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        i = bisect_left(sizes, size)
        if i < len(sizes) and sizes[i] == size:
            return seconds[i]
        if len(sizes) == 1 or i == 0:  # in proportion, which overestimates larger batches
            return seconds[min(i, len(sizes) - 1)] * max(1.0, size / sizes[min(i, len(sizes) - 1)])
        i = min(i, len(sizes) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i - 1] + slope * (size - sizes[i - 1])

    def rate(self, size: int) -> float:
        """Inputs a second."""
        return size / max(self.seconds(size), 1e-9)


class _Mean:
    """A running mean of observations, and of their absolute deviations from it."""

    __slots__ = ("deviation", "value")

    def __init__(self, value: float) -> None:
        self.value, self.deviation = value, 0.0

    def add(self, observed: float) -> None:
        self.deviation = (1 - NEWEST) * self.deviation + NEWEST * abs(observed - self.value)
        self.value = (1 - NEWEST) * self.value + NEWEST * observed


class Policy:
    """The rules for one model, with what was observed of it."""

    def __init__(self, curve: Curve, *, p99_s: float | None, most: int) -> None:
        """`most` is the largest batch that memory allows."""
        self.curve = curve
        sizes = [size for size in SIZES if size <= most] or [1]
        target = p99_s if p99_s is not None else max(DEFAULT_P99_S, 4 * curve.seconds(1))
        # A request that arrives just after a batch has started waits for that batch and then for its own.
        quick = [size for size in sizes if 2 * curve.seconds(size) <= target] or sizes[:1]
        best = max(curve.rate(size) for size in quick)
        self.batch = next(size for size in quick if curve.rate(size) >= AS_GOOD * best)
        self.target_s = target
        self.reachable = 2 * curve.seconds(1) <= target
        self._pace = _Mean(1.0)  # observed seconds of a batch as a multiple of the curve's
        self._outside_s = _Mean(0.0)  # time of requests before and after the queue and the engine
        self._gap_s: float | None = None  # between arrivals
        self._last = 0.0

    @property
    def pace(self) -> float:
        """Observed seconds of a batch as a multiple of the curve's."""
        return self._pace.value

    def add_arrival(self, now: float) -> None:
        """Observes that a request arrived at `now`, in seconds of any clock."""
        if self._last:
            gap = now - self._last
            self._gap_s = gap if self._gap_s is None else (1 - NEWEST) * self._gap_s + NEWEST * gap
        self._last = now

    def add_batch_time(self, size: int, seconds: float) -> None:
        """Observes that a batch of `size` came back after `seconds`, including the way there and back."""
        self._pace.add(seconds / max(self.curve.seconds(size), 1e-9))

    def add_outside_time(self, seconds: float) -> None:
        """Observes the seconds that a request spent outside the queue and the engine: to be read, decoded, answered."""
        self._outside_s.add(seconds)

    def predicted_s(self, rows: int) -> float:
        """Seconds until the last of `rows` accepted inputs is answered."""
        full, rest = divmod(rows, self.batch)
        seconds = full * self.curve.seconds(self.batch) + (self.curve.seconds(rest) if rest else 0.0)
        return seconds * self.pace

    def retry_after_s(self, rows: int, more: int) -> float | None:
        """None if `more` inputs can be answered in time behind `rows` accepted ones, else seconds after which to retry.

        An idle server accepts any request. Only one request in a hundred may be late, so what has to fit is not the
        mean, but the mean plus `TAIL` times the mean deviation.
        """
        late = 1 + TAIL * self._pace.deviation / max(self.pace, 1e-9)
        outside_s = self._outside_s.value + TAIL * self._outside_s.deviation
        if not rows or late * self.predicted_s(rows + more) + outside_s <= self.target_s:
            return None
        return self.predicted_s(rows)

    def pause_s(self, rows: int, waited_s: float) -> float:
        """How long a batch of `rows` that could begin now should wait for one more; 0: not at all.

        Waiting costs `rows` inputs the expected gap between arrivals. It saves the engine t(n) + t(1) - t(n+1), which
        each of the inputs that arrive while the batch is computed gains. So it pays only for an engine that is faster
        with larger batches, and only under load.
        """
        if self._gap_s is None or rows >= self.batch:
            return 0.0
        batch_s = self.curve.seconds(rows)
        saved_s = batch_s + self.curve.seconds(1) - self.curve.seconds(rows + 1)
        slack_s = self.target_s - waited_s - 2 * self.curve.seconds(self.batch) * self.pace
        gap_s = self._gap_s
        if gap_s <= 0 or saved_s <= 0 or gap_s > slack_s:
            return 0.0
        arriving = batch_s * self.pace / gap_s
        return gap_s if arriving * saved_s * self.pace > rows * gap_s else 0.0
