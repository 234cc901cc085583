"""float32 layers whose products oneDNN computes in bfloat16: nothing is cast outside of the kernel.

An alternative to autocast on a CPU: tensors between layers stay float32. Whether oneDNN has such kernels depends on the
processor's instructions (with AMX it has), so one convolution tests it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F

from suanli.core.types import Device, Speedup, Step
from suanli.machine.switches import set_attributes


def use_bf16_in_onednn() -> AbstractContextManager[None]:
    onednn = torch.backends.mkldnn
    places = (onednn.matmul, onednn.conv)  # type: ignore[attr-defined]
    return set_attributes(places, "fp32_precision", "bf16")


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, settings=(*step.settings, use_bf16_in_onednn))


def why_not(device: Device) -> str | None:
    if device.type != "cpu":
        return "oneDNN computes on CPUs"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch has no oneDNN"
    if not _rounds():
        return "oneDNN computes float32 layers in float32 on this processor"
    return None


@cache
def _rounds() -> bool:
    """Whether the result of a convolution changes by more than the order of its sums explains."""
    generator = torch.Generator().manual_seed(0)
    images, filters = (torch.randn(8, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator))
    exact = F.conv2d(images, filters)
    with use_bf16_in_onednn():
        rounded = F.conv2d(images, filters)
    return bool((rounded - exact).norm() > 1e-4 * exact.norm())


SPEEDUP = Speedup(
    name="onednn_bf16",
    stage=23,
    apply=apply,
    why_not=why_not,
    tolerance=0.05,
    risks=("numerics",),
    group="precision",
    raced=True,
    switchable=True,
    rate="float32 in bfloat16",
)
