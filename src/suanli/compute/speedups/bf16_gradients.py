"""Processes send each other their gradients in bfloat16: half the bytes. Weights, and the sums within each process,
stay float32.

bfloat16 has the range of float32 and 8 bits of precision: every gradient is rounded before it is sent, and so is every
sum on the way, so the error grows with the square root of the number of processes. All get the same average.

Source: the communication hooks of torch's DistributedDataParallel, of which `step_runner` has its own: torch's for
bfloat16 refuses CPUs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, reduce_dtype=torch.bfloat16)


def why_not(device: Device) -> str | None:
    return f"processes can't share {device.type}" if device.type == "mps" else None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if step.sharded:
        return "gradients of a sharded network are sent in their own precision"
    return None if step.distributed else "there is no other process to send gradients to"


SPEEDUP = Speedup(
    name="bf16_gradients",
    stage=60,
    apply=apply,
    why_not=why_not,
    needless=needless,
    distributed_only=True,
    tolerance=0.01,
    risks=("numerics",),
)
