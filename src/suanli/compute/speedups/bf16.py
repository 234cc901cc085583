"""Convolutions and matrix products in bfloat16, by autocast; weights, norms and the loss stay float32.

bfloat16 has the range of float32, so no loss scaling is needed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, autocast_dtype=torch.bfloat16)


def why_not(device: Device) -> str | None:
    if "bfloat16" not in device.fast_dtypes:
        return f"{device.name} has no fast bfloat16"
    return None


SPEEDUP = Speedup(
    name="bf16",
    stage=20,
    apply=apply,
    why_not=why_not,
    usual=True,
    tolerance=0.05,
    risks=("numerics",),
    group="precision",
    raced=True,
    switchable=True,
    rate="bfloat16",
)
