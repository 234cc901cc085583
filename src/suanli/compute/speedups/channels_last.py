"""The channels of a pixel lie next to each other in memory, the layout that fast convolution kernels read.

It changes inputs and weights with four dimensions only.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    layout = torch.channels_last
    if not step.sharded:  # sharded weights are divided by rows; for most kernels the layout of the inputs is enough
        step.model.to(memory_format=layout)  # type: ignore[call-overload]
    return replace(step, memory_format=layout)


def why_not(device: Device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"not known to be faster on {device.type}"
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if not any(p.dim() == 4 for p in step.model.parameters()):
        return "the network has no two-dimensional convolutions"
    return None


SPEEDUP = Speedup(name="channels_last", stage=10, apply=apply, why_not=why_not, needless=needless, usual=True)
