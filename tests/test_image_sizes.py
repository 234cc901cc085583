"""The sizes of images during training: images that grow, and sizes that are drawn for each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import suanli
from suanli.compute.plan import plain_plan
from suanli.core.run import Run
from suanli.core.types import Batch, Recipe
from suanli.machine.device import detect
from suanli.training.forecast import forecast, validation_steps
from suanli.training.image_sizes import SMALLEST, full_size_steps, scale_at, shrink, shrink_side
from suanli.training.prepare import DataOptions, resolve
from suanli.training.setup import Setup

STAGES = ((0.25, 0.5), (0.5, 0.75))
shares = st.floats(0.01, 0.99)


@given(st.lists(shares, unique=True, max_size=4), st.lists(shares, min_size=4, max_size=4), st.integers(1, 5000))
def test_each_step_has_the_scale_of_its_stage_and_the_last_is_full_size(
    untils: list[float], scales: list[float], steps: int
) -> None:
    stages = tuple(zip(sorted(untils), scales, strict=False))
    recipe = Recipe(progressive_resizing=stages)
    scales_by_step = [scale_at(recipe, step, steps) for step in range(steps)]
    for (until, factor), begun in zip(stages, (0.0, *sorted(untils)), strict=False):
        first, end = round(begun * steps), round(until * steps)
        assert scales_by_step[first:end] == [factor] * (end - first)
    rest = scales_by_step[round(max(untils, default=0.0) * steps) :]
    assert rest == [1.0] * len(rest)


recipes = st.one_of(
    st.lists(st.tuples(shares, shares), unique_by=lambda s: s[0], max_size=4).map(
        lambda stages: Recipe(progressive_resizing=tuple(sorted(stages)))
    ),
    st.builds(
        lambda sizes, seed: Recipe(mixed_sizes=tuple(sizes), seed=seed),
        st.lists(shares, unique=True, min_size=1, max_size=4),
        st.integers(0, 9),
    ),
)


@given(recipes, st.integers(1, 200), st.data())
def test_full_size_steps_are_the_sum_over_the_steps(recipe: Recipe, steps: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, steps))
    end = data.draw(st.integers(first, steps + 50))  # a continuation goes beyond
    assert full_size_steps(recipe, first, end, steps) == pytest.approx(
        sum(scale_at(recipe, step, steps) ** 2 for step in range(first, end))
    )


def test_mixed_sizes_are_drawn_by_seed_and_step_each_as_often_as_the_others() -> None:
    recipe = Recipe(mixed_sizes=(0.5, 0.75), seed=3)
    drawn = [scale_at(recipe, step, 0) for step in range(300)]
    assert {size: drawn.count(size) for size in set(drawn)} == {0.5: 100, 0.75: 100, 1.0: 100}
    assert len({tuple(drawn[i : i + 3]) for i in range(0, 300, 3)}) == 6  # in every order
    assert drawn != [scale_at(recipe.model_copy(update={"seed": 4}), step, 0) for step in range(300)]


@given(st.integers(1, 600), st.floats(0.01, 1.0))
def test_a_side_is_never_enlarged_nor_made_tiny(pixels: int, factor: float) -> None:
    assert min(pixels, SMALLEST) <= shrink_side(pixels, factor) <= pixels


def test_shrinking_keeps_brightness_and_proportions_and_boxes_follow() -> None:
    images = torch.rand(3, 4, 48, 96)
    box = torch.tensor([8.0, 10, 30, 48, 2, 1])
    batch = Batch(
        inputs={"image": images},
        targets={"boxes": box.repeat(3, 2, 1), "class": torch.arange(3)},
        index=torch.arange(3),
        epoch=0,
    )
    small = shrink(batch, 0.5)
    shrunk = small.inputs["image"]
    assert shrunk.shape == (3, 4, 24, 48)
    assert torch.allclose(shrunk.mean((2, 3)), images.mean((2, 3)), atol=0.02)
    assert small.targets["boxes"][1, 1].tolist() == [4, 5, 15, 24, 2, 1]
    assert torch.equal(small.targets["class"], batch.targets["class"])
    assert shrink(batch, 1.0) is batch


def test_the_network_sees_small_pictures_first_and_full_size_ones_last(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=40, size=(32, 24))
    settings = {"progressive_resizing": STAGES, "epochs": 4, "batch_size": 16}
    recipe, prepared = resolve(DataOptions.of(root, data_dir=None, cache_dir=None), recipe=None, settings=settings)
    cpu = detect("cpu")
    setup = Setup(recipe, prepared, cpu)
    trial, loop = setup.trial(plain_plan(cpu)), setup.loop(plain_plan(cpu))
    seen: list[tuple[int, ...]] = []
    loop.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    for _ in loop.run():
        pass
    quarter = loop.steps // 4
    assert seen == [(16, 16)] * quarter + [(24, 18)] * quarter + [(32, 24)] * (loop.steps - 2 * quarter)
    seen.clear()
    loop.extend(1.0)  # a continuation knows the pictures already
    for _ in loop.run():
        pass
    assert set(seen) == {(32, 24)}
    assert loop.costs.total(0, 4 * quarter) == pytest.approx(quarter * (0.5**2 + 0.75**2 + 2))
    assert loop.first_batch(3).inputs["image"].shape[2:] == (32, 24)  # memory is measured at full size
    seen.clear()
    trial.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    trial.compute_numbers()
    trial.advance()
    assert set(seen) == {(32, 24)}  # so is the plan
    assert trial.costs.total(0, trial.steps) == pytest.approx(quarter * (0.5**2 + 0.75**2) + trial.steps - 2 * quarter)


def test_each_step_sees_the_size_that_it_draws(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=40, size=(32, 24))
    settings = {"mixed_sizes": [0.75], "epochs": 2, "batch_size": 16}
    recipe, prepared = resolve(DataOptions.of(root, data_dir=None, cache_dir=None), recipe=None, settings=settings)
    setup = Setup(recipe, prepared, detect("cpu"))
    trial, loop = (make(plain_plan(detect("cpu"))) for make in (setup.trial, setup.loop))
    seen: list[tuple[int, ...]] = []
    loop.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    for _ in loop.run():
        pass
    by_scale = {1.0: (32, 24), 0.75: (24, 18)}
    assert seen == [by_scale[loop.costs.image_scale(step)] for step in range(loop.steps)]
    assert set(seen) == set(by_scale.values())
    assert forecast(trial, 0, 1.0).train_seconds == pytest.approx(
        loop.costs.total(0, loop.steps) + validation_steps(loop)
    )


@pytest.mark.parametrize("how", [{"progressive_resizing": STAGES}, {"mixed_sizes": [0.75, 0.5]}])
def test_stopping_between_two_sizes_changes_nothing(
    picture_folder: Callable[..., Path], how: dict[str, object]
) -> None:
    from test_train import same, stop_after, weights

    root = picture_folder(each=60, size=(32, 32))
    options = {"epochs": 3, "batch_size": 16, "settings": how}
    options |= {"speedups": "none", "threads": 1}
    whole = suanli.train(root, **options)
    with stop_after(5), pytest.raises(suanli.Interrupted):
        suanli.train(root, out="stopped", **options)
    assert same(weights(whole), weights(suanli.train("stopped")))
    assert Run("stopped").recipe.mixed_sizes == tuple(how.get("mixed_sizes", ()))


@pytest.mark.parametrize("sizes", [[1.5], [0], [0.5, 0.5], "half", [0.1] * 9])
def test_impossible_mixed_sizes_are_refused(picture_folder: Callable[..., Path], sizes: object) -> None:
    with pytest.raises(suanli.UsageError, match="mixed_sizes"):
        suanli.train(picture_folder(), settings={"mixed_sizes": sizes})


def test_only_one_way_to_choose_sizes(picture_folder: Callable[..., Path]) -> None:
    with pytest.raises(suanli.UsageError, match="progressive_resizing decides the sizes already"):
        suanli.train(picture_folder(), settings={"mixed_sizes": [0.5], "progressive_resizing": STAGES})


@pytest.mark.parametrize(
    "stages",
    [[[0.5, 0.5], [0.5, 0.7]], [[0.7, 0.5], [0.2, 0.7]], [[0.5, 1.5]], [[0, 0.5]], [[0.5]], "half", [[1, 0.5]]],
)
def test_invalid_stages_are_refused(picture_folder: Callable[..., Path], stages: object) -> None:
    with pytest.raises(suanli.UsageError, match="progressive_resizing"):
        suanli.train(picture_folder(), settings={"progressive_resizing": stages})


both = pytest.mark.parametrize(
    ("field", "value"), [("progressive_resizing", STAGES), ("mixed_sizes", [0.5])], ids=["grow", "mixed"]
)


@both
def test_sizes_are_refused_for_texts(text_table: Path, field: str, value: object) -> None:
    with pytest.raises(suanli.UsageError, match=f"{field} is for images"):
        suanli.train(text_table, settings={field: value})


@both
def test_a_network_for_one_size_is_refused(picture_folder: Callable[..., Path], field: str, value: object) -> None:
    root = picture_folder(size=(32, 32))
    with pytest.raises(suanli.UsageError, match="test_loop:tiny.* images of several sizes") as caught:
        suanli.train(root, model="test_loop:tiny", settings={field: value})
    assert f"{field}=[]" in caught.value.fix


def test_an_old_recipe_has_no_stages() -> None:
    values = Recipe().model_dump()
    del values["progressive_resizing"]
    assert Recipe.model_validate(values).progressive_resizing == ()
