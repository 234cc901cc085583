"""Each thread of an operation stays on a core of its own.

On an idle machine this changes nothing. Beside another program, threads that move between cores wait for each other
at the end of every operation. But two programs that bind their threads may share a core, so this is used only where
it was measured to help. Afterwards the threads may run on any core again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from suanli.core.types import Device, Speedup, Step

_WORK = 1 << 20  # elements: every thread of the pool gets its share
_TICKS = 5  # of the clock, 10 ms each: enough to tell working threads from waiting ones
_MAX_REPEATS = 1_000


@contextmanager
def bind_threads() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)
    workers = _workers(torch.get_num_threads())
    for core, thread in zip(cores, workers, strict=False):
        os.sched_setaffinity(thread, {core})
    try:
        yield
    finally:
        for thread in workers:
            with suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(thread, allowed)


def _workers(count: int) -> list[int]:
    """Ids of the threads that compute operations, this one first: those whose CPU time grows while a large operation
    runs."""
    own = threading.get_native_id()
    values, before = torch.ones(_WORK), _cpu_ticks()
    used: dict[int, int] = {}
    for _ in range(_MAX_REPEATS):
        values.exp_().reciprocal_()
        used = {thread: ticks - before.get(thread, 0) for thread, ticks in _cpu_ticks().items()}
        if used.get(own, 0) >= _TICKS:
            break
    others = sorted((t for t in used if t != own and used[t] > 0), key=lambda t: -used[t])
    return [own, *others][:count]


def _cpu_ticks() -> dict[int, int]:
    """Processor time of every thread of this process, in ticks of the clock."""
    ticks = {}
    for folder in Path("/proc/self/task").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
    return ticks


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, settings=(*step.settings, bind_threads))


def why_not(device: Device) -> str | None:
    if device.type != "cpu":
        return "only operations on a CPU have threads"
    if not sys.platform.startswith("linux"):
        return "threads are bound on Linux only"
    if torch.get_num_threads() == 1:
        return "there is only one thread"
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    return "the thread that reads ahead would share a core" if step.read_ahead else None


SPEEDUP = Speedup(
    name="bind_threads", stage=95, apply=apply, why_not=why_not, needless=needless, delayed_effect=True, switchable=True
)
