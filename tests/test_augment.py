"""Augmentations from their text in a recipe, and several as one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.core.errors import UsageError
from suanli.core.schema import Column
from suanli.core.types import Batch
from suanli.tasks.classification import Classification
from suanli.training.augment import AugmentationPipeline, compose, parse


def test_parsing():
    assert parse("crop(padding=2)").padding == 2
    assert parse(" crop ( padding = 2 , fraction = 0.5 ) ") == parse("crop(padding=2, fraction=.5)")
    assert parse("crop()") == parse("crop")
    assert parse("flip(mode='alternate')").mode == "alternate"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("crops", "'crop'"),
        ("crop(paddin=2)", "'padding'"),
        ("crop(2)", "crop(padding=2)"),
        ("crop(padding=2", "crop(padding=2)"),
        ("crop(padding=1, padding=2)", "crop(padding=2)"),
        ("crop(padding=open('x'))", "crop(padding=2)"),
        ("crop(**{'padding': 2})", "crop(padding=2)"),
        ("a.b(c=1)", "crop(padding=2)"),
        ("", "crop(padding=2)"),
        ("crop; flip", "crop(padding=2)"),
        ("crop\0", "crop(padding=2)"),
        ("_sampling", "Allowed"),
        ("__import__('os')", "crop(padding=2)"),
    ],
)
def test_what_cannot_be_parsed_is_refused_with_advice(spec, hint):
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert hint in caught.value.fix


@given(st.text(max_size=40))
def test_any_text_is_an_augmentation_or_a_usage_error(spec):
    try:
        parse(spec)
    except UsageError:
        return
    assert spec.strip()


def test_an_augmentation_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="image") as caught:
        compose(["flip"], ("tokens",), TARGETS)
    assert "Leave it out" in caught.value.fix


TARGETS = Classification(classes=("a", "b")).targets


def test_an_augmentation_that_spoils_the_targets_is_refused():
    mask = {"mask": Column(shape=(8, 8), dtype="uint8", role="mask")}
    with pytest.raises(UsageError, match="would make mask targets wrong") as caught:
        compose(["flip"], ("image",), mask)
    assert "color" in caught.value.fix


def batch_of(inputs):
    count = len(inputs)
    return Batch(
        inputs={"image": inputs},
        targets={"class": torch.arange(count)},
        index=torch.arange(count),
        epoch=0,
        classes=count,
    )


def test_parts_are_applied_in_order_with_one_generator():
    batch = batch_of(torch.randn(6, 3, 8, 8))
    composed = compose(["crop(padding=2)", "flip"], ("image",), TARGETS)(batch, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    expected = parse("flip")(parse("crop(padding=2)")(batch, generator), generator)
    assert torch.equal(composed.inputs["image"], expected.inputs["image"])


def test_no_parts_change_nothing():
    batch = batch_of(torch.randn(2, 1, 4, 4))
    pipeline = compose([], ("image",), TARGETS)
    assert pipeline == AugmentationPipeline()
    assert pipeline(batch, torch.Generator()) is batch
    assert len(pipeline.views(batch.inputs)) == 1


def test_views_are_every_combination_once():
    inputs = torch.randn(2, 3, 8, 8)
    views = compose(["crop(padding=2)", "flip", "cutout", "flip(mode='alternate')"], ("image",), TARGETS).views(
        {"image": inputs}
    )
    views = [view["image"] for view in views]
    assert len(views) == 6
    assert torch.equal(views[0], inputs)
    assert all(not torch.equal(a, b) for n, a in enumerate(views) for b in views[:n])


def test_mixing_twice_keeps_shares():
    batch = batch_of(torch.randn(8, 3, 8, 8))
    result = compose(["mixup", "cutmix"], ("image",), TARGETS)(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.targets["class"].sum(1), torch.ones(8))
