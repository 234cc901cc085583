"""Blocks keep only their inputs for the backward pass and compute the rest again: less memory, more time.

It makes a step slower, but lets a training continue where memory is the limit: it is used only there. Batch norms
update their running statistics only in the first pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from suanli.core.types import Device, Speedup, Step
from suanli.parallel.blocks import repeated_blocks


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    for block in repeated_blocks(step.model):
        _keep_inputs_only(block)
    return replace(step, recomputes=True)


def _keep_inputs_only(block: nn.Module) -> None:
    forward = block.forward

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _freeze_statistics(block)

    def recompute(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = recompute


@contextmanager
def _freeze_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum = 0.0  # the running statistics don't move
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def why_not(device: Device) -> str | None:  # noqa: ARG001
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    return None if repeated_blocks(step.model) else "the network has no repeated blocks"


SPEEDUP = Speedup(
    name="activation_checkpointing", stage=5, apply=apply, why_not=why_not, needless=needless, saves_memory=True
)
