"""Whether other programs use the cores: how long this process waits for one, and how many the others keep busy."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from suanli.machine.cpus import affinity


def core_time() -> tuple[int, int]:
    """Nanoseconds that the threads of this process ran, and that they were ready and waited for a core. 0 where the
    kernel doesn't tell."""
    ran = waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError):
            values = thread.read_text().split()
            ran, waited = ran + int(values[0]), waited + int(values[1])
    return ran, waited


class RunDelay:
    """Gives the share of the time since the last call, between 0 and 1. 0 where the kernel doesn't tell."""

    def __init__(self) -> None:
        self._before = core_time()

    def __call__(self) -> float:
        now = core_time()
        ran, waited = (max(0, after - before) for after, before in zip(now, self._before, strict=True))
        self._before = now
        return waited / (ran + waited) if ran else 0.0


class OtherPrograms:
    """Gives how many of the cores that this process may use others kept busy since the last call, other virtual
    machines among them. None where the kernel doesn't tell."""

    def __init__(self) -> None:
        self._at, self._before = time.perf_counter(), _busy_seconds()

    def __call__(self) -> float | None:
        at, now = time.perf_counter(), _busy_seconds()
        since, before, self._at, self._before = self._at, self._before, at, now
        if now is None or before is None:
            return None
        return max(0.0, now - before) / max(at - since, 1e-3)


def _busy_seconds() -> float | None:
    """Seconds that these cores weren't idle, without those of this process."""
    ours = {f"cpu{number}" for number in affinity()}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = [[int(value) for value in line[1:9]] for line in lines if line and line[0] in ours]
    except (OSError, ValueError):
        return None
    if not ticks:
        return None
    busy = sum(sum(line) - line[3] - line[4] for line in ticks)  # idle, and idle while a disk works
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])
