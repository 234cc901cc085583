"""The contract of every augmentation, over shapes, dtypes and seeds."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.core import registry
from suanli.core.types import Batch
from suanli.training.augment import parse

NAMES = registry.names("augments")
CLASSES = 5


def _images(draw):
    count, channels = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 4]))
    height, width = draw(st.integers(1, 17)), draw(st.integers(1, 17))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return torch.randn(count, channels, height, width).to(dtype).contiguous(memory_format=layout)


def _texts(draw):
    return torch.randint(0, 50, (draw(st.integers(1, 6)), draw(st.integers(1, 20))))


INPUTS = {"image": _images, "text": _texts}  # a new kind adds one line


@st.composite
def batches(draw, kinds):
    torch.manual_seed(draw(st.integers(0, 1000)))
    kind = draw(st.sampled_from(kinds))
    assert kind in INPUTS, f"give this test inputs of kind {kind!r}"
    inputs = INPUTS[kind](draw)
    targets = torch.randint(0, CLASSES, (len(inputs),))
    if draw(st.booleans()):
        targets = torch.softmax(torch.randn(len(inputs), CLASSES), dim=1)
    index = torch.randperm(50_000)[: len(inputs)]
    return Batch(inputs=inputs, targets=targets, index=index, epoch=draw(st.integers(0, 5)), classes=CLASSES)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_its_name_alone_gives_its_defaults(name):
    augment = parse(name)
    assert augment == registry.load("augments", name)()
    assert is_dataclass(augment)
    assert augment.kinds
    assert all(kind in registry.names("preprocess") for kind in augment.kinds)
    settings = ", ".join(f"{field.name}={getattr(augment, field.name)!r}" for field in fields(augment))
    assert parse(f"{name}({settings})") == augment


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), seed=st.integers(0, 2**40))
def test_a_batch_becomes_a_batch_of_the_same_form(name, data, seed):
    augment = parse(name)
    batch = data.draw(batches(augment.kinds))
    before = replace(batch, inputs=batch.inputs.clone(), targets=batch.targets.clone())
    result = augment(batch, _generator(seed))

    assert result.inputs.shape == batch.inputs.shape
    assert result.inputs.dtype == batch.inputs.dtype
    assert torch.isfinite(result.inputs.float()).all()
    assert torch.equal(batch.inputs, before.inputs), "the batch was changed in place"
    assert torch.equal(batch.targets, before.targets), "the targets were changed in place"
    assert torch.equal(result.index, batch.index)
    assert (result.epoch, result.classes) == (batch.epoch, batch.classes)

    if result.targets.ndim == 2:
        assert result.targets.shape == (len(batch.inputs), CLASSES)
        assert (result.targets >= 0).all()
        torch.testing.assert_close(result.targets.sum(1), torch.ones(len(batch.inputs)))
    else:
        assert torch.equal(result.targets, batch.targets)

    again = augment(batch, _generator(seed))
    assert torch.equal(again.inputs, result.inputs), "the same generator state gave another batch"
    assert torch.equal(again.targets, result.targets)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_views_start_with_the_inputs_and_keep_shape(name, data):
    augment = parse(name)
    inputs = data.draw(batches(augment.kinds)).inputs
    views = augment.views(inputs)
    assert torch.equal(views[0], inputs)
    assert all(view.shape == inputs.shape and view.dtype == inputs.dtype for view in views)


@pytest.mark.parametrize("name", NAMES)
def test_changes_something(name):
    augment = parse(name)
    torch.manual_seed(0)
    inputs = torch.randn(64, 3, 16, 16) if "image" in augment.kinds else torch.randint(2, 99, (64, 20))
    targets = torch.arange(64) % CLASSES
    batch = Batch(inputs=inputs, targets=targets, index=torch.arange(64), epoch=0, classes=CLASSES)
    assert not torch.equal(augment(batch, _generator(0)).inputs, inputs)
    assert not torch.equal(augment(batch, _generator(0)).inputs, augment(replace(batch, epoch=1), _generator(1)).inputs)
