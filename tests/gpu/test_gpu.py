"""What only an NVIDIA GPU can test: speedups compute the same there, graphs replay what was captured, rows that lie
on the device are those of the cache, and training resumes where it stopped.

A GPU adds in no fixed order, so equality is up to rounding unless cuDNN is fixed to one algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

import suanli
from suanli.compute.plan import error_tolerance, plain_plan, plan_of_names
from suanli.compute.plan_trial import difference
from suanli.compute.step_runner import Numbers, apply_settings
from suanli.core.registry import load, names
from suanli.core.types import Device, Plan, Recipe
from suanli.data.cache import PreparedData
from suanli.data.loader import Feed
from suanli.engines.backends import eager
from suanli.training import checkpoint
from suanli.training.loop import Loop
from suanli.training.optimizers import muon
from suanli.training.setup import Setup
from suanli.training.validation import validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # torch's compiler uses what torch deprecates
]

RECIPE = Recipe(
    model="speednet",
    augment=("crop(padding=1)", "flip"),
    batch_size=48,
    epochs=2,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.01,
)
MUON = RECIPE.model_copy(update={"optimizer": "muon", "lr": 0.05, "optimizer_args": {"normalize_filters": True}})


@pytest.fixture(autouse=True)
def _one_algorithm() -> Iterator[None]:
    """Atomic additions in some of cuDNN's algorithms would make two equal trainings differ."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def dropping(*, classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    height, width = image_size
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(in_channels * height * width, classes))


def plan_for(speedups: str, setup: Setup) -> Plan:
    """Skips where one of them isn't for this device or this training."""
    for name in speedups.split(","):
        reason = load("speedups", name).why_not(setup.device)
        reason = reason or load("speedups", name).needless(setup.step, setup.device)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
    return plan_of_names(speedups, setup.device)


def trained(loop: Loop, steps: int | None = None) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds after so many steps."""
    with apply_settings(loop.compute):
        for _ in islice(loop.run(), steps):
            pass
    return {name: tensor.detach().cpu().clone() for name, tensor in loop.state()[0].items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        error = (value.double() - other[name].double()).norm() / value.double().norm().clamp(min=1e-3)
        assert float(error) <= tolerance, f"{name} differs by {float(error):.2g}"


def numbers(setup: Setup, plan: Plan) -> Numbers:
    loop = setup.trial(plan)
    with apply_settings(loop.compute):
        return loop.compute_numbers()


@pytest.mark.parametrize("name", names("speedups"))
def test_a_speedup_computes_the_same(name: str, prepared: PreparedData, device: Device) -> None:
    setup = Setup(RECIPE, prepared, device)
    plan = plan_for(name, setup)
    error = difference(numbers(setup, plain_plan(device)), numbers(setup, plan))
    assert error <= error_tolerance((name,), device)


@pytest.mark.parametrize("recipe", [RECIPE, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("others", ["", "channels_last,"])
def test_a_captured_step_learns_the_same_as_an_eager_one(
    recipe: Recipe, others: str, prepared: PreparedData, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs, in which the learning rate falls: a graph that kept its first rate would drift away. In full
    float32, since Muon makes a step of what is only rounding."""
    monkeypatch.setattr(muon, "fast_dtype", lambda _device: torch.float32)
    setup = Setup(recipe, prepared, device)
    captured = plan_for(f"{others}graphs", setup)
    plain = plan_of_names(others.rstrip(",") or "none", device)
    with eager.tf32_switch("float32", device.type):
        assert_same(trained(setup.trial(plain)), trained(setup.trial(captured)), tolerance=2e-3)


def test_a_captured_step_draws_new_dropout_each_time(prepared: PreparedData, device: Device) -> None:
    """With almost no learning rate and one batch, only dropout changes its loss."""
    recipe = RECIPE.model_copy(
        update={"model": f"{__name__}:dropping", "lr": 1e-12, "weight_decay": 0.0, "augment": (), "batch_size": 100_000}
    )
    setup = Setup(recipe.model_copy(update={"epochs": 6}), prepared, device)
    loop = setup.trial(plan_for("graphs", setup))
    losses = []
    with apply_settings(loop.compute):
        for _ in loop.run():
            losses.append(loop.read_losses())
    assert len(set(losses[1:])) > 1


def test_rows_on_the_device_are_those_of_the_cache(prepared: PreparedData, device: Device) -> None:
    positions = [torch.randperm(len(prepared.splits["train"]))[:50] for _ in range(5)]
    resident = Feed(prepared.splits["train"], device, resident=True)
    mapped = Feed(prepared.splits["train"], device)
    ways = (
        resident.batches(iter(positions)),
        mapped.batches(iter(positions)),
        mapped.batches(iter(positions), read_ahead=True),
    )
    for batches in zip(*ways, strict=True):
        leaves = [torch.utils._pytree.tree_leaves(batch) for batch in batches]
        assert all(tensor.device.type == device.type for batch in leaves for tensor in batch)
        assert all(torch.equal(a, b) for batch in leaves[1:] for a, b in zip(leaves[0], batch, strict=True))


@pytest.mark.parametrize("speedups", ["none", "channels_last,resident", "channels_last,resident,graphs"])
def test_training_resumes_where_it_stopped(
    speedups: str, prepared: PreparedData, device: Device, tmp_path: Path
) -> None:
    setup = Setup(RECIPE, prepared, device)
    plan = plain_plan(device) if speedups == "none" else plan_for(speedups, setup)
    whole = trained(setup.trial(plan))
    first = setup.trial(plan)
    trained(first, 7)
    checkpoint.save_step(tmp_path, first.progress.step, *first.state())
    saved = checkpoint.read_newest(tmp_path)
    assert saved is not None
    second = Setup(RECIPE, prepared, device, fresh=False).loop(plan)
    second.restore(saved)
    assert_same(whole, trained(second), tolerance=2e-3)
    assert second.progress.step == second.steps


def test_half_precision_with_a_scaled_loss_learns(prepared: PreparedData, device: Device) -> None:
    setup = Setup(RECIPE.model_copy(update={"epochs": 8}), prepared, device)
    loop = setup.trial(plan_for("fp16", setup))
    trained(loop)
    assert validate(loop)["accuracy"] > 0.5  # of three classes


@pytest.mark.parametrize("speedups", ["auto", "none"])
def test_a_run_on_the_device(speedups: str, device: Device, tmp_path: Path) -> None:
    run = suanli.train("digits", device=device.type, speedups=speedups, epochs=6, out=tmp_path / "run")
    assert run.summary["status"] == "finished"
    assert run.summary["plan"]["device"] == device.torch_name
    assert run.metrics[-1]["scores"]["accuracy"] > 0.5
    assert speedups == "auto" or not run.summary["plan"]["speedups"]


def test_a_users_own_loop_is_sped_up(device: Device) -> None:
    torch.manual_seed(0)
    where = device.torch_name
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    model.to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(256, 3, 32, 32, device=where)
    targets = (inputs.mean((1, 2, 3)) > 0).long()
    step, plan = suanli.speed_up(model, optimizer, nn.functional.cross_entropy, (inputs, targets), steps=5_000)
    with step:
        first = step(inputs, targets).item()
        for _ in range(100):
            last = step(inputs, targets)
    assert plan.trials
    assert last.item() < first
