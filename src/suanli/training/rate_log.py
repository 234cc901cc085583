"""How fast a training is, between two lines of its log."""

from __future__ import annotations

import time

from suanli.training.loop import Loop

LOG_EVERY_S = 1.0


class RateLog:
    """Examples per second since the last line of the log."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.note = loop, ""
        self._at, self._seconds, self._step = time.monotonic(), loop.progress.seconds, loop.progress.step

    def is_due(self) -> bool:
        return time.monotonic() - self._at >= LOG_EVERY_S

    def take(self, loss: float) -> float:
        """The rate, from which on the next one counts; `note` says it with the loss."""
        progress = self.loop.progress
        seconds = max(progress.seconds - self._seconds, 1e-9)
        rate = (progress.step - self._step) * self.loop.order.batch_size / seconds
        self._at, self._seconds, self._step = time.monotonic(), progress.seconds, progress.step
        self.note = f"{rate:,.0f}/s  loss {loss:.3f}"
        return rate
