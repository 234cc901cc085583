"""The whole step, the optimizer's included, captured as one CUDA graph and replayed."""

from __future__ import annotations

from dataclasses import replace

from suanli.core.types import Device, Speedup, Step

ZERO_STATE = ("Muon", "SGD", "Adam", "AdamW")  # optimizers whose state is known to start at zero


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    return replace(step, graph=True)


def why_not(device: Device) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs run on NVIDIA GPUs"


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if step.distributed:
        return "the step communicates with other processes midway, which a graph would not wait for"
    if step.loss_scaling:
        return "with loss scaling each step reads values on the host, which a graph can't"
    if step.recomputes:
        return "recomputed blocks can't be captured"
    if step.optimizer is not None and type(step.optimizer).__name__ not in ZERO_STATE:
        return f"the warm-up steps before a capture can't be undone for {type(step.optimizer).__name__}"
    return None


SPEEDUP = Speedup(name="graphs", stage=80, apply=apply, why_not=why_not, needless=needless, risks=("memory", "backend"))
