"""What a detector's answers become: boxes in the user's pixels, a threshold, confusion, kinds of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from suanli.core.boxes import Box, Boxes
from suanli.core.compare import difference
from suanli.core.errors import UsageError
from suanli.core.registry import load
from suanli.core.schema import Arrays, Geometry, Ragged, Stored
from suanli.core.scored_examples import ScoredExamples
from suanli.core.sections import Matrix, Table
from suanli.core.task import Records, Task

CLASSES = ("cat", "dog")
GEOMETRY = Geometry(size=(480, 640), scale=(0.5, 0.5), shift=(40.0, 0.0))  # 640x480 px in a square of 320
Found = tuple[float, float, float, float, str, float]  # in pixels of the image, the class and the score


def make(goal: str = "f1", most: int = 20) -> Task:
    task: Task = load("tasks", "detection").of(CLASSES, {"goal": goal, "most": most})
    return task


def encode(task: Task, *images: list[Box]) -> dict[str, Stored]:
    rows = [task.encode(Boxes(tuple(boxes)), GEOMETRY) for boxes in images]
    return {
        "boxes": Ragged.of([row["boxes"] for row in rows], like=np.zeros((0, 6), np.float32)),
        "geometry": np.stack([row["geometry"] for row in rows]),
    }


def answer(*images: list[Found], most: int = 20) -> dict[str, np.ndarray]:
    """As `predict` gives it, in the coordinates of the square."""
    answers = {
        "num_dets": np.array([[len(found)] for found in images], np.int32),
        "det_boxes": np.zeros((len(images), most, 4), np.float32),
        "det_scores": np.zeros((len(images), most), np.float32),
        "det_classes": np.zeros((len(images), most), np.int32),
    }
    for i, found in enumerate(images):
        for j, (left, top, right, bottom, label, score) in enumerate(sorted(found, key=lambda one: -one[-1])):
            answers["det_boxes"][i, j] = [left / 2, top / 2 + 40, right / 2, bottom / 2 + 40]
            answers["det_scores"][i, j] = score
            answers["det_classes"][i, j] = CLASSES.index(label)
    return answers


def one(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in arrays.items()}


def test_answers_are_in_pixels_of_the_image() -> None:
    found = [(10, 20, 110, 220, "dog", 0.9), (-50, 20, 110, 900, "cat", 0.8), (0, 0, 9, 9, "cat", 0.1)]
    given = make().answer(one(answer(found)), GEOMETRY, top=10)
    assert given.text == "1 dog, 1 cat"
    assert given.values == {
        "count": 2,
        "boxes": [
            {"label": "dog", "box": [10, 20, 110, 220], "probability": pytest.approx(0.9)},
            {"label": "cat", "box": [0, 20, 110, 480], "probability": pytest.approx(0.8)},
        ],
    }
    assert make().answer(one(answer(found)), GEOMETRY, top=1).values["count"] == 1
    assert make().answer(one(answer([])), GEOMETRY, top=1).text == "nothing"


def test_clients_get_pixels_of_the_image() -> None:
    found = [(10, 20, 110, 220, "dog", 0.9), (-50, 20, 110, 900, "cat", 0.1)]
    given = make().to_input(answer(found, [], found[:1]), [GEOMETRY, GEOMETRY, Geometry.unchanged((320, 320))])
    assert given["det_boxes"][0, :2].tolist() == [[10, 20, 110, 220], [0, 20, 110, 480]]
    assert given["det_boxes"][2, 0].tolist() == [5, 50, 55, 150]  # it was sent at the model's size
    assert not given["det_boxes"][0, 2:].any()
    assert not given["det_boxes"][1].any()
    assert given["det_scores"][0, :2].tolist() == pytest.approx([0.9, 0.1])


def test_what_is_right_and_what_is_missed() -> None:
    task = make()
    boxes = [Box(0, 0, 100, 100, "cat"), Box(200, 0, 300, 100, "dog"), Box(300, 300, 400, 400, "cat", difficult=True)]
    found = [(0, 0, 100, 90, "cat", 0.9), (0, 0, 90, 100, "cat", 0.8), (300, 300, 400, 400, "cat", 0.7),
             (200, 0, 300, 100, "dog", 0.1)]  # fmt: skip
    targets = encode(task, boxes)
    sides = task.answer_beside_target(one(answer(found)), {n: c[0] for n, c in targets.items()}, GEOMETRY, top=100)
    own, true = ([box["verdict"] for box in side.values["boxes"]] for side in sides)
    assert own == ["right", "duplicate", None]
    assert true == ["right", "missed", None]


def test_targets_come_back_as_they_were() -> None:
    task = make()
    boxes = [Box(10, 20, 110, 220, "dog"), Box(1, 2, 3, 4, "cat", crowd=True)]
    encoded = task.encode(Boxes(tuple(boxes), (480, 640)), GEOMETRY)
    assert encoded["boxes"].tolist() == [[5, 50, 55, 150, 1, 0], [0.5, 41, 1.5, 42, 0, 1]]
    described = task.describe_target(encoded, GEOMETRY)
    assert described.values["boxes"] == [
        {"label": "dog", "box": [10, 20, 110, 220]},
        {"label": "cat", "box": [1, 2, 3, 4]},
    ]


@pytest.mark.parametrize("goal", ["", "f2", "precision>=2", "precision", "recall>=", "threshold=-1"])
def test_what_is_no_goal(goal: str) -> None:
    with pytest.raises(UsageError, match="goal is"):
        make(goal)


def graded() -> Records:
    """Ten images with a cat each: found with scores from 0.95 down to 0.5, then nothing but wrong boxes below that,
    and between them two wrong ones."""
    task = make()
    targets = encode(task, *[[Box(10, 10, 110, 110, "cat")]] * 10)
    images: list[list[Found]] = [[(10, 10, 110, 110, "cat", 0.95 - 0.05 * i)] for i in range(10)]
    images[0].append((300, 300, 400, 400, "cat", 0.72))
    images[1].append((300, 300, 400, 400, "cat", 0.62))
    for image in images:
        image.append((500, 100, 600, 200, "dog", 0.3))
    return task.records(answer(*images), targets)


@pytest.mark.parametrize(
    ("goal", "low", "high"),
    [
        ("f1", 0.3, 0.5),  # all cats and two wrong boxes: 20 / 22
        ("precision>=1.0", 0.72, 0.75),
        ("precision>=0.85", 0.62, 0.65),
        ("recall>=0.5", 0.72, 0.75),
        ("recall>=1.0", 0.3, 0.5),
        ("threshold=0.42", 0.42, 0.42),
    ],
)
def test_the_threshold_reaches_the_goal(goal: str, low: float, high: float) -> None:
    records = graded()
    task = make(goal).calibrate(records)
    assert low <= task.threshold <= high
    assert "boxes are shown from a score of" in task.describe()[0]
    assert type(task).of(task.classes, json.loads(json.dumps(task.settings))) == task


def test_without_objects_or_answers_there_is_no_threshold_to_choose() -> None:
    task = make()
    for targets, answers in (
        (encode(task, []), answer([(0, 0, 9, 9, "cat", 0.9)])),
        (encode(task, [Box(0, 0, 9, 9, "cat")]), answer([])),
    ):
        records = task.records(answers, targets)
        assert task.calibrate(records).threshold is None
        assert task.scores(records)["map"] == 0


@pytest.fixture
def mixed() -> Records:
    """Of two cats and two dogs: a cat is found, twice; one is taken for a dog; a dog is found at the wrong place; the
    other isn't found; and there is a box on nothing. A crowd takes what is on it."""
    task = make()
    targets = encode(
        task,
        [Box(0, 0, 100, 100, "cat"), Box(200, 0, 300, 100, "cat"), Box(400, 0, 500, 100, "dog")],
        [Box(0, 0, 100, 100, "dog"), Box(200, 200, 600, 400, "cat", crowd=True)],
    )
    return task.records(
        answer(
            [
                (0, 0, 100, 100, "cat", 0.9),
                (0, 0, 100, 90, "cat", 0.8),
                (200, 0, 300, 100, "dog", 0.7),
                (460, 0, 560, 100, "dog", 0.6),
            ],
            [(0, 300, 100, 400, "dog", 0.9), (210, 210, 300, 300, "cat", 0.8), (0, 0, 100, 100, "dog", 0.1)],
        ),
        targets,
    )


