"""Whether an engine computes with all of its threads or with one, while other programs use the same cores.

The threads of a batch wait for the slowest of them, so where another program holds a core, most batches are late, some
by a whole time slice; a single thread finds a free core. The engine uses one thread as long as its batches take less
time than those of all threads. There is no clock here, so that the rule can be tested by itself.
"""

from __future__ import annotations

from collections.abc import Callable

BATCHES = 12  # of a window, at least
WINDOW_S = 0.25  # of a window, at least
DELAYED = 0.05  # share of their time that threads wait for a core: more, and one thread is tried
BETTER = 0.95  # times the other's batches that those of a choice may take to replace it
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before the choice is tried again that was slower


class ThreadChoice:
    """The choice for the next batch, `single`, from what the batches before it took."""

    def __init__(self, expected_s: Callable[[int], float], run_delay: Callable[[], float]) -> None:
        """`expected_s` gives the seconds of a batch of a size on a quiet machine. `run_delay` gives the share of the
        time since its last call that threads were ready and waited for a core."""
        self.single = False
        self._expected_s, self._run_delay = expected_s, run_delay
        self._kept_pace: float | None = None  # of the choice that is kept, while the other one is tried
        self._pause_s, self._next_trial_s = FIRST_PAUSE_S, 0.0
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        self._start_s, self._batches, self._seconds, self._expected = now, 0, 0.0, 0.0

    def add(self, size: int, seconds: float, now: float) -> None:
        """A batch of `size` took `seconds`, until `now` in seconds of any clock."""
        if not self._batches:
            self._start_s = now - seconds
        self._batches += 1
        self._seconds += seconds
        self._expected += self._expected_s(size)
        if self._batches < BATCHES or now - self._start_s < WINDOW_S:
            return
        self._choose(self._seconds / max(self._expected, 1e-9), self._run_delay(), now)
        self._begin(now)

    def _choose(self, pace: float, delay: float, now: float) -> None:
        """`pace`: the seconds of this window's batches over the expected ones."""
        if self._kept_pace is not None:  # a trial ends
            better = pace <= BETTER * self._kept_pace
            self._kept_pace = None
            self._pause_s = FIRST_PAUSE_S if better else min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._next_trial_s = now + self._pause_s
            if not better:
                self.single = not self.single
        elif now >= self._next_trial_s and (self.single or delay > DELAYED):
            self._kept_pace = pace
            self.single = not self.single
