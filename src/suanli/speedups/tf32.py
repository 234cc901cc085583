"""float32 matrix products and convolutions with ten bits of mantissa on NVIDIA's tensor cores.

It reaches what autocast leaves in float32. Source: NVIDIA A100 architecture whitepaper (2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from suanli.types import Device, Speedup, Step


@contextmanager
def tensor_float() -> Iterator[None]:
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, settings=(*step.settings, tensor_float))


def why_not(device: Device) -> str | None:
    if "tfloat32" not in device.fast_dtypes:
        return f"{device.name} has no TF32 units"
    return None


SPEEDUP = Speedup(name="tf32", stage=22, apply=apply, why_not=why_not, usual=True, tolerance=0.01, risks=("numerics",))
