"""float32 matrix products and convolutions with ten bits of mantissa on NVIDIA's tensor cores.

It also speeds up what autocast leaves in float32. Source: NVIDIA A100 architecture whitepaper (2020).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step
from suanli.machine.switches import set_attributes


def use_tf32() -> AbstractContextManager[None]:
    backends = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv)  # type: ignore[attr-defined]
    return set_attributes(places, "fp32_precision", "tf32")


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, settings=(*step.settings, use_tf32))


def why_not(device: Device) -> str | None:
    if "tfloat32" not in device.fast_dtypes:
        return f"{device.name} has no TF32 units"
    return None


SPEEDUP = Speedup(
    name="tf32",
    stage=22,
    apply=apply,
    why_not=why_not,
    usual=True,
    tolerance=0.01,
    risks=("numerics",),
    raced=True,
    switchable=True,
)
