"""One kernel for the whole optimizer step instead of several a parameter."""

from __future__ import annotations

from dataclasses import replace

from suanli.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, fused_optimizer=True)


def why_not(device: Device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"torch has no fused optimizers for {device.type}"
    return None


SPEEDUP = Speedup(name="fused_optimizer", stage=30, apply=apply, why_not=why_not)
