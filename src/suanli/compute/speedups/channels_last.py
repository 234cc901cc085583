"""Channels beside each other in memory, the layout that fast convolution kernels read.

Only inputs and weights with four dimensions have the choice; others pass unchanged.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    layout = torch.channels_last
    if not step.sharded:  # weights that are shared out lie in rows; the inputs alone decide for most kernels
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
