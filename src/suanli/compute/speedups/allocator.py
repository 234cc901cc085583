"""Freed memory is kept for the next step instead of being given back and asked for again.

On a CPU with glibc, tensors above 32 MiB are mapped anew at each allocation, and the kernel clears every
page of them at first touch; here they come from the heap, which keeps them (mallopt(3), M_MMAP_MAX and
M_TRIM_THRESHOLD). On a GPU, segments that can grow leave fewer gaps that are too small to use.
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
_USUAL_MAPS = 65_536
_DYNAMIC_MOST = 32 << 20  # where glibc's own adjustment of the threshold for mapping ends
_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")


@contextmanager
def keep_heap() -> Iterator[None]:
    library = _glibc()
    assert library is not None
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # glibc's own adjustment ends for good at the first call: put the values where it would have led.
        library.mallopt(_MMAP_MAX, _USUAL_MAPS)
        library.mallopt(_MMAP_THRESHOLD, _DYNAMIC_MOST)
        library.mallopt(_TRIM_THRESHOLD, 2 * _DYNAMIC_MOST)
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
    if other := _replaced():
        return f"{other} is in use, which keeps memory in its own way"
    return None


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


def _replaced() -> str | None:
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return None
    return next((name for name in _OTHERS if name in maps), None)


SPEEDUP = Speedup(name="allocator", stage=4, apply=apply, why_not=why_not, delayed_effect=True)
