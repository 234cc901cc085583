"""The loop: wherever it stops and resumes, the bits stay the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from suanli.core.schema import Tensors
from suanli.core.types import Example, Plan, Recipe, Source
from suanli.data.cache import PreparedData, prepare_source
from suanli.machine import device
from suanli.tasks.classification import Classification
from suanli.training import checkpoint
from suanli.training.loop import Loop
from suanli.training.setup import Setup

CPU = device.detect("cpu")


def prepare_noise(cache: Path) -> PreparedData:
    """150 small images of three classes."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (150, 9, 11, 3), dtype=np.uint8)
    rows = [
        Example(name=str(i), target="abc"[i % 3], split=None, read=lambda p=p: p)  # type: ignore[misc]
        for i, p in enumerate(pictures)
    ]
    source = Source(
        name="noise", kind="image", examples=rows, classes=("a", "b", "c"), fingerprint="noise", size_bytes=1
    )
    return prepare_source(source, Recipe(), cache, threads=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_noise(tmp_path_factory.mktemp("cache"))


def tiny(*, classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Without batch norms, so that the parts of a batch don't influence each other; with dropout, which is random."""
    height, width = image_size
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6 * height * width, classes),
    )


TINY = f"{__name__}:tiny"
RECIPES = st.builds(
    Recipe,
    model=st.sampled_from(["speednet", TINY]),
    optimizer=st.sampled_from(["muon", "sgd", "adamw"]),
    lr=st.just(0.01),
    epochs=st.just(3),
    batch_size=st.sampled_from([16, 50]),
    accumulate=st.sampled_from([1, 3]),
    ema_decay=st.sampled_from([None, 0.9]),
    clip_norm=st.sampled_from([None, 1.0]),
    task_args=st.sampled_from([{}, {"class_weights": "balanced"}, {"label_smoothing": 0.1}]),
    augment=st.sampled_from([(), ("crop(padding=1)", "mixup"), ("auto", "cutmix")]),
    final_epochs=st.sampled_from([0.0, 1.5]),
    final_augment=st.sampled_from([(), ("flip",)]),
    layer_lr_decay=st.sampled_from([1.0, 0.8]),
    unfreeze_epochs=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 2**31),
)


def loop_of(recipe: Recipe, prepared: PreparedData, *, fresh: bool = True) -> Loop:
    """In another memory layout, and with the fused kernel of the optimizer where there is one."""
    speedups = ("channels_last",) if recipe.optimizer == "muon" else ("channels_last", "fused_optimizer")
    return Setup(recipe, prepared, CPU, fresh=fresh).loop(Plan(device="cpu", speedups=speedups))


def bits(loop: Loop) -> dict[str, torch.Tensor]:
    tensors, _ = loop.state()
    return {name: t.clone() for name, t in tensors.items()}


