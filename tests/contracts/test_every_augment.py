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


INPUTS = {"image": _images, "tokens": _texts}  # a new role adds one line


@st.composite
def batches(draw, role):
    torch.manual_seed(draw(st.integers(0, 1000)))
    assert role in INPUTS, f"give this test inputs of role {role!r}"
    inputs = INPUTS[role](draw)
    targets = torch.randint(0, CLASSES, (len(inputs),))
    if draw(st.booleans()):
        targets = torch.softmax(torch.randn(len(inputs), CLASSES), dim=1)
    index = torch.randperm(50_000)[: len(inputs)]
    return batch_of(role, inputs, targets, index, draw(st.integers(0, 5)))


def batch_of(role, inputs, targets, index, epoch=0):
    """With one box in each image, beside its class."""
    both = {"class": targets}
    if role == "image":
        box = torch.tensor([0.0, 0, inputs.shape[3], inputs.shape[2], 1, 0])
        both |= {"boxes": box.repeat(len(inputs), 1, 1), "boxes_lengths": torch.ones(len(inputs), dtype=torch.int64)}
    return Batch(inputs={role: inputs}, targets=both, index=index, epoch=epoch, classes=CLASSES)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_its_name_alone_gives_its_defaults(name):
    augment = parse(name)
    assert augment == registry.load("augments", name)()
    assert is_dataclass(augment)
    assert augment.keeps
    assert any(augment.input in preprocess.roles for preprocess in registry.load_all("preprocess").values())
    settings = ", ".join(f"{field.name}={getattr(augment, field.name)!r}" for field in fields(augment))
    assert parse(f"{name}({settings})") == augment


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), seed=st.integers(0, 2**40))
def test_a_batch_becomes_a_batch_of_the_same_form(name, data, seed):
    augment = parse(name)
    batch = data.draw(batches(augment.input))
    inputs, targets = batch.inputs[augment.input], batch.targets["class"]
    before = inputs.clone(), targets.clone()
    result = augment(batch, _generator(seed))
    changed, mixed = result.inputs[augment.input], result.targets["class"]

    assert changed.shape == inputs.shape
    assert changed.dtype == inputs.dtype
    assert torch.isfinite(changed.float()).all()
    assert torch.equal(inputs, before[0]), "the batch was changed in place"
    assert torch.equal(targets, before[1]), "the targets were changed in place"
    assert torch.equal(result.index, batch.index)
    assert (result.epoch, result.classes) == (batch.epoch, batch.classes)

    if mixed.ndim == 2:
        assert mixed.shape == (len(inputs), CLASSES)
        assert (mixed >= 0).all()
        torch.testing.assert_close(mixed.sum(1), torch.ones(len(inputs)))
    else:
        assert torch.equal(mixed, targets)
    if augment.input == "image":
        rows = result.targets["boxes"]
        assert rows.shape[0] == len(inputs)
        assert rows.isfinite().all()
        assert (result.targets["boxes_lengths"] <= rows.shape[1]).all()
        if "boxes" not in augment.keeps:
            assert torch.equal(rows, batch.targets["boxes"]), "it doesn't say that it keeps boxes true"
    if not torch.equal(mixed, targets):
        assert augment.keeps <= {"class", "boxes"}, "it mixes targets, and can't keep those of other roles"

    again = augment(batch, _generator(seed))
    assert torch.equal(again.inputs[augment.input], changed), "the same generator state gave another batch"
    assert torch.equal(again.targets["class"], mixed)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_views_start_with_the_inputs_and_keep_shape(name, data):
    augment = parse(name)
    inputs = data.draw(batches(augment.input)).inputs[augment.input]
    views = augment.views(inputs)
    assert torch.equal(views[0], inputs)
    assert all(view.shape == inputs.shape and view.dtype == inputs.dtype for view in views)


@pytest.mark.parametrize("name", NAMES)
def test_changes_something(name):
    augment = parse(name)
    torch.manual_seed(0)
    inputs = torch.randn(64, 3, 16, 16) if augment.input == "image" else torch.randint(2, 99, (64, 20))
    targets = torch.arange(64) % CLASSES
    batch = batch_of(augment.input, inputs, targets, torch.arange(64))
    first, other = augment(batch, _generator(0)), augment(replace(batch, epoch=1), _generator(1))
    assert not torch.equal(first.inputs[augment.input], inputs)
    assert not torch.equal(first.inputs[augment.input], other.inputs[augment.input])


BOX_NAMES = [
    name for name, one in registry.load_all("augments").items() if one.input == "image" and "boxes" in one.keeps
]
LEVEL = 6.0  # of the pixels of an object; the background is 0


def painted(sizes, height, width, seed):
    """Images with an object each, and its box; a second row is a box that was removed, a third one padding."""
    random = torch.Generator().manual_seed(seed)
    images, rows = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), 3, 6)
    for i, (across, down) in enumerate(sizes):
        left = int(torch.randint(width - across + 1, (1,), generator=random))
        top = int(torch.randint(height - down + 1, (1,), generator=random))
        images[i, :, top : top + down, left : left + across] = LEVEL
        rows[i, 0] = torch.tensor([left, top, left + across, top + down, i % CLASSES, i % 3])
        rows[i, 1] = torch.tensor([0, 0, width, height, 1, -1])
    targets = {"boxes": rows, "boxes_lengths": torch.full((len(sizes),), 2)}
    return Batch(inputs={"image": images}, targets=targets, index=torch.arange(len(sizes)), epoch=0, classes=CLASSES)


@pytest.mark.parametrize("name", BOX_NAMES)
@given(
    sizes=st.lists(st.tuples(st.integers(6, 24), st.integers(6, 24)), min_size=1, max_size=6),
    height=st.integers(24, 40),
    width=st.integers(24, 40),
    seed=st.integers(0, 2**31),
)
def test_boxes_stay_around_their_objects(name, sizes, height, width, seed):
    augment = parse(name)
    if "least" in {field.name for field in fields(augment)}:
        augment = replace(augment, least=0.0)
    batch = painted(sizes, height, width, seed)
    result = augment(batch, _generator(seed))
    for image, rows, length in zip(
        result.inputs["image"], result.targets["boxes"], result.targets["boxes_lengths"], strict=True
    ):
        boxes = rows[:length][rows[:length, 5] >= 0]
        assert ((boxes[:, :2] >= 0) & (boxes[:, 2:4] <= torch.tensor([width, height]))).all()
        least = LEVEL * (0.249 if name == "mixup" else 0.5)
        objects = (image.mean(0) > least) if name != "color" else (image[0] > image.min() + 0.01)
        y, x = torch.nonzero(objects).T + 0.5
        near = (x[:, None] > boxes[:, 0] - 1) & (x[:, None] < boxes[:, 2] + 1)
        near &= (y[:, None] > boxes[:, 1] - 1) & (y[:, None] < boxes[:, 3] + 1)
        assert near.any(1).all(), "an object has no box"
        for left, top, right, bottom in boxes[:, :4].tolist():
            if right - left > 3 and bottom - top > 3:
                inside = objects[int(top + 1.5) : int(bottom - 0.5), int(left + 1.5) : int(right - 0.5)]
                assert inside.all(), "a box has other pixels than its object"
