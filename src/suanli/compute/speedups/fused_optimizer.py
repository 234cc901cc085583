"""One kernel for the whole optimizer step instead of several per parameter."""

from __future__ import annotations

from dataclasses import replace

from suanli.core.types import Device, Speedup, Step


def apply(step: Step, device: Device) -> Step:  # noqa: ARG001
    assert step.optimizer is not None
    for group in step.optimizer.param_groups:
        group |= {"fused": True, "foreach": False}
    # The kernel can unscale gradients itself. Not of a sharded network: an overflow in one process concerns all.
    step.optimizer._step_supports_amp_scaling = not step.sharded  # type: ignore[attr-defined]
    return replace(step)


def undo(step: Step) -> None:
    assert step.optimizer is not None
    for group in step.optimizer.param_groups:
        group |= {"fused": None, "foreach": None}


def why_not(device: Device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"torch has no fused optimizers for {device.type}"
    return None


def needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    if step.optimizer is None:
        return "nothing is trained"
    if not all("fused" in group for group in step.optimizer.param_groups):
        return f"{type(step.optimizer).__name__} has no fused kernel; it steps many parameters at once anyway"
    if any(group.get("differentiable") for group in step.optimizer.param_groups):
        return "a differentiable optimizer can't be fused"
    return None


SPEEDUP = Speedup(
    name="fused_optimizer",
    stage=30,
    apply=apply,
    why_not=why_not,
    needless=needless,
    usual=True,
    switchable=True,
    undo=undo,
)