@settings(max_examples=15)
@given(recipe=RECIPES, stops=st.lists(st.integers(1, 20), max_size=3, unique=True))
def test_resuming_from_any_step_gives_the_same_bits(
    prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, stops: list[int]
) -> None:
    whole = loop_of(recipe, prepared)
    for _ in whole.run():
        pass
    folder = tmp_path_factory.mktemp("checkpoints")
    parts = loop_of(recipe, prepared)
    for stop in sorted(stops):
        for _ in parts.run():
            if parts.progress.step >= stop:
                break
        checkpoint.save_step(folder, parts.progress.step, *parts.state())
        saved = checkpoint.read_newest(folder)
        assert saved is not None
        parts = loop_of(recipe, prepared, fresh=False)
        parts.restore(saved)
    for _ in parts.run():
        pass
    assert parts.progress.step == whole.steps
    one, other = bits(whole), bits(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_epochs_have_augmentations_of_their_own(prepared: PreparedData) -> None:
    recipe = Recipe(model=TINY, batch_size=50, epochs=3, augment=("cutout",), final_epochs=1.5, final_augment=("flip",))
    loop = Setup(recipe, prepared, CPU).loop(Plan(device="cpu", speedups=()))
    feed, seen = loop.train_feed, []

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        positions = loop.order.positions(loop.progress.step)
        given_inputs = loop.preprocess.to_model(feed.inputs(positions))["image"]
        mirrored = torch.minimum(
            (inputs[0] - given_inputs).abs().amax((1, 2, 3)), (inputs[0] - given_inputs.flip(-1)).abs().amax((1, 2, 3))
        )
        seen.append("final" if mirrored.max() < 1e-5 else "usual")

    loop.model.register_forward_pre_hook(watch)
    for _ in loop.run():
        pass
    per_epoch = loop.order.steps_per_epoch
    final = round(1.5 * per_epoch)
    assert seen == ["usual"] * (3 * per_epoch - final) + ["final"] * final
    seen.clear()
    loop.extend(2.0)
    for _ in loop.run():
        pass
    assert seen == ["usual"] * (2 * per_epoch - final) + ["final"] * final
    seen.clear()
    loop.extend(1.0)
    for _ in loop.run():
        pass
    assert seen == ["final"] * per_epoch


def test_measuring_leaves_no_trace(prepared: PreparedData) -> None:
    loop = loop_of(Recipe(batch_size=16), prepared)
    before = bits(loop)
    with loop.preserve_weights():
        loop.try_step(16)
    after = bits(loop)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in loop.model.parameters())


def test_another_networks_checkpoint_is_refused(prepared: PreparedData, tmp_path: Path) -> None:
    from suanli.core.errors import DamagedFile

    loop = loop_of(Recipe(batch_size=16), prepared)
    path = checkpoint.save_step(tmp_path, 3, *loop.state())
    other = loop_of(Recipe(batch_size=16, model=TINY), prepared)
    with pytest.raises(DamagedFile, match="not one of this network"):
        other.restore(checkpoint.read(path))


@dataclass(frozen=True, kw_only=True)
class Counted(Classification):
    """Two sums with a count of their own each: of all examples, and of those of the first class."""

    has_counts: ClassVar[bool] = True

    def loss(self, outputs: torch.Tensor, targets: Tensors) -> Tensors:
        first = targets["class"] == 0
        return {**super().loss(outputs, targets), "first": outputs[first].square().sum()}

    def counts(self, targets: Tensors) -> Tensors:
        return {"cross_entropy": torch.tensor(len(targets["class"])), "first": (targets["class"] == 0).sum()}


def test_sums_with_counts_of_their_own_are_divided_by_those_of_the_whole_batch(prepared: PreparedData) -> None:
    counted = replace(prepared, task=Counted(classes=prepared.task.classes))
    gradients = []
    for parts in (1, 4):
        recipe = Recipe(model=TINY, optimizer="sgd", lr=0.05, batch_size=30, accumulate=parts, epochs=1)
        loop = Setup(recipe, counted, CPU).loop(Plan(device="cpu", speedups=()))
        gradients.append(loop.compute_numbers().gradients)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    batch, module = loop.first_batch(), Setup(recipe, counted, CPU).module.eval()
    first = batch.targets["class"] == 0
    outputs = module(batch.inputs["image"])
    expected = (
        nn.functional.cross_entropy(outputs, batch.targets["class"]) + outputs[first].square().sum() / first.sum()
    )
    expected.backward()
    for gradient, parameter in zip(gradients[0], module.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


def test_accumulated_parts_learn_the_same_without_batch_statistics(prepared: PreparedData) -> None:
    """Only batch norms depend on the parts; a network without them computes the same gradient."""
    results = []
    for parts in (1, 4):
        recipe = Recipe(model=TINY, optimizer="sgd", lr=0.05, batch_size=30, accumulate=parts, epochs=1)
        loop = Setup(recipe, prepared, CPU).loop(Plan(device="cpu", speedups=()))
        for layer in loop.model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        for _ in loop.run():
            pass
        results.append(bits(loop))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-5, rtol=1e-4)
