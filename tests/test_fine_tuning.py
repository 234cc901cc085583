"""Layers that are unfrozen one after the other, and low-rank adapters: what learns at which step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import suanli
from suanli.compute.flops import flops
from suanli.compute.plan import apply_plan, plain_plan
from suanli.core.errors import MachineError, UsageError
from suanli.core.types import Plan, Recipe
from suanli.data.cache import PreparedData
from suanli.models import adapters
from suanli.models.layers import head_distances
from suanli.training import checkpoint
from suanli.training.forecast import forecast, validation_steps
from suanli.training.loop import Loop
from suanli.training.setup import Setup
from suanli.training.step_costs import StepCosts
from suanli.training.validation import validate
from test_loop import CPU, bits, prepare_noise


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_noise(tmp_path_factory.mktemp("cache"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


def convolutions(*, classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(in_channels, 8, 3, padding=1),
            blocks=nn.Sequential(Block(), Block(), Block()),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1)),
            head=nn.Linear(8, classes),
        )
    )


class Attention(nn.Module):
    """Rows of the image are tokens: a layer of transformers' kind, then torch's own."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, 12)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(12, 12), "mlp": nn.Linear(12, 12)})])
        self.mix = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.mean(1))
        for block in self.blocks:
            x = x + block["mlp"](torch.relu(block["attn"](x)))  # type: ignore[index]
        logits: torch.Tensor = self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))
        return logits


def attention(*, classes: int, image_size: tuple[int, int]) -> nn.Module:
    return Attention(classes, image_size[1])


BASE = {"epochs": 4, "batch_size": 16, "lr": 0.05, "validate_every": 1}
UNFREEZING = Recipe(model=f"{__name__}:convolutions", unfreeze_epochs=2.0, layer_lr_decay=0.7, **BASE)
ADAPTED = Recipe(model=f"{__name__}:attention", optimizer="adamw", lora_rank=3, **BASE)  # type: ignore[arg-type]


def loop_of(recipe: Recipe, data: PreparedData, *speedups: str, fresh: bool = True) -> Loop:
    return Setup(recipe, data, CPU, fresh=fresh).loop(Plan(device="cpu", speedups=speedups))


def state_of(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}


# --- gradual unfreezing ---------------------------------------------------------------------


