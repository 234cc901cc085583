"""Engines are timed shortly, for tests of something else."""

from __future__ import annotations

import pytest

from suanli.engines import timing


def time_shortly(patched: pytest.MonkeyPatch, *, batches: tuple[int, ...] = timing.BATCHES) -> None:
    """One round, also where other programs disturb it, with these sizes of batches."""
    for constant, value in {"TURN_S": 0.02, "ROUNDS": 1, "MOST_ROUNDS": 1, "BATCHES": batches}.items():
        patched.setattr(timing, constant, value)
