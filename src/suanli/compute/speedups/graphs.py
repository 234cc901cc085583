"""The whole step, the optimizer's included, recorded as one CUDA graph and replayed."""

from __future__ import annotations

from dataclasses import replace

from suanli.core.types import Device, Speedup, Step

AT_ZERO = ("Muon", "SGD", "Adam", "AdamW")  # optimizers that are known to have a state that begins at zero


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, graph=True)


def why_not(device: Device) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs run on NVIDIA GPUs"


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if step.distributed:
        return "the other processes are asked in the middle of the step, which a graph would not wait for"
    if step.loss_scaling:
        return "a scaled loss makes each step look at its gradients, which a graph can't"
    if step.recomputes:
        return "recomputed blocks can't be recorded"
    if step.optimizer is not None and type(step.optimizer).__name__ not in AT_ZERO:
        return f"the steps before a recording can't be taken back for {type(step.optimizer).__name__}"
    return None


SPEEDUP = Speedup(name="graphs", stage=80, apply=apply, why_not=why_not, needless=needless, risks=("memory", "backend"))
