"""The whole network compiled by TorchInductor for its shapes: fewer passes over memory.

Source: Ansel et al., "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation
and Graph Compilation", ASPLOS 2024.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.compute.speedups import _inductor
from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    _inductor.silence_tf32_advice()
    compiled = torch.compile(step.model, dynamic=False, options=_inductor.options(step.model))
    return replace(step, compute=compiled)


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if step.sharded:
        return _inductor.SHARDED
    if step.unfreezes:
        return _inductor.UNFREEZES
    return _inductor.COMMUNICATES if step.communicates else None


SPEEDUP = Speedup(
    name="compile",
    stage=70,
    apply=apply,
    why_not=_inductor.why_not,
    needless=needless,
    risks=("backend", "memory"),
    group="compile",
    slow_start=True,
    tolerance=0.01,
)
