"""The contract of every optimizer: groups, learning, and exact resumption from a saved state."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from suanli.core import registry
from suanli.core.errors import UsageError
from suanli.core.types import Optimizer

LEARNING_RATES = {"sgd": 0.05, "adamw": 3e-3, "muon": 0.02}  # others get their usual rate

pytestmark = pytest.mark.parametrize("optimizer", registry.load_all("optimizers").values(), ids=lambda o: o.name)


class Net(nn.Module):
    """One of each kind that optimizers distinguish: filters, norms, an embedding, a frozen layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(1, 4, 1).requires_grad_(False)
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 8, 6, 6))
        self.hidden = nn.Linear(288, 24)
        self.tall = nn.Linear(24, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.frozen(x))) + self.pos_embed
        logits: torch.Tensor = self.head(self.tall(self.hidden(x.relu().flatten(1)).relu()).relu())
        return logits


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return (
        torch.from_numpy(data.images[:count, None].astype(np.float32) / 8 - 1),
        torch.from_numpy(data.target[:count]),
    )


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def make(optimizer: Optimizer, module: nn.Module, **args: Any) -> torch.optim.Optimizer:
    lr = LEARNING_RATES.get(optimizer.name, optimizer.usual_lr)
    return optimizer.build(list(module.named_parameters()), **{"head": "head", "lr": lr, "weight_decay": 1e-4} | args)


def learn(module: nn.Module, built: torch.optim.Optimizer, steps: int) -> list[float]:
    inputs, targets = digits(256)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(module(inputs), targets)
        built.zero_grad(set_to_none=True)
        loss.backward()
        built.step()
        losses.append(loss.item())
    return losses


def test_has_the_name_of_its_file_and_a_source(optimizer: Optimizer) -> None:
    assert registry.load("optimizers", optimizer.name) is optimizer
    assert optimizer.source


def fuse(built: torch.optim.Optimizer, fused: bool) -> torch.optim.Optimizer:
    """As the speedup does it, where there is a fused kernel."""
    for group in built.param_groups:
        if fused and "fused" in group:
            group |= {"fused": True, "foreach": False}
    return built


@pytest.mark.parametrize("fused", [False, True])
def test_learns_real_digits(optimizer: Optimizer, fused: bool) -> None:
    module = net()
    losses = learn(module, fuse(make(optimizer, module), fused), 30)
    assert losses[-1] < 0.5 * losses[0]


def test_every_trainable_parameter_is_in_one_group(optimizer: Optimizer) -> None:
    module = net()
    groups = make(optimizer, module).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in module.parameters() if p.requires_grad}
    assert all(group["initial_lr"] == group["lr"] > 0 for group in groups)


def test_biases_norms_and_embeddings_do_not_decay(optimizer: Optimizer) -> None:
    module = net()
    kept = {id(module.pos_embed), *(id(p) for p in module.parameters() if p.ndim == 1)}
    for group in make(optimizer, module, weight_decay=0.1).param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if id(parameter) in kept else 0.1)


def test_the_backbone_learns_at_its_own_rate(optimizer: Optimizer) -> None:
    full, scaled = ({}, {})
    for rates, scale in ((full, 1.0), (scaled, 0.25)):
        module = net()
        names = {id(p): name for name, p in module.named_parameters()}
        for group in make(optimizer, module, backbone_lr_scale=scale).param_groups:
            rates.update({names[id(p)]: group["initial_lr"] for p in group["params"]})
    for name, rate in full.items():
        assert scaled[name] == pytest.approx(rate * (1 if name.startswith("head.") else 0.25))


def test_layers_nearer_to_the_input_learn_more_slowly(optimizer: Optimizer) -> None:
    """With the rate of the backbone; without decay there are no more groups than before."""
    distances = {"frozen": 4, "conv": 3, "norm": 3, "hidden": 2, "tall": 1, "head": 0}
    rates: list[dict[str, float]] = []
    for decay in (1.0, 0.5):
        module = net()
        names = {id(p): name for name, p in module.named_parameters()}
        groups = make(optimizer, module, backbone_lr_scale=0.25, layer_lr_decay=decay).param_groups
        rates.append({names[id(p)]: group["initial_lr"] for group in groups for p in group["params"]})
        if decay == 1:
            assert len(groups) <= 4
    for name, rate in rates[0].items():
        distance = 5 if name == "pos_embed" else distances[name.partition(".")[0]]
        assert rates[1][name] == pytest.approx(rate * 0.5**distance), name


def test_a_frozen_backbone_stays_and_costs_no_gradient(optimizer: Optimizer) -> None:
    module = net()
    before = copy.deepcopy(module.state_dict())
    built = make(optimizer, module, backbone_lr_scale=0.0)
    learn(module, built, 3)
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"head.weight", "head.bias"}
    assert module.conv.weight.grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_resumes_bit_by_bit_from_its_state(optimizer: Optimizer, fused: bool) -> None:
    module = net()
    built = fuse(make(optimizer, module), fused)
    learn(module, built, 3)
    other = net()
    other.load_state_dict(module.state_dict())
    restored = fuse(make(optimizer, other), fused)
    restored.load_state_dict(copy.deepcopy(built.state_dict()))
    assert learn(other, restored, 3) == learn(module, built, 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_its_state_is_plain(optimizer: Optimizer) -> None:
    module = net()
    built = make(optimizer, module)
    learn(module, built, 1)
    state = built.state_dict()
    for values in state["state"].values():
        assert all(isinstance(v, torch.Tensor | int | float) for v in values.values())
    json.dumps(state["param_groups"])


def test_a_parameter_without_gradient_is_skipped(optimizer: Optimizer) -> None:
    module = net()
    built = make(optimizer, module, weight_decay=0.0)
    before = copy.deepcopy(module.state_dict())
    built.step()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_may_join_later(optimizer: Optimizer, fused: bool) -> None:
    """As if they had not existed before."""
    module = net()
    built = fuse(make(optimizer, module), fused)
    module.conv.requires_grad_(False)
    learn(module, built, 2)
    module.conv.requires_grad_(True)
    copied = net()
    copied.load_state_dict(module.state_dict())
    learn(module, built, 1)
    alone = fuse(make(optimizer, copied), fused)
    learn(copied, alone, 1)
    assert torch.equal(module.conv.weight, copied.conv.weight)


def test_a_zero_gradient_moves_nothing(optimizer: Optimizer) -> None:
    module = net()
    built = make(optimizer, module, weight_decay=0.0)
    before = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    built.step()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_an_unknown_argument_is_refused_with_the_nearest(optimizer: Optimizer) -> None:
    with pytest.raises(UsageError, match="Unknown .* argument 'betta'"):
        make(optimizer, net(), betta=0.5)


def test_an_impossible_rate_is_refused(optimizer: Optimizer) -> None:
    with pytest.raises(UsageError, match="can't be built"):
        make(optimizer, net(), lr=-1.0)


def test_nothing_to_train_is_refused(optimizer: Optimizer) -> None:
    with pytest.raises(UsageError, match="no parameters to train"):
        make(optimizer, net().requires_grad_(False))
