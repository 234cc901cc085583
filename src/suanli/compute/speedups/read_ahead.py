"""A thread reads the next batches while this one is computed; to a GPU they are copied from pinned memory on a
stream of their own."""

from __future__ import annotations

from dataclasses import replace

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, read_ahead=True)


def why_not(device: Device) -> str | None:  # noqa: ARG001
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if not step.reads_cache:
        return "the batches come from the caller"
    if step.resident:
        return "nothing is read: the split lies on the device"
    return None


SPEEDUP = Speedup(name="read_ahead", stage=41, apply=apply, why_not=why_not, needless=needless)
