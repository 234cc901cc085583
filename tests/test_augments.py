"""What each image augmentation does to a batch, beyond the contract of all augmentations."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.core.errors import UsageError
from suanli.core.types import Batch
from suanli.training.augment import parse
from suanli.training.augments._sampling import symmetric_beta


def make_batch(inputs, targets=None, *, epoch=0, classes=10):
    count = len(inputs)
    targets = torch.arange(count) % classes if targets is None else targets
    return Batch(
        inputs={"image": inputs}, targets={"class": targets}, index=torch.arange(count), epoch=epoch, classes=classes
    )


def apply(spec, inputs, seed=0, **fields):
    return parse(spec)(make_batch(inputs, **fields), torch.Generator().manual_seed(seed))


def ramp(count=1, height=8, width=8):
    """Every pixel has a value of its own."""
    return torch.arange(count * height * width, dtype=torch.float32).view(count, 1, height, width)


@pytest.mark.parametrize("name", ["affine", "auto", "crop", "flip", "resized_crop", "mixup", "cutmix"])
@given(value=st.floats(-3, 3), height=st.integers(2, 12), width=st.integers(2, 12))
def test_moving_pixels_leaves_a_constant_picture(name, value, height, width):
    inputs = torch.full((4, 1, height, width), value)
    result = apply(name, inputs).inputs["image"]
    spread = result.amax((1, 2, 3)) - result.amin((1, 2, 3))
    assert spread.max() < 1e-4
    if name != "auto":  # whose brightness may change the level
        torch.testing.assert_close(result, inputs)


@pytest.mark.parametrize(
    "spec",
    [
        "affine(degrees=0, translate=0, scale=0)",
        "auto(strength=0)",
        "color(brightness=0, contrast=0, saturation=0)",
        "crop(padding=0)",
        "crop(fraction=0)",
        "cutout(size=0)",
        "cutmix(probability=0)",
        "mixup(probability=0)",
        "resized_crop(scale=(1, 1), ratio=(1, 1))",
    ],
)
def test_zero_strength_changes_nothing(spec):
    inputs = torch.randn(32, 3, 9, 12)
    # Posterize at its weakest still rounds to 64 levels of the picture's range.
    step = float((inputs.amax() - inputs.amin()) / 63 / 2) if "auto" in spec else 1e-5
    torch.testing.assert_close(apply(spec, inputs).inputs["image"], inputs, atol=step, rtol=1e-4)


# --- crop ------------------------------------------------------------------------------------


def test_crop_is_a_window_of_the_mirrored_picture():
    inputs = ramp(200)
    result = apply("crop(padding=2)", inputs).inputs["image"]
    padded = torch.nn.functional.pad(inputs, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for number in range(200):
        places = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(result[number], padded[number, :, dy : dy + 8, dx : dx + 8])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 25, "200 draws should reach all 25 places"


def test_crop_moves_less_than_the_size_of_the_picture():
    assert apply("crop(padding=100)", torch.randn(3, 1, 2, 5)).inputs["image"].shape == (3, 1, 2, 5)


def test_crop_views_are_moved_by_one_pixel():
    inputs = ramp()
    first, second, third = parse("crop(padding=2)").views(inputs)
    assert torch.equal(first, inputs)
    assert torch.equal(second[..., 1:, 1:], inputs[..., :-1, :-1])
    assert torch.equal(third[..., :-1, :-1], inputs[..., 1:, 1:])


# --- resized_crop and affine -----------------------------------------------------------------


def test_resized_crop_shows_a_part_within_the_bounds():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    inputs = torch.stack([x, y]).repeat(300, 1, 1, 1)
    result = apply("resized_crop(scale=(0.2, 0.6), ratio=(0.5, 2))", inputs).inputs["image"]
    width = (result[:, 0, 0, -1] - result[:, 0, 0, 0]) / 2
    height = (result[:, 1, -1, 0] - result[:, 1, 0, 0]) / 2
    area, ratio = width * height, width / height
    assert 0.17 < area.min() < 0.25
    assert 0.5 < area.max() < 0.62
    assert 0.48 < ratio.min() < 0.65
    assert 1.5 < ratio.max() < 2.1
    assert result.abs().max() <= 1


def test_affine_rotates_oblong_pictures_without_shearing():
    y, x = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(80.0) - 39.5, indexing="ij")
    disc = ((x**2 + y**2) < 100).float().repeat(20, 1, 1, 1)
    result = apply("affine(degrees=90, translate=0, scale=0)", disc).inputs["image"]
    assert (result - disc).abs().mean() < 0.01


def test_affine_moves_as_far_as_its_setting():
    inputs = torch.zeros(300, 1, 20, 20)
    inputs[:, :, 10, 10] = 1
    result = apply("affine(degrees=0, translate=0.2, scale=0)", inputs).inputs["image"]
    mass = result.sum((1, 2))  # (B, W)
    centre = (mass * torch.arange(20)).sum(1) / mass.sum(1)
    assert 3 < (centre - 10).abs().max() < 4.1


# --- flip ------------------------------------------------------------------------------------


def mirrored(result, inputs):
    kept = (result == inputs).flatten(1).all(1)
    turned = (result == inputs.flip(-1)).flatten(1).all(1)
    assert (kept ^ turned).all()
    return turned


def test_random_flip_mirrors_about_half():
    inputs = torch.randn(1000, 1, 3, 4)
    assert 430 < mirrored(apply("flip", inputs).inputs["image"], inputs).sum() < 570


def test_alternate_flip_alternates_and_ignores_the_generator():
    inputs = torch.randn(1000, 1, 3, 4)
    epochs = [
        mirrored(apply("flip(mode='alternate')", inputs, seed=epoch, epoch=epoch).inputs["image"], inputs)
        for epoch in range(4)
    ]
    assert 430 < epochs[0].sum() < 570
    assert torch.equal(epochs[1], ~epochs[0])
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])


def test_alternate_flip_follows_the_position_in_the_split_not_in_the_batch():
    inputs = torch.randn(100, 1, 3, 4)
    order = torch.randperm(100)
    batch = make_batch(inputs)
    shuffled = replace(batch, inputs={"image": inputs[order]}, index=batch.index[order])
    flip = parse("flip(mode='alternate')")
    generator = torch.Generator()
    assert torch.equal(flip(shuffled, generator).inputs["image"], flip(batch, generator).inputs["image"][order])


@pytest.mark.parametrize("step", [2, 3, 8, 10, 1000, 5000])
def test_the_half_of_alternate_flip_has_no_period(step):
    index = torch.arange(0, 400 * step, step)
    batch = replace(make_batch(torch.arange(2.0).repeat(400, 1, 1, 1)), index=index)
    turned = parse("flip(mode='alternate')")(batch, torch.Generator()).inputs["image"][:, 0, 0, 0]
    assert 150 < turned.sum() < 250


# --- color, cutout, auto ---------------------------------------------------------------------


def test_color_changes_what_its_settings_name():
    inputs = torch.randn(200, 3, 6, 6)
    mean = inputs.mean((1, 2, 3))
    brighter = apply("color(brightness=0.5, contrast=0, saturation=0)", inputs).inputs["image"] - inputs
    assert brighter.flatten(1).std(1).max() < 1e-5
    assert 0.4 < brighter.abs().max() <= 0.5001
    contrast = apply("color(brightness=0, contrast=0.5, saturation=0)", inputs).inputs["image"]
    torch.testing.assert_close(contrast.mean((1, 2, 3)), mean)
    factor = contrast.flatten(1).std(1) / inputs.flatten(1).std(1)
    assert 0.499 < factor.min() < 0.6
    assert 1.4 < factor.max() < 1.501
    colour = apply("color(brightness=0, contrast=0, saturation=0.5)", inputs).inputs["image"]
    torch.testing.assert_close(colour.mean(1), inputs.mean(1))
    grey = torch.randn(200, 1, 6, 6).repeat(1, 3, 1, 1)
    torch.testing.assert_close(apply("color(brightness=0, contrast=0, saturation=1)", grey).inputs["image"], grey)


def test_cutout_covers_one_square_with_the_mean():
    result = apply("cutout(size=0.5)", torch.ones(200, 3, 12, 8)).inputs["image"]
    covered = (result == 0).all(1)
    rows, columns = covered.any(2).sum(1), covered.any(1).sum(1)
    assert torch.equal(covered.flatten(1).sum(1), rows * columns)
    assert rows.max() == columns.max() == 4
    assert rows.min() >= 1


def test_auto_leaves_the_rest_of_the_batch_alone():
    inputs = torch.randn(600, 3, 16, 16)
    changed = (apply("auto", inputs).inputs["image"] != inputs).flatten(1).any(1)
    assert 0.85 < changed.float().mean() < 0.97, "one of twelve operations is to do nothing"


# --- mixing ----------------------------------------------------------------------------------


def test_mixup_blends_pictures_and_targets_alike():
    count = 64
    inputs = torch.eye(count)[:, :, None, None].repeat(1, 1, 2, 2)  # picture n is 1 in channel n only
    result = apply("mixup(alpha=1)", inputs, targets=torch.arange(count), classes=count)
    torch.testing.assert_close(result.inputs["image"][:, :, 0, 0], result.targets["class"])


def test_cutmix_shares_are_the_pixels_counted():
    count = 64
    inputs = torch.eye(count)[:, :, None, None].repeat(1, 1, 9, 7)
    result = apply("cutmix", inputs, targets=torch.arange(count), classes=count)
    torch.testing.assert_close(result.inputs["image"].mean((2, 3)), result.targets["class"])
    assert set(result.inputs["image"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_shares_are_mixed_again(name):
    count = 32
    inputs = torch.eye(count)[:, :, None, None].repeat(1, 1, 8, 8)
    once = apply(name, inputs, targets=torch.arange(count), classes=count)
    twice = parse("mixup(alpha=1)")(once, torch.Generator().manual_seed(5))
    torch.testing.assert_close(twice.inputs["image"].mean((2, 3)), twice.targets["class"])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 8.0])
def test_shares_have_the_distribution_of_the_papers(alpha):
    drawn = symmetric_beta(make_batch(torch.zeros(40_000, 1, 1, 1)), alpha, torch.Generator().manual_seed(1))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert abs(float(drawn.mean()) - 0.5) < 0.01
    expected = torch.distributions.Beta(alpha, alpha)
    assert abs(float(drawn.var()) - float(expected.variance)) < 0.003
    torch.manual_seed(2)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    other = expected.sample((40_000,)).quantile(levels)
    assert (drawn.quantile(levels) - other).abs().max() < 0.02


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "affine(degrees=-1)",
        "auto(strength='high')",
        "color(contrast=2)",
        "crop(padding=-1)",
        "crop(padding='a')",
        "crop(fraction=True)",
        "cutmix(alpha=0)",
        "cutout(size=float)",
        "flip(mode='up')",
        "flip(mode=['random'])",
        "mixup(probability=1.5)",
        "resized_crop(scale=(1, 0.5))",
        "resized_crop(scale=0.5)",
        "resized_crop(ratio=('a', 'b'))",
    ],
)
def test_impossible_settings_are_refused(spec):
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert caught.value.fix


def test_lists_are_accepted_as_pairs():
    assert parse("resized_crop(scale=[0.5, 1])") == parse("resized_crop(scale=(0.5, 1))")
