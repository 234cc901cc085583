"""How a detector learns and answers: assignment, loss, non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import suanli
from suanli.core.errors import UsageError
from suanli.core.types import Recipe
from suanli.data.preprocess.image import ImagePreprocess
from suanli.models import build
from suanli.tasks._detection_loss import assign, count_boxes, generalized_overlap, losses
from suanli.tasks._suppression import keep
from suanli.tasks.detection import Detection

TASK = Detection(classes=("ant", "bee", "cat"))
SIDE = 128  # px


def cells() -> torch.Tensor:
    """(A, 3): the points of an image of 128 px."""
    rows = [(x + s / 2, y + s / 2, s) for s in (8, 16, 32) for y in range(0, SIDE, s) for x in range(0, SIDE, s)]
    return torch.tensor(rows, dtype=torch.float32)


def targets(*images: Sequence[Sequence[float]]) -> dict[str, torch.Tensor]:
    """Of rows left, top, right, bottom, class, flag."""
    padded = torch.zeros(len(images), max(map(len, images)), 6)
    for row, boxes in zip(padded, images, strict=True):
        row[: len(boxes)] = torch.tensor(boxes).reshape(-1, 6)
    return {"boxes": padded, "boxes_lengths": torch.tensor([len(boxes) for boxes in images])}


def guesses(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a network returns that has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    points = cells().expand(count, -1, -1)
    sides = points[..., 2:] * (1 + 4 * torch.rand(count, points.shape[1], 4, generator=generator))
    boxes = torch.cat([points[..., :2] - sides[..., :2], points[..., :2] + sides[..., 2:]], 2)
    return boxes, torch.randn(count, points.shape[1], 3, generator=generator) - 4, points


def assign_to(outputs: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> Any:
    rows = given["boxes"]
    beyond = torch.arange(rows.shape[1]) >= given["boxes_lengths"][:, None]
    return assign(*outputs, rows, torch.where(beyond, -1.0, rows[..., 5]))


SIDES = st.floats(1, 60)
BOXES = st.lists(
    st.tuples(st.floats(0, SIDE - 1), st.floats(0, SIDE - 1), SIDES, SIDES, st.integers(0, 2)), min_size=1, max_size=12
)


@given(BOXES)
def test_cells_answer_for_boxes_that_they_are_near(boxes: list[tuple[float, float, float, float, int]]) -> None:
    rows = [(x, y, x + w, y + h, label, 0) for x, y, w, h, label in boxes]
    outputs = guesses(1)
    assigned = assign_to(outputs, targets(rows))
    own = torch.nonzero(assigned.overlap[0])[:, 0]
    truth = torch.tensor(rows)[assigned.box[0, own]]
    centre, (x, y, stride) = (truth[:, :2] + truth[:, 2:4]) / 2, outputs[2][0, own].T
    distance = (torch.stack([x, y], 1) - centre).norm(dim=1) / stride
    inside = (x > truth[:, 0]) & (x < truth[:, 2]) & (y > truth[:, 1]) & (y < truth[:, 3])
    assert (inside | (distance < 1.5)).all()
    assert (assigned.overlap <= 1).all()


@pytest.mark.parametrize("side", [1.0, 3.0, 30.0, 120.0])
def test_an_object_that_stands_alone_gets_cells_whatever_its_size(side: float) -> None:
    found = assign_to(guesses(1), targets([(5, 5, 5 + side, 5 + side, 1, 0)]))
    assert 1 <= (found.overlap > 0).sum() <= 13


def test_boxes_that_do_not_count_are_neither_objects_nor_background() -> None:
    outputs = guesses(3)
    crowd, removed = (0, 0, 64, 64, 0, 1), (0, 0, 64, 64, 0, -1)
    given_targets = targets([crowd], [removed], [])
    assigned = assign_to(outputs, given_targets)
    assert not assigned.overlap.any()
    x, y, _ = cells().T
    assert torch.equal(assigned.ignored[0], (x < 64) & (y < 64))
    assert not assigned.ignored[1:].any()
    assert count_boxes(given_targets) == 0
    with_crowd, without = (
        losses(tuple(one[[i]] for one in guesses(3)), {k: v[[i]] for k, v in given_targets.items()})["class"]
        for i in (0, 1)
    )
    assert with_crowd != without


def test_rows_that_are_no_boxes_change_nothing() -> None:
    box = (20.0, 30.0, 60.0, 90.0, 2.0, 0.0)
    plain = losses(guesses(1), targets([box]))
    padded = targets([(0, 0, 99, 99, 1, -1), box, (0, 0, 50, 50, 0, 0)])
    padded["boxes_lengths"][0] = 2
    for name, value in losses(guesses(1), padded).items():
        torch.testing.assert_close(value, plain[name])


def test_many_boxes_are_compared_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(i, i, i + 20, i + 30, i % 3, 0) for i in range(40)]
    given_targets = targets(rows, rows[:3], [])
    whole = losses(guesses(3), given_targets)
    monkeypatch.setattr("suanli.tasks._detection_loss.CHUNK", 1)
    for name, value in losses(guesses(3), given_targets).items():
        torch.testing.assert_close(value, whole[name])


def test_a_batch_without_boxes_has_a_loss_and_gradients() -> None:
    boxes, logits, points = guesses(2)
    boxes.requires_grad_()
    logits.requires_grad_()
    sums = losses((boxes, logits, points), {"boxes": torch.zeros(2, 0, 6), "boxes_lengths": torch.zeros(2)})
    sum(sums.values()).backward()
    assert sums["class"] > 0
    assert sums["box"] == 0
    assert boxes.grad is not None


def test_right_answers_cost_least() -> None:
    rows = [(16, 16, 56, 40, 0, 0), (70, 60, 110, 120, 2, 0)]
    boxes, logits, points = guesses(1)
    x, y, _ = points[0].T
    for left, top, right, bottom, _, _ in rows:
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        boxes[0, inside] = torch.tensor([left, top, right, bottom], dtype=torch.float32)
    assigned = assign_to((boxes, logits, points), targets(rows))
    own = assigned.overlap[0] > 0
    logits[0] = -8
    logits[0, own, torch.tensor(rows)[assigned.box[0, own], 4]] = 6
    good, bad = losses((boxes, logits, points), targets(rows)), losses(guesses(1), targets(rows))
    assert sum(good.values()) < 0.01 * sum(bad.values())
    answers = TASK.predict((boxes, logits, points))
    assert answers["num_dets"][0, 0] >= 2
    found = {
        (int(c), *map(int, b)) for c, b in zip(answers["det_classes"][0][:2], answers["det_boxes"][0], strict=False)
    }
    assert found == {(0, 16, 16, 56, 40), (2, 70, 60, 110, 120)}


def test_generalized_overlap_of_known_boxes() -> None:
    box = torch.tensor([0.0, 0, 2, 2])
    others = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [3, 0, 4, 2]])
    expected = torch.tensor([1, 1 / 3, -(8 - 6) / 8])
    torch.testing.assert_close(generalized_overlap(box.expand(3, 4), others), expected, atol=1e-6, rtol=0)


# --- answers --------------------------------------------------------------------------------


def suppress_one_by_one(corners: torch.Tensor, overlap: float) -> list[bool]:
    kept: list[int] = []
    for i, box in enumerate(corners):
        shared = (torch.min(box[2:], corners[kept, 2:]) - torch.max(box[:2], corners[kept, :2])).clamp(min=0).prod(1)
        area = (corners[:, 2:] - corners[:, :2]).prod(1)
        if not (shared > overlap * (area[i] + area[kept] - shared + 1e-7)).any():
            kept.append(i)
    return [i in kept for i in range(len(corners))]


@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.5, 0.65, 0.9]))
def test_suppression_all_at_once_equals_one_by_one(seed: int, overlap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    starts = 60 * torch.rand(80, 2, generator=generator)
    corners = torch.cat([starts, starts + 5 + 30 * torch.rand(80, 2, generator=generator)], 1)
    labels = torch.zeros(1, 80, dtype=torch.int64)
    assert keep(corners[None], labels, overlap)[0].tolist() == suppress_one_by_one(corners, overlap)


def test_classes_do_not_suppress_each_other_and_the_best_is_first() -> None:
    box = torch.tensor([-20.0, 5, 30, 40])
    boxes = box.expand(1, 3, 4)
    logits = torch.full((1, 3, 3), -20.0)
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 2, 0] = 1, 2, 3
    answers = TASK.predict((boxes, logits, cells()[None, :3]))
    assert answers["num_dets"].tolist() == [[2]]
    assert answers["det_classes"][0, :2].tolist() == [0, 1]
    assert answers["det_scores"][0, :3].tolist() == pytest.approx([0.9526, 0.8808, 0], abs=1e-4)
    assert answers["det_boxes"][0, 1].tolist() == box.tolist()
    assert not answers["det_boxes"][0, 2:].any()


def test_an_answer_has_as_many_boxes_as_there_may_be() -> None:
    task = Detection(classes=("ant",), most=500)
    points = torch.arange(400)[:, None] * torch.tensor([10.0, 0, 0]) + torch.tensor([0.0, 0, 8])
    boxes = torch.cat([points[:, :2], points[:, :2] + 8], 1)
    answers = task.predict((boxes[None], torch.zeros(1, 400, 1), points[None]))
    assert answers["num_dets"].tolist() == [[400]]
    assert answers["det_boxes"].shape == (1, 500, 4)


# --- networks and sizes ---------------------------------------------------------------------


def test_a_network_for_classes_is_refused_for_boxes_and_the_other_way_round(tmp_path: Path) -> None:
    preprocess = ImagePreprocess(height=64, width=64)
    with pytest.raises(UsageError, match="returns scores, and the task detection needs boxes") as caught:
        build.build(Recipe(model="resnet18", task="detection"), preprocess, TASK)
    assert "detnet_s" in caught.value.fix
    with pytest.raises(UsageError, match="returns boxes"):
        suanli.train("digits", settings={"model": "detnet_n"}, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("sizes", "max_side", "expected"),
    [
        ([(480, 640)] * 5, 416, (320, 416)),
        ([(640, 480)] * 5, 416, (416, 320)),
        ([(480, 640), (640, 480)] * 3, 416, (416, 416)),
        ([(48, 48)] * 4, 416, (64, 64)),
        ([(480, 640)] * 39 + [(640, 480)], 416, (320, 416)),
        ([(10, 4000)], 640, (32, 640)),
    ],
)
def test_the_longer_side_is_given_and_the_shape_is_that_of_the_images(
    sizes: list[tuple[int, int]], max_side: int, expected: tuple[int, int]
) -> None:
    images = {size: np.zeros((*size, 3), np.uint8) for size in sizes}
    fitted = ImagePreprocess.fit(lambda: iter(images[size] for size in sizes), {"max_side": max_side, "resize": "pad"})
    assert (fitted.height, fitted.width) == expected
    row = fitted.encode(images[sizes[0]]).arrays["image"]
    assert row.shape == (*expected, 1)  # all black, so grey


@pytest.mark.parametrize("value", [0, 31, 99_999, "416", 40.5, True])
def test_a_longer_side_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="max_side"):
        ImagePreprocess.fit(lambda: iter([np.zeros((9, 9, 3), np.uint8)]), {"max_side": value})
