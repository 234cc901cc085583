"""A batch that the recipe computes in micro-batches is computed at once, where memory allows.

Not for networks with batch norms: they normalise each micro-batch by itself, so larger ones would change what is
learned.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, micro_batches=1)


def why_not(device: Device) -> str | None:  # noqa: ARG001
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if step.micro_batches == 1:
        return "the batch isn't computed in parts"
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in step.model.modules()):
        return "batch norms would see other batches"
    return None


SPEEDUP = Speedup(name="whole_batch", stage=55, apply=apply, why_not=why_not, needless=needless, risks=("memory",))
