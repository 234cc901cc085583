"""Freed memory is kept for the next step instead of being returned to the system and requested again.

On a CPU with glibc, every allocation of more than 32 MiB is a new mapping, and the kernel clears each of its pages at
first touch. With this, such memory comes from the heap, which keeps it (mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD).
On a GPU, segments that can grow leave fewer gaps that are too small to use.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from suanli.core.types import Device, Speedup, Step

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_DEFAULT_MMAP_MAX = 65_536
_MAX_DYNAMIC_THRESHOLD = 32 << 20  # up to which glibc raises the threshold for mapping by itself
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


@contextmanager
def keep_heap() -> Iterator[None]:
    library = _glibc()
    assert library is not None
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # The first call of mallopt ends glibc's own adjustment for good: set the values that it would have reached.
        library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        library.mallopt(_MMAP_THRESHOLD, _MAX_DYNAMIC_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _MAX_DYNAMIC_THRESHOLD)
        library.malloc_trim(0)


@contextmanager
def use_expandable_segments() -> Iterator[None]:
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def apply(step: Step, device: Device) -> Step:
    setting = keep_heap if device.type == "cpu" else use_expandable_segments
    return replace(step, settings=(*step.settings, setting))


def why_not(device: Device) -> str | None:
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"no settings are known for {device.type}"
    if _glibc() is None:
        return "the C library is not glibc"
    if other := _other_allocator():
        return f"{other} is in use, which keeps memory in its own way"
    return None


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


def _other_allocator() -> str | None:
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return None
    return next((name for name in _OTHER_ALLOCATORS if name in maps), None)


SPEEDUP = Speedup(
    name="allocator", stage=4, apply=apply, why_not=why_not, delayed_effect=True, raced=True, switchable=True
)
