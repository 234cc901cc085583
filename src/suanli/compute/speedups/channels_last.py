"""The channels of a pixel lie next to each other in memory, the layout that fast convolution kernels read.

It changes inputs and weights with four dimensions only.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    if not step.sharded:  # sharded weights are divided by rows; for most kernels the layout of the inputs is enough
        _lay_out(step, torch.channels_last)
    return replace(step, memory_format=torch.channels_last)


def undo(step: Step) -> None:
    _lay_out(step, torch.contiguous_format)


def _lay_out(step: Step, layout: torch.memory_format) -> None:
    """The optimizer's state too, or each of its steps would read weights in one order and moments in another."""
    step.model.to(memory_format=layout)  # type: ignore[call-overload]
    for state in step.optimizer.state.values() if step.optimizer is not None else ():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                state[name] = value.contiguous(memory_format=layout)


def why_not(device: Device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"not known to be faster on {device.type}"
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if not any(p.dim() == 4 for p in step.model.parameters()):
        return "the network has no two-dimensional convolutions"
    return None


SPEEDUP = Speedup(
    name="channels_last",
    stage=10,
    apply=apply,
    why_not=why_not,
    needless=needless,
    usual=True,
    raced=True,
    switchable=True,
    undo=undo,
)
