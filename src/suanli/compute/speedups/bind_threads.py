"""Each thread of an operation stays on a core of its own.

On a quiet machine nothing changes. Where another program runs too, threads that wander wait for each other at
the end of every operation. Two programs that bind would share a core; so it is used where it was measured
to help and left for others to undo: the threads may go anywhere again afterwards.
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
_TICKS = 5  # of the clock, 10 ms each: enough to tell who works from who waits
_MOST_WORK = 1_000


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
            with suppress(ProcessLookupError):  # the pool has ended it
                os.sched_setaffinity(thread, allowed)


def _workers(count: int) -> list[int]:
    """Ids of the threads that compute operations, this one first: those whose CPU time grows while one
    large operation runs."""
    own = threading.get_native_id()
    values, before = torch.ones(_WORK), _cpu_ticks()
    grown: dict[int, int] = {}
    for _ in range(_MOST_WORK):
        values.exp_().reciprocal_()
        grown = {thread: used - before.get(thread, 0) for thread, used in _cpu_ticks().items()}
        if grown.get(own, 0) >= _TICKS:
            break
    others = sorted((t for t in grown if t != own and grown[t] > 0), key=lambda t: -grown[t])
    return [own, *others][:count]


def _cpu_ticks() -> dict[int, int]:
    """Processor time of every thread of this process, in ticks of the clock."""
    found = {}
    for folder in Path("/proc/self/task").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found[int(folder.name)] = int(fields[11]) + int(fields[12])
    return found


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


SPEEDUP = Speedup(name="bind_threads", stage=95, apply=apply, why_not=why_not, needless=needless, delayed_effect=True)
