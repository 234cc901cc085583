"""What every speedup promises: it says where it can't be used, and changes nothing but rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from suanli import plugins
from suanli.types import Device, Speedup, Step

CPU = Device(name="a CPU", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32", "bfloat16"))
ODD = Device(name="an accelerator", torch_name="mps", memory_bytes=None, fast_dtypes=("float32",))

pytestmark = pytest.mark.parametrize("speedup", plugins.load_all("speedups").values(), ids=lambda s: s.name)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def gradients(step: Step, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if step.memory_format is not None:
        inputs = inputs.contiguous(memory_format=step.memory_format)
    with torch.autocast("cpu", step.autocast_dtype, enabled=step.autocast_dtype is not None):
        logits = step.model(inputs)
    logits.float().square().mean().backward()
    grads = torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])
    return logits.detach().float(), grads


def test_is_called_as_its_file(speedup: Speedup) -> None:
    assert plugins.load("speedups", speedup.name) is speedup


def test_says_why_not_in_words(speedup: Speedup) -> None:
    for device in (CPU, ODD):
        reason = speedup.why_not(device)
        assert reason is None or len(reason) > 10


def test_learns_the_same_up_to_rounding(speedup: Speedup) -> None:
    plain = Step(model=net())
    faster = speedup.apply(Step(model=copy.deepcopy(plain.model)), CPU)
    inputs = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for expected, got in zip(gradients(plain, inputs), gradients(faster, inputs), strict=True):
        assert (got - expected).norm() <= 0.02 * expected.norm()


def test_keeps_what_others_have_set(speedup: Speedup) -> None:
    before = Step(model=net(), autocast_dtype=torch.bfloat16, memory_format=torch.channels_last, fused_optimizer=True)
    assert speedup.apply(before, CPU) == before


def test_does_something(speedup: Speedup) -> None:
    before = Step(model=net())
    after = speedup.apply(before, CPU)
    assert before == Step(model=before.model)
    assert after != before


def test_names_of_parameters_stay(speedup: Speedup) -> None:
    model = net()
    names = list(model.state_dict())
    assert list(speedup.apply(Step(model=model), CPU).model.state_dict()) == names
