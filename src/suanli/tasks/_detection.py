"""Object detection, all but how it is learned: targets, answers, scores and what is shown of them.

A detector answers with a list of boxes with scores, best first. The primary metric is COCO's mean average precision, of
which the threshold is no part; people and clients get the boxes whose scores reach a threshold, which is chosen on the
validation split. Boxes that don't count (crowds, difficult ones) are neither found nor missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field

from suanli.core.answers import BOX_COLUMNS
from suanli.core.checked_targets import CheckedTarget, TargetReport
from suanli.core.errors import DataError
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored
from suanli.core.sections import Section
from suanli.core.task import FITTED, Answer, Metric, Records, Task, check_predictions
from suanli.core.types import Json, Target
from suanli.tasks import _average_precision, _box_data, _detection_figures, _tiles
from suanli.tasks._clean_boxes import CROWD, clean
from suanli.tasks._curves import Text
from suanli.tasks._matching import RANGES, RIGHT, UNCOUNTED, Objects, count_objects, match, overlap

USUAL_THRESHOLD = 0.3  # before one is chosen


@dataclass(frozen=True, kw_only=True)
class Detection(Task):
    """`most` is how many boxes an answer may have. Of two boxes of one class that overlap by more than `nms_iou`
    (intersection over union), the one with the lower score is left out. `goal` says how the threshold of their scores
    is chosen: "f1", "precision>=0.9", "recall>=0.9" or "threshold=0.3"."""

    name: ClassVar[str] = "detection"
    annotation: ClassVar[str] = "boxes"
    metric: ClassVar[Metric] = Metric(name="map", tolerance=0.005)
    usual_top: ClassVar[int] = 10_000
    takes_windows: ClassVar[bool] = True
    other_classes: ClassVar[str] = "other objects are not found, or taken for one of these"

    most: Annotated[int, Field(ge=1, le=10_000)] = 100
    nms_iou: Annotated[float, Field(gt=0, le=1)] = 0.65
    goal: Text = "f1"
    threshold: float | None = field(default=None, metadata=FITTED)

    def __post_init__(self) -> None:
        """Raises UsageError for what is no goal."""
        _detection_figures.check_goal(self.goal)

    # --- targets ---

    @property
    def targets(self) -> Schema:
        """Boxes in the model's coordinates: left, top, right, bottom, class, and a flag (0: it counts, 1: a crowd, 2:
        difficult). The geometry finds the way back to the pixels of the image."""
        return {
            "boxes": Column(shape=(None, 6), dtype="float32", role="boxes"),
            "geometry": Column(shape=(3, 2), dtype="float64", role="boxes"),
        }

    def encode(self, target: Target, geometry: Geometry) -> Arrays:
        """A `Boxes`. What is outside of the image, without an area or there twice is left out."""
        boxes = clean(target, geometry)
        labels = np.array([self._positions[label] for label in boxes.labels], np.float64)
        corners = _map_corners(boxes.corners, geometry.to_model)
        rows = np.concatenate([corners, labels[:, None], boxes.flags[:, None]], axis=1)
        return {"boxes": rows.astype(np.float32), "geometry": geometry.to_array()}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def strata(self, target: Target) -> Sequence[str]:
        return tuple(dict.fromkeys(box.label for box in target.boxes))

    def count_targets(self, targets: Mapping[str, Sequence[Target]]) -> dict[str, dict[str, int]]:
        """Boxes by split and class."""
        return {
            split: dict.fromkeys(self.classes, 0) | Counter(box.label for boxes in lists for box in boxes.boxes)
            for split, lists in targets.items()
        }

    def refuse_unlearnable(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Raises DataError where no training image has a box."""
        if not any(counts["train"].values()):
            raise DataError("No training image has a box.", fix="Check where the labels come from.")

    def describe_counts(self, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
        return _box_data.describe_missing_classes(self.classes, counts)

    def check_targets(self, examples: Mapping[str, Sequence[CheckedTarget]]) -> TargetReport:
        return _box_data.check_boxes(examples)

    def name_target(self, target: Target) -> str:
        return _count_names([box.label for box in target.boxes])

    @classmethod
    def data_sections(cls, figures: Mapping[str, Json]) -> list[Section]:
        return _box_data.data_sections(figures)

    # --- answers ---

    @property
    def outputs(self) -> Schema:
        """As clients know them: the first `num_dets` rows are boxes, best first, in the model's coordinates; the others
        are zeros."""
        return {
            "num_dets": Column(shape=(1,), dtype="int32", role="number", limit=self.most + 1),
            "det_boxes": Column(shape=(self.most, 4), dtype="float32", role="boxes"),
            "det_scores": Column(shape=(self.most,), dtype="float32", role="probabilities"),
            "det_classes": Column(shape=(self.most,), dtype="int32", role="class", limit=len(self.classes)),
        }

    @property
    def listed(self) -> tuple[str, ...]:
        return tuple(self.outputs)

    @property
    def shown_from(self) -> float:
        """The score from which a box is shown."""
        return USUAL_THRESHOLD if self.threshold is None else self.threshold

    def answer(self, prediction: Arrays, geometry: Geometry, *, top: int) -> Answer:
        """The boxes that reach the threshold, at most `top`, in pixels of the image."""
        found = _read_answer(prediction, geometry)
        shown = np.flatnonzero(found.scores >= self.shown_from)[: max(top, 1)]
        return self._describe(found.corners[shown], found.classes[shown], found.scores[shown])

    def with_threshold(self, threshold: float) -> Self:
        return replace(self, threshold=threshold)

    def to_input(self, predictions: Arrays, geometries: Sequence[Geometry]) -> Arrays:
        """Boxes in pixels of the images, clipped to them; rows that are none stay zeros."""
        corners = np.zeros_like(predictions["det_boxes"])
        for i, geometry in enumerate(geometries):
            count = int(np.ravel(predictions["num_dets"][i])[0])
            corners[i, :count] = _place(predictions["det_boxes"][i, :count], geometry)
        return {**predictions, "det_boxes": corners}

    def cut(self, target: Arrays, geometry: Geometry, size: Sequence[int]) -> Arrays:
        """The objects of which the tile has a part."""
        rows = np.asarray(target["boxes"], np.float64)
        moved = np.concatenate([_map_corners(rows[:, :4], geometry.to_model), rows[:, 4:]], axis=1)
        return {"boxes": _tiles.cut_boxes(moved, size).astype(np.float32), "geometry": geometry.to_array()}

    def merge(self, predictions: Arrays, geometries: Sequence[Geometry], size: Sequence[int]) -> Arrays:
        """Boxes in pixels of the picture, without the parts of objects that other tiles have whole."""
        found = [
            _read_answer({name: array[i] for name, array in predictions.items()}, geometry)
            for i, geometry in enumerate(geometries)
        ]
        counts = [len(one.scores) for one in found]
        cut = [_tiles.at_border(one.corners, geometry, size) for one, geometry in zip(found, geometries, strict=True)]
        boxes = _tiles.Candidates(
            corners=np.concatenate([one.corners for one in found]),
            classes=np.concatenate([one.classes for one in found]),
            scores=np.concatenate([one.scores for one in found]),
            cut=np.concatenate(cut),
            tile=np.repeat(np.arange(len(found)), counts),
            scale=np.repeat([min(geometry.scale) for geometry in geometries], counts),
        )
        best = _tiles.choose_boxes(boxes, self.nms_iou)[: self.most]
        merged = {name: np.zeros(array.shape[1:], array.dtype) for name, array in predictions.items()}
        merged["num_dets"][:] = len(best)
        for name, values in zip(("det_boxes", "det_classes", "det_scores"), boxes, strict=False):
            merged[name][: len(best)] = values[best]
        return merged

    def answer_beside_target(
        self, prediction: Arrays, target: Arrays, geometry: Geometry, *, top: int
    ) -> tuple[Answer, Answer]:
        answer = self.answer(prediction, geometry, top=top)
        found = _read_answer(prediction, geometry).first(len(answer.values["boxes"]))
        objects = _read_objects(np.asarray(target["boxes"], np.float64), geometry)
        own, true = _detection_figures.judge(match(found.corners, found.classes, objects), objects)
        return _with_verdicts(answer, own), _with_verdicts(self.describe_target(target, geometry), true)

    def describe_target(self, target: Arrays, geometry: Geometry) -> Answer:
        rows = np.asarray(target["boxes"], np.float64)
        return self._describe(_map_corners(rows[:, :4], geometry.to_input), rows[:, 4].astype(int), None)

    def _describe(self, corners: np.ndarray, classes: np.ndarray, scores: np.ndarray | None) -> Answer:
        names = [self.classes[label] for label in classes]
        entries: list[dict[str, Json]] = [
            {"label": name, "box": box} for name, box in zip(names, corners.round(2).tolist(), strict=True)
        ]
        for entry, score in zip(entries, [] if scores is None else scores.tolist(), strict=False):
            entry["probability"] = score
        values = {"count": len(entries), "boxes": entries}
        return Answer(kind="boxes", text=_count_names(names), values=values, columns=BOX_COLUMNS)

    @property
    def needs_calibration(self) -> bool:
        return True

    def calibrate(self, records: Records) -> Self:
        """With the threshold that reaches the goal best on these records."""
        return replace(self, threshold=_detection_figures.choose_threshold(records, self.goal))

    def describe(self) -> list[str]:
        if self.threshold is None:
            return []
        return [f"boxes are shown from a score of {self.threshold:.3g} (chosen on validation data for {self.goal})"]

    # --- scores ---

    def records(self, predictions: Arrays, targets: Mapping[str, Stored]) -> Records:
        """One row an image, M answers in it, the best first; of images with fewer the last have the class -1. `score`
        and `class` (N, M); `hit` and `uncounted` (N, M, A), `kind` and `object` (N, M): see `Matches`; `object_class`
        (N, M); `objects` (N, K, A): how many there are to find in each range of sizes; `shown` (N, M): it reaches the
        threshold."""
        count, ranges = len(targets["boxes"]), len(RANGES)
        check_predictions(predictions, count)
        most = predictions["det_scores"].shape[1]
        columns: dict[str, np.ndarray] = {
            "score": np.zeros((count, most), np.float32),
            "class": np.full((count, most), -1, np.int32),
            "hit": np.zeros((count, most, ranges), np.uint16),
            "uncounted": np.zeros((count, most, ranges), np.uint16),
            "kind": np.full((count, most), UNCOUNTED, np.uint8),
            "object": np.full((count, most), -1, np.int32),
            "object_class": np.full((count, most), -1, np.int32),
            "objects": np.zeros((count, len(self.classes), ranges), np.int32),
        }
        for i in range(count):
            geometry = Geometry.from_array(np.asarray(targets["geometry"][i]))
            objects = _read_objects(np.asarray(targets["boxes"][i], np.float64), geometry)
            found = _read_answer({name: array[i] for name, array in predictions.items()}, geometry)
            matches, n = match(found.corners, found.classes, objects), len(found.scores)
            columns["objects"][i] = count_objects(objects, len(self.classes))
            known = matches.object >= 0
            columns["object_class"][i, :n][known] = objects.classes[matches.object[known]]
            for name, values in (("score", found.scores), ("class", found.classes), *matches._asdict().items()):
                columns[name][i, :n] = values
        return columns | {"shown": (columns["score"] >= self.shown_from) & (columns["class"] >= 0)}

    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:
        """`map` is COCO's mean average precision over overlaps from 0.5 to 0.95; `map_50` and `map_75` are at one
        overlap, `map_small` and so on of one range of sizes (the area of boxes, from 32² and from 96² px); `recall_1`
        to `recall_100` are the mean recall of so many answers of a class in an image. `f1`, `precision` and `recall`
        are of the boxes that are shown, at an overlap of 0.5."""
        weights = np.ones(len(records["score"])) if weights is None else weights
        return {name: float(values[0]) for name, values in self.resampled_scores(records, weights[None]).items()}

    def describe_scores(self, records: Records) -> list[str]:  # noqa: ARG002
        return [f"f1, precision and recall are of boxes with a score of at least {self.shown_from:.3g}"]

    def resampled_scores(self, records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights.astype(np.float64)
        scores = _average_precision.mean_scores(records, weights)
        scores["map"] = np.nan_to_num(scores["map"])
        return scores | _detection_figures.shown_scores(records, weights)

    def resampled_metric(self, records: Records, weights: np.ndarray) -> np.ndarray:
        precisions = _average_precision.class_precisions(records, weights.astype(np.float64))
        scores: np.ndarray = np.nan_to_num(_average_precision.mean(precisions))
        return scores

    def errors(self, records: Records) -> np.ndarray:
        """Objects that are missed, and boxes that are shown and wrong."""
        right = (records["shown"] & (records["kind"] == RIGHT)).sum(1)
        wrong = (records["shown"] & (records["kind"] != RIGHT) & (records["kind"] != UNCOUNTED)).sum(1)
        errors: np.ndarray = (records["objects"][:, :, 0].sum(1) - right + wrong).astype(np.float64)
        return errors

    def drift(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """The share of the squared scores of all boxes that isn't found again at the same place with the same class.
        Squares: the many unlikely boxes of an answer hardly count."""
        return np.array([1 - _agreement(*pair) for pair in _pair_answers(expected, answered)])

    def agreement(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """Whether the same objects are shown."""
        agree = []
        for before, after in _pair_answers(expected, answered):
            before, after = (one.from_score(self.shown_from) for one in (before, after))
            same = Counter(before.classes.tolist()) == Counter(after.classes.tolist())
            agree.append(same and bool((_pair_greedily(before, after) >= 0).all()))
        return np.array(agree, bool)

    def evaluate(self, records: Records) -> dict[str, Json]:
        """See `_detection_figures.evaluate`."""
        return _detection_figures.evaluate(records, self.classes, self.shown_from)

    @classmethod
    def sections(cls, figures: Mapping[str, Json]) -> list[Section]:
        return _detection_figures.sections(figures)


@dataclass(frozen=True, slots=True)
class _Found:
    """The answer for one image, best first."""

    corners: np.ndarray  # (D, 4) float64, in pixels of the image
    classes: np.ndarray  # (D,)
    scores: np.ndarray  # (D,)

    def from_score(self, least: float) -> _Found:
        kept = self.scores >= least
        return _Found(self.corners[kept], self.classes[kept], self.scores[kept])

    def first(self, count: int) -> _Found:
        return _Found(self.corners[:count], self.classes[:count], self.scores[:count])


def _read_answer(prediction: Arrays, geometry: Geometry) -> _Found:
    """Clipped to the image."""
    count = int(np.asarray(prediction["num_dets"]).ravel()[0])
    scores = prediction["det_scores"][:count]
    order = np.argsort(-scores, kind="stable")
    corners = _place(prediction["det_boxes"][:count][order], geometry)
    return _Found(corners, prediction["det_classes"][:count][order], scores[order])


def _place(corners: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Boxes (n, 4) of the model's image in pixels of the input, clipped to it."""
    height, width = geometry.size
    placed: np.ndarray = _map_corners(corners.astype(np.float64), geometry.to_input)
    return placed.clip(0, (width, height, width, height))


def _read_objects(rows: np.ndarray, geometry: Geometry) -> Objects:
    """Of the targets of one image (n, 6)."""
    corners = _map_corners(rows[:, :4], geometry.to_input)
    return Objects(corners, rows[:, 4].astype(np.int64), rows[:, 5] == CROWD, rows[:, 5] != 0)


def _map_corners(corners: np.ndarray, to_points: object) -> np.ndarray:
    """Left, top, right, bottom (n, 4) by a map of points (…, (y, x))."""
    assert callable(to_points)
    points: np.ndarray = to_points(corners.reshape(-1, 2, 2)[..., ::-1])
    return points[..., ::-1].reshape(-1, 4)


def _pair_answers(expected: Arrays, answered: Arrays) -> list[tuple[_Found, _Found]]:
    """Of each image, in the model's coordinates."""
    sides = []
    for arrays in (expected, answered):
        images = [{name: array[i] for name, array in arrays.items()} for i in range(len(arrays["num_dets"]))]
        counts = [int(np.ravel(one["num_dets"])[0]) for one in images]
        sides.append(
            [
                _Found(one["det_boxes"][:n].astype(np.float64), one["det_classes"][:n], one["det_scores"][:n])
                for one, n in zip(images, counts, strict=True)
            ]
        )
    return list(zip(*sides, strict=True))


def _pair_greedily(before: _Found, after: _Found) -> np.ndarray:
    """(D,): for each box of one answer that of the other which is the same object, or -1; best first."""
    pairs = np.full(len(before.scores), -1)
    if not len(after.scores):
        return pairs
    shares = overlap(before.corners, after.corners, np.zeros(len(after.scores), bool))
    shares[before.classes[:, None] != after.classes] = 0
    for i, row in enumerate(shares):
        best = int(row.argmax())
        if row[best] >= 0.5:
            pairs[i] = best
            shares[:, best] = 0
    return pairs


def _agreement(before: _Found, after: _Found) -> float:
    """From 0 to 1, exactly 1 for equal answers."""
    if all(np.array_equal(getattr(before, name), getattr(after, name)) for name in ("corners", "classes", "scores")):
        return 1.0
    total = max(float(np.square(one.scores, dtype=np.float64).sum()) for one in (before, after))
    if total <= 0:
        return 1.0
    pairs = _pair_greedily(before, after)
    own = np.flatnonzero(pairs >= 0)
    both = before.scores[own].astype(np.float64) * after.scores[pairs[own]]
    shares = [
        float(overlap(before.corners[[i]], after.corners[[j]], np.zeros(1, bool))[0, 0])
        for i, j in zip(own, pairs[own], strict=True)
    ]
    return min(float((both * np.array(shares)).sum()) / total, 1.0)


def _with_verdicts(answer: Answer, verdicts: Sequence[str | None]) -> Answer:
    pairs = zip(answer.values["boxes"], verdicts, strict=True)
    return replace(answer, values={**answer.values, "boxes": [{**box, "verdict": how} for box, how in pairs]})


def _count_names(names: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common()) or "nothing"
