"""cuDNN times its algorithms for each shape of convolution once, and keeps the fastest."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step
from suanli.machine.switches import set_attributes


def benchmark_algorithms() -> AbstractContextManager[None]:
    return set_attributes((torch.backends.cudnn,), "benchmark", True)


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, settings=(*step.settings, benchmark_algorithms))


def why_not(device: Device) -> str | None:
    if device.type != "cuda":
        return "cuDNN computes on NVIDIA GPUs"
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch has no cuDNN"
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    if not any(isinstance(m, convolutions) for m in step.model.modules()):
        return "the network has no convolutions"
    return None


SPEEDUP = Speedup(
    name="cudnn_benchmark", stage=50, apply=apply, why_not=why_not, needless=needless, usual=True, switchable=True
)
