"""Images of every size, shape, number of channels and amount train with the recipe that suits them, untuned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import suanli


def arrays(folder: Path, *shape: int, each: int, classes: int = 2) -> Path:
    """Noise, brighter from class to class; `shape` is (H, W) or (H, W, C)."""
    random = np.random.default_rng(0)
    levels = np.linspace(60, 190, classes).repeat(each).reshape(-1, *[1] * len(shape))
    images = np.clip(random.normal(levels, 25, (classes * each, *shape)), 0, 255).astype(np.uint8)
    path = folder / "images.npz"
    np.savez(path, images=images, labels=np.arange(classes).repeat(each))
    return path


@pytest.mark.parametrize(
    ("shape", "each", "recipe"),
    [
        pytest.param((32, 32, 3), 30, "small_images_few", marks=pytest.mark.long),
        pytest.param((32, 32), 30, "small_images_grey_few", marks=pytest.mark.long),
        pytest.param((32, 32, 1), 30, "small_images_grey_few", marks=pytest.mark.long),
        pytest.param((32, 32, 4), 30, "small_images_few", marks=pytest.mark.long),
        pytest.param((8, 8, 3), 200, "small_images_few", marks=pytest.mark.long),
        ((8, 8), 30, "small_images_grey_few"),
        ((8, 8, 4), 30, "small_images_few"),
        ((8, 40, 3), 30, "small_images_few"),
        pytest.param((64, 24), 30, "small_images_grey_few", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_small_ones_are_learnt_by_the_whole_default_recipe(
    tmp_path: Path, shape: tuple[int, ...], each: int, recipe: str
) -> None:
    run = suanli.train(arrays(tmp_path, *shape, each=each), speedups="none")
    assert run.recipe.name == recipe
    assert run.summary["status"] == "finished"
    assert suanli.evaluate(run, augmented_views=False).scores["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("shape", "each"),
    [
        ((96, 300, 3), 6),
        pytest.param((512, 512, 3), 20, marks=pytest.mark.long),
        pytest.param((512, 512), 30, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_large_ones_train_with_the_default_recipe(tmp_path: Path, shape: tuple[int, ...], each: int) -> None:
    data = arrays(tmp_path, *shape, each=each)
    run = suanli.train(data, epochs=1, speedups="none")  # for time's sake
    assert run.recipe.name == "photos"
    assert run.summary["status"] == "finished"
    scores = suanli.evaluate(run, augmented_views=False).scores
    assert 0 <= scores["accuracy"] <= 1


def test_many_classes_with_few_images_each(tmp_path: Path) -> None:
    run = suanli.train(arrays(tmp_path, 16, 16, 3, each=8, classes=40), epochs=3, speedups="none")
    assert run.summary["status"] == "finished"
