"""Notices that a training diverges: a loss that isn't finite, or one that climbs at the start of the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from suanli.core.errors import Diverged

EARLY = 0.1  # of a run's steps: until there the loss must not climb
CLIMB_STEPS = 10  # so many losses in a row above the limit are a climb
CLIMB_RATIO = 2.0  # the limit, in times the first loss or the loss of guessing
FIX = "Train again with a lower --lr, a longer warm-up (--set warmup_epochs=2), or --set clip_norm=1."


class DivergenceCheck:
    def __init__(self, guessing_loss: Callable[[], float]) -> None:
        """`guessing_loss` gives the mean loss of a network that gives every class the same probability."""
        self._guessing_loss = guessing_loss
        self._recent: deque[float] = deque(maxlen=CLIMB_STEPS)
        self._limit: float | None = None  # known after the first loss

    def check(self, losses: torch.Tensor, first: int, steps: int) -> None:
        """Checks losses (n,) on the CPU, the first of them that of step `first` (from 0), in a run of `steps`.
        Raises Diverged."""
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            step = first + int(bad[0]) + 1
            raise Diverged(f"The loss became {losses[bad[0]].item()} at step {step}.", fix=FIX)
        if first < EARLY * steps:
            self._check_climb(losses.tolist(), first + len(losses))

    def _check_climb(self, losses: list[float], step: int) -> None:
        if self._limit is None:
            self._limit = CLIMB_RATIO * max(losses[0], self._guessing_loss())
        self._recent.extend(losses)
        if len(self._recent) == CLIMB_STEPS and min(self._recent) > self._limit:
            start = self._limit / CLIMB_RATIO
            raise Diverged(f"The loss climbed from {start:.2g} to {losses[-1]:.2g} by step {step}.", fix=FIX)
