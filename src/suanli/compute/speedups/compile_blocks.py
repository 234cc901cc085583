"""Each repeated block compiled by itself: equal blocks share one compilation, so it starts sooner than
compiling the whole network, and gains a little less."""

from __future__ import annotations

from dataclasses import replace

from suanli.compute.speedups import _inductor
from suanli.core.types import Device, Speedup, Step
from suanli.parallel.blocks import repeated_blocks


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    _inductor.silence_tf32_advice()
    for block in repeated_blocks(step.model):
        block.compile(dynamic=False, options=_inductor.options(step.model))
    return replace(step, compute=step.model.__call__)


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if step.unfreezes:
        return _inductor.UNFREEZES
    if step.communicates:
        return _inductor.COMMUNICATES
    return None if repeated_blocks(step.model) else "the network has no repeated blocks"


SPEEDUP = Speedup(
    name="compile_blocks",
    stage=71,
    apply=apply,
    why_not=_inductor.why_not,
    needless=needless,
    risks=("backend", "memory"),
    group="compile",
    slow_start=True,
    tolerance=0.01,
)