def test_layers_join_from_the_head_down_and_cost_nothing_before(prepared: PreparedData) -> None:
    loop = loop_of(UNFREEZING, prepared)
    distances = head_distances(loop.model.named_parameters(), "head")
    layers, over = 4, 2 * loop.order.steps_per_epoch
    joined: dict[int, int] = {}
    operations: list[int] = []
    run = loop.run()
    while loop.progress.step < over + 2:
        step, before = loop.progress.step, state_of(loop)
        operations.append(flops(lambda: next(run)))
        if step % 5 == 0:
            validate(loop)  # puts the network into evaluation mode, and back into training mode
        for name, tensor in loop.model.state_dict().items():
            norm = ("running", "tracked")
            owner = name if name in distances else f"{name.rpartition('.')[0]}.weight"
            distance = distances[owner]
            if step < over * distance / layers:
                assert torch.equal(tensor, before[name]), (step, name)
            elif any(word in name for word in norm):
                assert not torch.equal(tensor, before[name]), (step, name)
        for name, parameter in loop.model.named_parameters():
            if parameter.grad is not None:
                joined.setdefault(distances[name], step)
    assert joined == {distance: -(-over * distance // layers) for distance in range(layers + 1)}
    stages = [operations[joined[distance]] for distance in range(layers + 1)]
    assert stages == sorted(set(stages))
    assert stages[0] < 0.45 * stages[-1]
    assert operations[-1] == stages[-1]


def test_the_forecast_counts_frozen_layers(prepared: PreparedData) -> None:
    setup = Setup(UNFREEZING, prepared, CPU)
    trial = setup.trial(plain_plan(CPU))
    every, costs = trial.steps, trial.costs
    assert costs.total(0, every) == pytest.approx(sum(costs.cost(step) for step in range(every)))
    assert costs.total(3, every - 1) == pytest.approx(sum(costs.cost(step) for step in range(3, every - 1)))
    assert costs.cost(0) < 0.4 < costs.cost(every - 1) == 1
    assert forecast(trial, 0, 1.0).train_seconds == pytest.approx(costs.total(0, every) + validation_steps(trial))
    assert trial.costs.equal_steps(0, every) == -(-2 * trial.order.steps_per_epoch // 4)
    trial.advance()
    assert all(p.grad is not None for p in trial.model.parameters())  # a plan is measured with all layers


def test_sizes_and_layers_count_together() -> None:
    stages = ((0.3, 0.5),)
    recipe = UNFREEZING.model_copy(update={"progressive_resizing": stages})
    costs = StepCosts(recipe=recipe, steps=40, steps_per_epoch=10, layers=4)
    assert costs.total(0, 40) == pytest.approx(sum(costs.cost(step) for step in range(40)))
    assert costs.cost(0) == pytest.approx(0.25 / 3)


CASES = {"unfreezing": UNFREEZING, "adapters": ADAPTED, "both": ADAPTED.model_copy(update={"unfreeze_epochs": 1.5})}


@pytest.mark.parametrize("case", CASES)
def test_resuming_gives_the_same_bits(prepared: PreparedData, tmp_path: Path, case: str) -> None:
    recipe = CASES[case].model_copy(update={"ema_decay": 0.9, "clip_norm": 1.0, "accumulate": 2})
    whole, part = loop_of(recipe, prepared), loop_of(recipe, prepared)
    for _ in whole.run():
        pass
    for stop in (2, 7, 13):
        for _ in part.run():
            if part.progress.step >= stop:
                break
        saved = checkpoint.read(checkpoint.save_step(tmp_path, part.progress.step, *part.state()))
        part = loop_of(recipe, prepared, fresh=False)
        part.restore(saved)
    for _ in part.run():
        pass
    one, other = bits(whole), bits(part)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("speedup", ["graphs", "fused_optimizer", "activation_checkpointing"])
def test_speedups_compute_the_same(prepared: PreparedData, speedup: str) -> None:
    recipe = UNFREEZING.model_copy(update={"epochs": 2.0, "unfreeze_epochs": 1.0})
    plain, fast = loop_of(recipe, prepared), loop_of(recipe, prepared, speedup)
    for loop in (plain, fast):
        for _ in loop.run():
            pass
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(fast.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_graph_is_captured_anew_for_each_layer(
    prepared: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from suanli.compute.cuda_graph import CapturedStep

    captured: list[int] = []
    capture = CapturedStep._capture
    monkeypatch.setattr(
        CapturedStep, "_capture", lambda self, *batch: captured.append(loop.freezing.trained) or capture(self, *batch)
    )
    loop = loop_of(UNFREEZING, prepared, "graphs")
    for _ in loop.run():
        pass
    assert captured == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("speedup", ["compile", "compile_blocks"])
def test_compiling_says_that_it_is_not_for_it(prepared: PreparedData, speedup: str) -> None:
    setup = Setup(UNFREEZING, prepared, CPU)
    with pytest.raises(MachineError, match="compiled again for each layer"):
        apply_plan(Plan(device="cpu", speedups=(speedup,)), setup.step, CPU)


def test_a_frozen_backbone_keeps_its_statistics(prepared: PreparedData) -> None:
    recipe = UNFREEZING.model_copy(update={"unfreeze_epochs": 0.0, "backbone_lr_scale": 0.0, "epochs": 1.0})
    loop = loop_of(recipe, prepared)
    before = state_of(loop)
    for _ in loop.run():
        pass
    changed = {name for name, tensor in loop.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_fixed_norms_keep_their_statistics_while_all_layers_learn(prepared: PreparedData) -> None:
    recipe = UNFREEZING.model_copy(update={"unfreeze_epochs": 0.0, "fixed_norms": True, "epochs": 1.0})
    loop = loop_of(recipe, prepared)
    before = state_of(loop)
    for _ in loop.run():
        pass
    validate(loop)
    same = {name for name, tensor in loop.model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if "running" in name or "tracked" in name}


@pytest.mark.parametrize(
    "values", [{"unfreeze_epochs": 2, "backbone_lr_scale": 0}, {"lora_rank": 4, "backbone_lr_scale": 0}]
)
def test_a_backbone_that_never_learns_is_not_unfrozen(picture_folder: Callable[..., Path], values: object) -> None:
    with pytest.raises(UsageError, match="only the head learns"):
        suanli.train(picture_folder(), settings=values)


@pytest.mark.parametrize(
    "values", [{"unfreeze_epochs": -1}, {"layer_lr_decay": 0}, {"layer_lr_decay": 1.2}, {"lora_rank": 2.5}]
)
def test_impossible_values_are_refused(picture_folder: Callable[..., Path], values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        suanli.train(picture_folder(), settings=values)


# --- low-rank adapters ----------------------------------------------------------------------


def test_only_adapters_and_head_learn_from_the_network_that_was_given(prepared: PreparedData) -> None:
    plain = Setup(ADAPTED.model_copy(update={"lora_rank": 0}), prepared, CPU)
    loop = loop_of(ADAPTED, prepared)
    inputs = loop.first_batch(8).inputs["image"]
    with torch.no_grad():
        assert torch.equal(loop.model.eval()(inputs), plain.module.eval()(inputs))
    names = {name for name, p in loop.model.named_parameters() if p.requires_grad}
    adapted = ["blocks.0.attn", "mix", "mix.out_proj"]
    matrices = {
        f"{m}.parametrizations.{'in_proj_' if m == 'mix' else ''}weight.0.lora_{part}" for m in adapted for part in "ab"
    }
    assert names == {"head.weight", "head.bias"} | matrices
    before = state_of(loop)
    for _ in loop.run():
        pass
    changed = {name for name, tensor in loop.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == names


def test_a_saved_model_is_a_plain_network_with_the_same_answers(prepared: PreparedData) -> None:
    loop = loop_of(ADAPTED, prepared)
    for _ in loop.run():
        pass
    plain = Setup(ADAPTED.model_copy(update={"lora_rank": 0}), prepared, CPU).module
    begun = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(adapters.merged(loop.model.state_dict()))
    inputs = loop.first_batch(8).inputs["image"]
    with torch.no_grad():
        assert torch.equal(loop.model.eval()(inputs), plain.eval()(inputs))
    change = plain.state_dict()["mix.in_proj_weight"] - begun["mix.in_proj_weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == ADAPTED.lora_rank


def test_a_run_with_adapters_is_used_like_any_other(picture_folder: Callable[..., Path]) -> None:
    from test_train import same, stop_after, weights

    root = picture_folder(each=20)
    options = {"speedups": "none", "threads": 1, "batch_size": 8}
    small = {"model_args": {"width": 32, "depth": 2, "heads": 2}}
    start = suanli.train(root, model="vit", epochs=0.4, out="start", settings=small, **options)
    settings = {"lora_rank": 4, "unfreeze_epochs": 0.5, "frozen_views": 0}
    tuned = suanli.train(root, weights=start, epochs=1, settings=settings, out="tuned", **options)
    assert weights(tuned).keys() == weights(start).keys()
    different = [n for n, t in weights(tuned).items() if not torch.equal(t, weights(start)[n])]
    assert {name.rpartition(".")[0].partition(".attn")[2] for name in different} == {".qkv", ".proj", ""}
    assert len(suanli.predict(tuned, root / "class0" / "000.png")) == 1
    with stop_after(3), pytest.raises(suanli.Interrupted):
        suanli.train(root, weights=start, epochs=1, settings=settings, out="stopped", **options)
    assert same(weights(tuned), weights(suanli.train("stopped")))
    again = suanli.train(root, weights=tuned, epochs=0.4, settings={"frozen_views": 0}, **options)
    assert weights(again).keys() == weights(tuned).keys()


def test_a_network_without_attention_is_refused(picture_folder: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="networks with attention layers"):
        suanli.train(picture_folder(), epochs=1, settings={"lora_rank": 4})


def test_a_rank_as_high_as_the_matrices_is_refused(prepared: PreparedData) -> None:
    with pytest.raises(UsageError, match="no larger than 12"):
        Setup(ADAPTED.model_copy(update={"lora_rank": 12}), prepared, CPU)


def test_parametrizations_of_the_network_itself_stay() -> None:
    network = nn.ModuleDict(
        {"attn": nn.Linear(6, 6), "other_attn": weight_norm(nn.Linear(6, 6)), "head": nn.Linear(6, 2)}
    )
    assert adapters.add_adapters(network, 2, head="head", seed=0) == 1
    plain = adapters.merged(network.state_dict())
    assert {name for name in plain if "parametrizations" in name} == {
        f"other_attn.parametrizations.weight.original{i}" for i in (0, 1)
    }
    assert torch.equal(plain["attn.weight"], network["attn"].weight)
    assert not parametrize.is_parametrized(network["head"])
    assert adapters.merged(plain) == plain
