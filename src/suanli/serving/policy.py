"""How many requests make a batch, how long one waits for the next, and when one is turned away.

Nothing here is a constant of the author's: all of it follows from the curve of the engine (seconds of a batch against
its size, which `suanli optimize` measured), from the time that a request may take (`--p99-ms`), and from what is
observed on the way. No clock and no queue is in here, so every rule can be tested by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

USUAL_S = 1.0  # that a request may take where the user doesn't say
SIZES = (1, 2, 4, 8, 16, 32, 64)
AS_GOOD = 0.97  # of the best rate: a smaller batch that has it answers sooner
TAIL = 2.9  # mean absolute deviations from the mean to the 99th percentile of a normal distribution
NEWEST = 0.1  # weight of the newest observation in a running mean


class Curve:
    """Seconds of a batch against its size: measured points, straight lines between them, the last one goes on."""

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
        if len(sizes) == 1 or i == 0:  # in proportion, which is on the safe side for larger ones
            return seconds[min(i, len(sizes) - 1)] * max(1.0, size / sizes[min(i, len(sizes) - 1)])
        i = min(i, len(sizes) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i - 1] + slope * (size - sizes[i - 1])

    def rate(self, size: int) -> float:
        """Inputs a second."""
        return size / max(self.seconds(size), 1e-9)


class _Mean:
    """A running mean of observations, and of how far they are off it."""

    __slots__ = ("deviation", "value")

    def __init__(self, value: float) -> None:
        self.value, self.deviation = value, 0.0

    def add(self, observed: float) -> None:
        self.deviation = (1 - NEWEST) * self.deviation + NEWEST * abs(observed - self.value)
        self.value = (1 - NEWEST) * self.value + NEWEST * observed


class Policy:
    """The rules for one model."""

    def __init__(self, curve: Curve, *, p99_s: float | None, most: int) -> None:
        """`most` is the largest batch that memory allows."""
        self.curve = curve
        sizes = [size for size in SIZES if size <= most] or [1]
        target = p99_s if p99_s is not None else max(USUAL_S, 4 * curve.seconds(1))
        # Whoever comes just after a batch has begun waits for all of it, and then for the one that it is in.
        quick = [size for size in sizes if 2 * curve.seconds(size) <= target] or sizes[:1]
        best = max(curve.rate(size) for size in quick)
        self.batch = next(size for size in quick if curve.rate(size) >= AS_GOOD * best)
        self.target_s = target
        self.reachable = 2 * curve.seconds(1) <= target
        self._pace = _Mean(1.0)  # observed seconds of a batch, as a multiple of the curve's
        self._outside_s = _Mean(0.0)  # that requests spend before and after the queue and the engine
        self._gap_s: float | None = None  # between arrivals
        self._last = 0.0

    @property
    def pace(self) -> float:
        """Observed seconds of a batch, as a multiple of the curve's."""
        return self._pace.value

    def add_arrival(self, now: float) -> None:
        if self._last:
            gap = now - self._last
            self._gap_s = gap if self._gap_s is None else (1 - NEWEST) * self._gap_s + NEWEST * gap
        self._last = now

    def add_batch_time(self, size: int, seconds: float) -> None:
        """A batch of `size` came back after so long, the way there and back included."""
        self._pace.add(seconds / max(self.curve.seconds(size), 1e-9))

    def add_outside_time(self, seconds: float) -> None:
        """A request took so long beside the queue and its batch: to be read, decoded and answered."""
        self._outside_s.add(seconds)

    def predicted_s(self, rows: int) -> float:
        """Until the last of `rows` that are in the house is answered."""
        full, rest = divmod(rows, self.batch)
        seconds = full * self.curve.seconds(self.batch) + (self.curve.seconds(rest) if rest else 0.0)
        return seconds * self.pace

    def retry_after_s(self, rows: int, more: int) -> float | None:
        """Seconds until there is room again, where `more` would be answered too late behind `rows`; None: come in.

        An empty house takes whatever comes. Of a hundred requests one may be late, so it isn't the mean that has to
        fit, but the mean and `TAIL` times what observations are off it.
        """
        late = 1 + TAIL * self._pace.deviation / max(self.pace, 1e-9)
        outside_s = self._outside_s.value + TAIL * self._outside_s.deviation
        if not rows or late * self.predicted_s(rows + more) + outside_s <= self.target_s:
            return None
        return self.predicted_s(rows)

    def pause_s(self, rows: int, waited_s: float) -> float:
        """How long a batch of `rows` that could begin now should wait for one more; 0: not at all.

        Waiting costs `rows` requests the expected gap. It saves the machine t(n) + t(1) - t(n+1), which gains as
        much time for each of those that arrive while the batch is computed. So it pays only for an engine that is
        better with larger batches, and only under load.
        """
        if self._gap_s is None or rows >= self.batch:
            return 0.0
        now, saved = self.curve.seconds(rows), self.curve.seconds(rows) + self.curve.seconds(1)
        saved -= self.curve.seconds(rows + 1)
        room = self.target_s - waited_s - 2 * self.curve.seconds(self.batch) * self.pace
        gap = self._gap_s
        if gap <= 0 or saved <= 0 or gap > room:
            return 0.0
        arriving = now * self.pace / gap
        return gap if arriving * saved * self.pace > rows * gap else 0.0
