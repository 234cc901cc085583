"""The whole training split in the device's memory: a batch is picked there, nothing is copied."""

from __future__ import annotations

from dataclasses import replace

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, resident=True)


def why_not(device: Device) -> str | None:
    if device.type == "cpu":
        return "on a CPU the cache's pages lie in memory already"
    return None


def needless(step: Step, device: Device) -> str | None:
    if not step.can_reside:
        return f"the training split doesn't fit beside the training in the memory of {device.name}"
    return None


SPEEDUP = Speedup(
    name="resident", stage=40, apply=apply, why_not=why_not, needless=needless, usual=True, risks=("memory",)
)
