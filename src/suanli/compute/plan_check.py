"""Whether a plan computes what plain PyTorch computes: outputs and gradients of one step on the same batch.

Gradients may differ by more than rounding alone. In a network with many layers and ReLUs the smallest change of what
goes in turns some units on and others off. So before anything is learned its gradients change much more than its
outputs: of a detector with 74 layers by 1.2 of their length for a change of 0.4 % of the weights. A plan whose outputs
agree may therefore change the gradients as much as a random change of the weights by the same share does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from suanli.compute.plan import error_tolerance, plain_plan
from suanli.compute.plan_trial import Subject, difference, free_memory, relative_error
from suanli.compute.step_runner import Numbers, apply_settings
from suanli.core.types import Plan

TIMES = 1.5  # as much as such weights change the gradients
ALONG = 0.5  # of the part along the right gradients that is left with such weights


def judge(
    subject: Subject, plan: Plan, reference: Numbers, actual: Numbers, examples: int | None = None
) -> tuple[float, str | None]:
    """The relative error, and why the plan doesn't compute the same; None: it does. `reference` are plain PyTorch's
    numbers; both are of so many examples of the first batch, or all."""
    error, allowed = difference(reference, actual), error_tolerance(plan.speedups, subject.device)
    if error <= allowed or _is_explained(subject, plan, reference, actual, allowed, examples):
        return error, None
    return error, f"outputs or gradients differ by {error:.2g}, more than the {allowed:g} that rounding explains"


def _is_explained(
    subject: Subject, plan: Plan, reference: Numbers, actual: Numbers, allowed: float, examples: int | None
) -> bool:
    outputs = relative_error(reference.outputs, actual.outputs)
    gradients = relative_error(reference.gradients, actual.gradients)
    if not 0 < outputs <= allowed or gradients == float("inf"):
        return False
    moved = _numbers_nearby(subject, plain_plan(subject.device, plan.threads), outputs, examples)
    usual = relative_error(reference.gradients, moved.gradients)
    along, usual_along = (_share_along(reference.gradients, other.gradients) for other in (actual, moved))
    return gradients <= TIMES * usual and along >= ALONG * usual_along > 0


def _numbers_nearby(subject: Subject, plan: Plan, change: float, examples: int | None) -> Numbers:
    """With weights that are changed at random by up to this share of each."""
    try:
        trainee = subject.trial(plan)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in trainee.compute.model.parameters():
                noise = torch.rand(weight.shape, generator=generator).to(weight) * 2 - 1
                weight.mul_(1 + change * noise)
        with apply_settings(trainee.compute):
            return trainee.compute_numbers(examples)
    finally:
        free_memory(subject.device)


def _share_along(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """The part of `actual` along `expected`, in lengths of the latter."""
    products = sum(float((a.double() * b.double()).sum()) for a, b in zip(expected, actual, strict=True))
    return products / sum(float(a.double().square().sum()) for a in expected)
