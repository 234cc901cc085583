"""What individual optimizers promise beyond the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from suanli.core import registry
from suanli.core.errors import UsageError
from suanli.training.optimizers.muon import orthogonalize


def build(name: str, module: nn.Module, **args: Any) -> torch.optim.Optimizer:
    return registry.load("optimizers", name).build(list(module.named_parameters()), **{"head": "head"} | args)


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 3])
)
def test_newton_schulz_brings_singular_values_near_one(rows: int, columns: int, dtype: torch.dtype, block: int) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    u, _, v = torch.linalg.svd(torch.randn(3, rows, columns, generator=generator), full_matrices=False)
    spread = torch.linspace(0.3, 1.0, min(rows, columns))
    values = torch.linalg.svdvals(orthogonalize(u * spread @ v, 5, dtype, block))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_a_batch_is_orthogonalised_like_each_alone() -> None:
    matrices = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(0))
    together = orthogonalize(matrices, 3, torch.float32)
    alone = torch.cat([orthogonalize(m[None], 3, torch.float32) for m in matrices])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_a_block_of_steps_computes_what_single_steps_do(steps: int) -> None:
    matrices = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(*(orthogonalize(matrices, steps, torch.float64, block) for block in (1, 3)))


def test_muon_steps_alike_in_both_layouts() -> None:
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = Net().double()
        gradients = [torch.randn_like(p) for p in net.parameters()]
        net.to(memory_format=layout)  # type: ignore[call-overload]
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient.contiguous(memory_format=layout) if gradient.ndim == 4 else gradient
        build("muon", net, lr=0.1).step()
        weights.append(list(net.parameters()))
    torch.testing.assert_close(*weights)


def test_newton_schulz_keeps_zero_and_ignores_scale() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 9), 5, torch.float32), torch.zeros(1, 4, 9))
    matrix = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(matrix * 1000, 3, torch.float32), orthogonalize(matrix, 3, torch.float32))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)


def stepped(**args: Any) -> tuple[Net, Net]:
    """A net before and after one Muon step along random gradients."""
    torch.manual_seed(0)
    before, after = Net(), Net()
    after.load_state_dict(before.state_dict())
    optimizer = build("muon", after, **args)
    for parameter in after.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return before, after


def test_muon_moves_filters_and_matrices_orthogonally_and_the_rest_along_the_gradient() -> None:
    before, after = stepped(lr=0.5, head_lr_scale=0.4, bias_lr_scale=0.6, momentum=0.6, other_momentum=0.5, steps=5)
    for name in ("conv.weight", "hidden.weight"):
        moved = (before.get_parameter(name) - after.get_parameter(name)).flatten(1)
        rows, columns = moved.shape
        values = torch.linalg.svdvals(moved) / (0.5 * max(1, rows / columns) ** 0.5)
        assert values.min() > 0.5
        assert values.max() < 1.4
    for name, lr in (("head.weight", 0.2), ("head.bias", 0.3), ("conv.bias", 0.3)):
        parameter = after.get_parameter(name)
        assert parameter.grad is not None
        expected = before.get_parameter(name) - lr * (1 + 0.5) * parameter.grad
        torch.testing.assert_close(parameter, expected)


def test_normalised_filters_have_a_fixed_norm_before_the_step() -> None:
    _, after = stepped(lr=1e-9, normalize_filters=True)
    assert after.conv.weight.norm().item() == pytest.approx(8**0.5, rel=1e-5)
    before, after = stepped(lr=1e-9)
    torch.testing.assert_close(before.conv.weight, after.conv.weight)


def test_weight_decay_shrinks_matrices_only() -> None:
    _, plain = stepped(lr=0.1)
    before, decayed = stepped(lr=0.1, weight_decay=0.5)
    for name, parameter in decayed.named_parameters():
        shrunk = before.get_parameter(name) * (0.1 * 0.5 if parameter.ndim > 1 else 0.0)
        torch.testing.assert_close(parameter, plain.get_parameter(name) - shrunk)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("sgd", {"momentum": -1}),
        ("sgd", {"momentum": "high"}),
        ("adamw", {"beta2": 1.5}),
        ("muon", {"momentum": 1.0}),
        ("muon", {"steps": 0}),
    ],
)
def test_impossible_arguments_are_refused(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="can't be built"):
        build(name, Net(), lr=0.1, **args)


def test_only_own_arguments_are_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        build("muon", Net(), lr=0.1, normalise_filters=True)
    assert "'normalize_filters'" in caught.value.fix
    assert "named_parameters" not in caught.value.fix
    assert "fused" not in caught.value.fix
