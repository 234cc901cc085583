"""The scores of a detector: those of COCO's own evaluation, and rules that hold for any answers."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from suanli.tasks._average_precision import LIMITS, mean_scores
from suanli.tasks._matching import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    PLACE,
    RANGES,
    RIGHT,
    UNCOUNTED,
    Objects,
    count_objects,
    match,
)

Random = np.random.Generator
ORDER = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("recall_1", "recall_10", "recall_100", "recall_small", "recall_medium", "recall_large"),
)


class Scene:
    """Objects of some images, and answers that are near some of them; every eighth object is a crowd."""

    def __init__(self, seed: int, *, images: int, classes: int, most: int, crowds: bool = True) -> None:
        random = np.random.default_rng(seed)
        self.classes = classes
        self.objects: list[Objects] = []
        self.answers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # corners, classes and scores, best first
        for _ in range(images):
            count = int(random.integers(0, 8))
            corner, size = random.random((count, 2)) * 300, np.exp(random.normal(3.6, 1, (count, 2))).clip(2, 300)
            crowd = (random.random(count) < 0.125) & crowds
            objects = Objects(
                np.concatenate([corner, corner + size], 1), random.integers(0, classes, count), crowd, crowd
            )
            self.objects.append(objects)
            near = random.integers(0, count, random.integers(0, most)) if count else np.zeros(0, int)
            moved = objects.corners[near] + random.normal(0, 0.12, (len(near), 4)) * np.tile(size[near], 2)
            corners = np.concatenate([moved.reshape(-1, 2, 2).min(1), moved.reshape(-1, 2, 2).max(1) + 1], 1)
            labels = np.where(
                random.random(len(near)) < 0.8, objects.classes[near], random.integers(0, classes, len(near))
            )
            self.answers.append((corners, labels, np.sort(random.random(len(near)))[::-1]))

    def records(self) -> dict[str, np.ndarray]:
        count, most = len(self.objects), max(len(scores) for *_, scores in self.answers) + 1
        records = {
            "score": np.zeros((count, most)),
            "class": np.full((count, most), -1),
            "hit": np.zeros((count, most, len(RANGES)), np.uint16),
            "uncounted": np.zeros((count, most, len(RANGES)), np.uint16),
            "objects": np.stack([count_objects(objects, self.classes) for objects in self.objects]),
        }
        for i, (objects, (corners, labels, scores)) in enumerate(zip(self.objects, self.answers, strict=True)):
            matches = match(corners, labels, objects)
            for name, values in (("score", scores), ("class", labels), *matches._asdict().items()):
                if name in records:
                    records[name][i, : len(scores)] = values
        return records

    def by_coco(self) -> list[float]:
        """The published evaluation."""
        coco = pytest.importorskip("pycocotools.coco", reason="pip install pycocotools==2.0.11")
        from pycocotools.cocoeval import COCOeval

        def box(corners: np.ndarray) -> list[float]:
            left, top, right, bottom = corners.tolist()
            return [left, top, right - left, bottom - top]

        annotations = [
            {
                "image_id": i,
                "category_id": int(label) + 1,
                "bbox": box(corners),
                "area": float(np.prod(corners[2:] - corners[:2])),
                "iscrowd": int(crowd),
            }
            for i, objects in enumerate(self.objects, start=1)
            for corners, label, crowd in zip(objects.corners, objects.classes, objects.crowd, strict=True)
        ]
        answers = [
            {"image_id": i, "category_id": int(label) + 1, "bbox": box(corners), "score": float(score)}
            for i, one in enumerate(self.answers, start=1)
            for corners, label, score in zip(*one, strict=True)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco.COCO()
            truth.dataset = {
                "images": [{"id": i} for i in range(1, len(self.objects) + 1)],
                "annotations": [{"id": i, **one} for i, one in enumerate(annotations, start=1)],
                "categories": [{"id": i} for i in range(1, self.classes + 1)],
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(answers), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats.tolist()


@pytest.mark.parametrize(
    ("images", "classes", "most"),
    [(30, 3, 20), (5, 2, 8), (12, 1, 250), (40, 1, 12), (25, 5, 30)],  # 250: more than COCO counts
)
def test_equals_the_published_evaluation(images: int, classes: int, most: int) -> None:
    scene = Scene(images, images=images, classes=classes, most=most)
    expected = scene.by_coco()
    scores = mean_scores(scene.records(), np.ones((1, images)))
    assert [float(np.nan_to_num(scores[name][0], nan=-1.0)) for name in ORDER] == pytest.approx(expected, abs=1e-9)


def test_a_published_result_by_hand() -> None:
    """Three objects; the answers find two of them, with a wrong one in between: precision 1 up to a recall of 1/3 (34
    of 101 steps), 2/3 up to 2/3 (33 more)."""
    corners = np.array([[0, 0, 100, 100], [200, 0, 300, 100], [400, 0, 500, 100]], float)
    no = np.zeros(3, bool)
    objects = Objects(corners, np.zeros(3, int), no, no)
    answers = np.array([[0, 0, 100, 100], [600, 0, 700, 100], [200, 0, 300, 100]], float)
    matches = match(answers, np.zeros(3, int), objects)
    records = {
        "score": np.array([[0.9, 0.8, 0.7]]),
        "class": np.zeros((1, 3), int),
        "hit": matches.hit[None],
        "uncounted": matches.uncounted[None],
        "objects": count_objects(objects, 1)[None],
    }
    scores = mean_scores(records, np.ones((1, 1)))
    assert scores["map"][0] == pytest.approx((34 + 33 * 2 / 3) / 101)
    assert scores["recall_100"][0] == pytest.approx(2 / 3)
    assert scores["recall_1"][0] == pytest.approx(1 / 3)
    assert np.isnan(scores["map_small"][0])
    assert scores["map_large"][0] == scores["map"][0]


def test_a_thousand_weights_at_once_are_those_one_after_another() -> None:
    records = Scene(1, images=30, classes=3, most=20).records()
    weights = np.random.default_rng(0).integers(0, 4, (20, 30)).astype(float)
    together = mean_scores(records, weights)
    for row, own in enumerate(weights):
        one = mean_scores(records, own[None])
        for name, values in together.items():
            np.testing.assert_allclose(values[row], one[name][0], rtol=1e-12)


def test_an_image_of_weight_two_is_there_twice() -> None:
    records = Scene(2, images=20, classes=2, most=20).records()
    weights = np.random.default_rng(0).integers(0, 3, 20)
    repeated = {name: np.repeat(column, weights, axis=0) for name, column in records.items()}
    one, other = mean_scores(records, weights[None].astype(float)), mean_scores(repeated, np.ones((1, weights.sum())))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12)


def test_equal_scores_have_no_order() -> None:
    records = Scene(3, images=40, classes=2, most=20).records()
    records["score"] = np.round(records["score"], 1)
    order = np.random.default_rng(0).permutation(40)
    shuffled = {name: column[order] for name, column in records.items()}
    one, other = (mean_scores(some, np.ones((1, 40))) for some in (records, shuffled))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12)


def test_kinds_of_answers() -> None:
    """Of one object of class 0, one of class 1, and a crowd of class 0."""
    corners = np.array([[0, 0, 100, 100], [200, 0, 300, 100], [400, 0, 600, 200]], float)
    crowd = np.array([False, False, True])
    objects = Objects(corners, np.array([0, 1, 0]), crowd, crowd)
    answers = {
        RIGHT: ([0, 0, 100, 100], 0),
        DUPLICATE: ([0, 0, 100, 90], 0),
        CLASS: ([200, 0, 300, 100], 0),
        PLACE: ([70, 0, 170, 100], 0),
        BOTH: ([270, 0, 370, 100], 0),
        BACKGROUND: ([800, 0, 900, 100], 0),
        UNCOUNTED: ([450, 50, 500, 100], 0),
    }
    matches = match(
        np.array([one for one, _ in answers.values()], float), np.array([k for _, k in answers.values()]), objects
    )
    assert matches.kind.tolist() == list(answers)
    assert matches.object[:5].tolist() == [0, 0, 1, 0, 1]
    assert matches.object[5] == -1


def test_the_limit_of_answers_is_cocos() -> None:
    assert LIMITS == (1, 10, 100)
