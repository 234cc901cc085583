"""cuDNN times its algorithms for each shape of convolution once, and keeps the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from suanli.types import Device, Speedup, Step


@contextmanager
def timed_algorithms() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, settings=(*step.settings, timed_algorithms))


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


SPEEDUP = Speedup(name="cudnn_benchmark", stage=50, apply=apply, why_not=why_not, needless=needless, usual=True)
