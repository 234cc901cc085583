"""How much the gradients of a plan may differ: what rounding explains in this network, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from suanli.compute.plan import plain_plan
from suanli.compute.plan_check import judge
from suanli.compute.plan_trial import difference
from suanli.compute.step_runner import Numbers
from suanli.core.types import Device, Plan, Step
from suanli.machine import device

CPU = device.detect("cpu")
BF16 = Plan(device="cpu", speedups=("bf16",))


class Training:
    """The first step of a network, on one batch; each copy of it begins anew."""

    key = family = "training"

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.inputs, self.weights = torch.randn(64, 32), torch.randn(64, 8)

    @property
    def device(self) -> Device:
        return CPU

    @property
    def step(self) -> Step:
        return Step(model=self.network)

    def trial(self, plan: Plan) -> Trial:
        dtype = torch.bfloat16 if "bf16" in plan.speedups else None
        return Trial(Step(model=copy.deepcopy(self.network), autocast_dtype=dtype), self)

    def numbers(self, plan: Plan) -> Numbers:
        return self.trial(plan).compute_numbers()


class Trial:
    def __init__(self, step: Step, training: Training) -> None:
        self.compute, self._training = step, training

    def advance(self) -> None:
        raise NotImplementedError

    def switch(self, plan: Plan) -> None:
        raise NotImplementedError

    def compute_numbers(self, examples: int | None = None) -> Numbers:
        model, dtype = self.compute.model, self.compute.autocast_dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            outputs = model(self._training.inputs[:examples]).float()
        (outputs * self._training.weights[:examples]).sum().backward()
        gradients = tuple(p.grad for p in model.parameters() if p.grad is not None)
        return Numbers(outputs=(outputs.detach(),), gradients=gradients)


def deep(layers: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(32, 8))


def test_gradients_that_the_depth_of_the_network_explains_are_right() -> None:
    training = Training(deep(10))
    reference, actual = training.numbers(plain_plan(CPU)), training.numbers(BF16)
    error, reason = judge(training, BF16, reference, actual)
    assert error == difference(reference, actual) > 0.05, "more than bfloat16 may differ elsewhere"
    assert reason is None
    assert judge(training, plain_plan(CPU), reference, actual)[1], "without bfloat16 nothing explains such outputs"


@pytest.mark.parametrize("layers", [1, 6, 10])
def test_wrong_gradients_are_refused_however_deep_the_network(layers: int) -> None:
    training = Training(deep(layers))
    reference, actual = training.numbers(plain_plan(CPU)), training.numbers(BF16)
    assert judge(training, BF16, reference, actual)[1] is None
    zero = replace(actual, gradients=tuple(map(torch.zeros_like, actual.gradients)))
    negative = replace(actual, gradients=tuple(-g for g in actual.gradients))
    double = replace(actual, gradients=tuple(4 * g for g in actual.gradients))
    mixed = replace(
        actual, gradients=tuple(g.flatten()[torch.randperm(g.numel())].view_as(g) for g in actual.gradients)
    )
    for wrong in (zero, negative, double, mixed):
        assert "more than the 0.05 that rounding explains" in (judge(training, BF16, reference, wrong)[1] or "")
    if difference(reference, actual) > 0.05:
        same = replace(actual, outputs=reference.outputs)
        assert judge(training, BF16, reference, same)[1], "outputs that are equal were not rounded"