def test_mistakes_by_their_kind(mixed: Records) -> None:
    figures = make().evaluate(mixed)
    assert figures["kinds_of_mistakes"] == {
        "right": 1,
        "class": 1,
        "place": 1,
        "class and place": 0,
        "duplicate": 1,
        "background": 1,
        "missed": 3,
    }
    # Rows are true, columns shown; the last are the background.
    assert figures["confusion"]["names"] == ["cat", "dog", "background"]
    assert figures["confusion"]["counts"] == [[1, 1, 0], [0, 0, 2], [1, 2, 0]]


def test_scores_of_shown_boxes(mixed: Records) -> None:
    scores = make().scores(mixed)
    assert scores["precision"] == pytest.approx(1 / 5)  # the box on the crowd and the weak one don't count
    assert scores["recall"] == pytest.approx(1 / 4)
    assert scores["f1"] == pytest.approx(2 / 9)
    assert make().errors(mixed).tolist() == [2 + 3, 1 + 1]


def test_classes_with_their_intervals(mixed: Records) -> None:
    figures = make().evaluate(mixed)
    cat, dog = figures["per_class"]
    assert (cat["count"], dog["count"]) == (2, 2)
    assert cat["low"] <= cat["average_precision"] <= cat["high"]
    assert (cat["precision"], cat["recall"]) == (1 / 2, 1 / 2)
    assert [len(one["precision"]) for one in figures["curves"]] == [101, 101]
    sections = make().sections(figures)
    assert [section.title for section in sections] == [
        "Each class",
        "Precision and recall",
        "Kinds of mistakes",
        "Confusion of classes",
    ]
    assert isinstance(sections[0], Table)
    assert isinstance(sections[-1], Matrix)


