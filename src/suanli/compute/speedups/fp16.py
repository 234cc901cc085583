"""Convolutions and matrix products in float16, by autocast, with a scaled loss; the rest stays float32.

float16 has too small a range for gradients: they are scaled up before the backward pass and down after it, and a step
whose gradients overflow is skipped (Micikevicius et al., arXiv:1710.03740). For GPUs without fast bfloat16, and where
the finer rounding of float16 matters.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, autocast_dtype=torch.float16, loss_scaling=True)


def why_not(device: Device) -> str | None:
    if "float16" not in device.fast_dtypes:
        return f"{device.name} has no fast float16"
    return None


SPEEDUP = Speedup(
    name="fp16",
    stage=21,
    apply=apply,
    why_not=why_not,
    usual=True,
    tolerance=0.02,
    risks=("numerics",),
    group="precision",
    rate="float16",
)
