"""Threads that wait for the others of an operation soon sleep, instead of spinning.

GNU's OpenMP (libgomp) lets a thread that waits spin for some milliseconds. Beside another program, it spins while the
thread that it waits for has no core, and so takes that core's time. libgomp spins a three-hundredth as long once this
process has more OpenMP threads than cores, whether they work or not. So an idle second pool of threads, which belongs
to a Python thread that sleeps, shortens the spinning of the first, and ends with that thread. On an idle machine, this
costs where steps have many short operations: a thread that sleeps has to be woken. Source: `do_spin` in libgomp's
config/linux/wait.h, and GOMP_SPINCOUNT in its manual.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from suanli.core.types import Device, Speedup, Step
from suanli.machine.threads import start_thread

_WORK = 1 << 20  # elements: enough for an operation to use all threads
_OTHER_LIBRARIES = ("libiomp", "libomp.")  # OpenMP of Intel and LLVM


@contextmanager
def spin_less() -> Iterator[None]:
    used, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    started, ended = threading.Event(), threading.Event()

    def hold_pool() -> None:
        try:
            torch.ones(_WORK).exp_()
        finally:
            started.set()
        ended.wait()

    holder = start_thread(hold_pool, name="suanli-short-spin", pool=max(2, cores + 2 - used))  # it is one of them
    started.wait()
    try:
        yield
    finally:
        ended.set()
        holder.join()


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, settings=(*step.settings, spin_less))


def why_not(device: Device) -> str | None:
    if device.type != "cpu":
        return "only operations on a CPU have threads"
    if not _has_libgomp():
        return "torch's threads are not those of GNU's OpenMP"
    if torch.get_num_threads() == 1:
        return "there is only one thread"
    return None


def _has_libgomp() -> bool:
    """Whether the one OpenMP library of this process is GNU's."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return False
    return "libgomp" in maps and not any(name in maps for name in _OTHER_LIBRARIES)


SPEEDUP = Speedup(
    name="short_spin",
    stage=94,
    apply=apply,
    why_not=why_not,
    delayed_effect=True,
    switchable=True,
    beside_others=True,
)