def test_a_class_without_objects_has_no_scores() -> None:
    task = make()
    records = task.records(answer([(0, 0, 9, 9, "cat", 0.9)]), encode(task, [Box(0, 0, 9, 9, "cat")]))
    figures = task.evaluate(records)
    cat, dog = figures["per_class"]
    assert cat["average_precision"] == 1
    assert dog["average_precision"] is dog["recall"] is dog["low"] is None
    assert [curve["name"] for curve in figures["curves"]] == ["cat"]
    scores = task.defined_scores(records)
    assert scores["map"] == scores["map_small"] == 1
    assert scores["map_large"] is None


def test_records_survive_the_disk(mixed: Records, tmp_path: Path) -> None:
    """As an evaluation keeps them, to compare two runs later."""
    keys = np.arange(2, dtype=np.uint64)
    kept = ScoredExamples(records=mixed, keys=keys, inputs=keys, groups=None, preprocess="", classes=CLASSES)
    kept.write(tmp_path / "scored.safetensors")
    read = ScoredExamples.read(tmp_path / "scored.safetensors")
    assert read is not None
    assert make().defined_scores(read.records) == make().defined_scores(mixed)
    assert make().evaluate(read.records) == make().evaluate(mixed)
    change = difference(make(), mixed, read.records)
    assert (change.low, change.median, change.high) == (0, 0, 0)


def test_drift_is_the_share_of_scores_that_is_not_found_again() -> None:
    task = make()
    first = answer([(0, 0, 100, 100, "cat", 0.8), (200, 0, 300, 100, "dog", 0.2)], [])
    assert task.drift(first, first).tolist() == [0, 0]
    lost = answer([(0, 0, 100, 100, "cat", 0.8)], [])
    assert task.drift(first, lost)[0] == pytest.approx(0.04 / 0.68)
    moved = answer([(0, 0, 100, 90, "cat", 0.8), (200, 0, 300, 100, "dog", 0.2)], [])
    assert task.drift(first, moved)[0] == pytest.approx(0.064 / 0.68)
    other = answer([(0, 0, 100, 100, "dog", 0.8), (200, 0, 300, 100, "dog", 0.2)], [(0, 0, 9, 9, "cat", 0.5)])
    assert task.drift(first, other).tolist() == pytest.approx([0.64 / 0.68, 1])
    assert task.agreement(first, lost).tolist() == [True, True]  # the second box isn't shown
    assert task.agreement(first, other).tolist() == [False, False]


def test_two_thousand_objects_in_an_image() -> None:
    task = make(most=2500)
    boxes = [Box(12 * (i % 50), 12 * (i // 50), 12 * (i % 50) + 9, 12 * (i // 50) + 9, "cat") for i in range(2000)]
    targets = encode(task, boxes)
    found = [(*box[:4], "cat", 1 - i / 4000) for i, box in enumerate(boxes)]
    records = task.records(answer(found, most=2500), targets)
    scores = task.scores(records)
    assert scores["recall"] == scores["precision"] == 1
    assert scores["recall_100"] == pytest.approx(0.05)  # COCO counts a hundred answers of a class
