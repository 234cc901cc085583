"""The images and boxes of a run of suanli, for programs that know nothing of it, and the scores of their answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from suanli.core.compare import changes, intervals
from suanli.core.console import hide_progress
from suanli.core.run import Run
from suanli.core.schema import Geometry
from suanli.core.scored_examples import ScoredExamples
from suanli.core.task import Records
from suanli.core.types import AnyPath, Split
from suanli.data.cache import PreparedData
from suanli.models.model_folder import SavedModel, load_model
from suanli.training.prepare import DataOptions, resolve_run


@dataclass(frozen=True, kw_only=True)
class BoxSet:
    """What a run learned from: its own splits."""

    run: Run
    saved: SavedModel
    options: DataOptions
    prepared: PreparedData

    @classmethod
    def of(cls, path: Path, cache: AnyPath) -> BoxSet:
        run = Run.open(path)
        saved = load_model(run.model_path)
        options = DataOptions.of_run(run, cache_dir=cache)
        with hide_progress():
            prepared = resolve_run(run, options, saved.recipe, verb="evaluate", announce=False)
        return cls(run=run, saved=saved, options=options, prepared=prepared)

    def write_yolo(self, folder: Path) -> Path:
        """Writes the files of all images as they are, and their boxes as text; returns data.yaml. Files of a split,
        sorted by name, are in its order."""
        raw = {example.name: example.read for example in self.options.find_source("boxes").examples}
        for name, split in self.prepared.splits.items():
            for part in ("images", "labels"):
                (folder / part / name).mkdir(parents=True)
            for i, example in enumerate(split.names):
                place = folder / "images" / name / f"{i:05d}{Path(example).suffix.lower()}"
                content = raw[example]()
                assert isinstance(content, bytes)
                place.write_bytes(content)
                labels = folder / "labels" / name / f"{i:05d}.txt"
                labels.write_text("".join(f"{line}\n" for line in yolo_lines(split, i)))
        description = {
            "path": str(folder),
            "train": "images/train",
            "val": "images/val",
            "nc": len(self.saved.task.classes),
            "names": list(self.saved.task.classes),
        }
        (folder / "data.yaml").write_text(yaml.safe_dump(description))
        return folder / "data.yaml"

    def score(self, answers: Records) -> ScoredExamples:
        """Of boxes in px of the test images, as `detect_libreyolo.py` writes them: by the task itself, with as many
        boxes for an image as suanli gives."""
        split, task = self.prepared.splits["test"], self.saved.task
        most = task.outputs["det_scores"].shape[0]
        assert most is not None
        count = len(split)
        predictions = {
            "num_dets": np.zeros((count, 1), np.int32),
            "det_boxes": np.zeros((count, most, 4), np.float32),
            "det_scores": np.zeros((count, most), np.float32),
            "det_classes": np.zeros((count, most), np.int32),
        }
        ends = np.cumsum(answers["count"])
        for i, (start, end) in enumerate(zip(ends - answers["count"], ends, strict=True)):
            best = start + np.argsort(-answers["conf"][start:end], kind="stable")[:most]
            points = answers["xyxy"][best].astype(np.float64).reshape(-1, 2, 2)[..., ::-1]
            points = geometry_of(split, i).to_model(points)[..., ::-1]
            predictions["num_dets"][i] = len(best)
            predictions["det_boxes"][i, : len(best)] = points.reshape(-1, 4)
            predictions["det_scores"][i, : len(best)] = answers["conf"][best]
            predictions["det_classes"][i, : len(best)] = answers["cls"][best]
        records = task.records(predictions, split.targets)
        return ScoredExamples.of(records, split, np.arange(count), self.saved.preprocess, task.classes)

    def compare(self, other: ScoredExamples) -> dict[str, dict[str, tuple[float, float, float]]]:
        """mAP and mAP@0.5 on the test split, each with the ends of its 95 % interval: of the run, of the other, and how
        much the run is above it on the same images."""
        task = self.saved.task
        own = ScoredExamples.read(self.run.scored_examples("test"))
        assert own is not None
        places = {key: i for i, key in enumerate(other.keys.tolist())}
        other = other.take(np.array([places[key] for key in own.keys.tolist()]))
        sides = {"suanli": own.records, "other": other.records}
        found = {}
        for side, records in sides.items():
            scores, ends = task.scores(records), intervals(task, records)
            found[side] = {name: (scores[name], *ends[name]) for name in ("map", "map_50")}
        gains = changes(task, other.records, own.records)
        return found | {"gain": {name: gains[name] for name in ("map", "map_50")}}


def geometry_of(split: Split, i: int) -> Geometry:
    return Geometry.from_array(np.asarray(split.targets["geometry"][i]))


def yolo_lines(split: Split, i: int) -> list[str]:
    """Class, centre and size as shares of the image, of the boxes that count."""
    geometry = geometry_of(split, i)
    rows = np.asarray(split.targets["boxes"][i], np.float64)
    rows = rows[rows[:, 5] == 0]
    corners = geometry.to_input(rows[:, :4].reshape(-1, 2, 2)[..., ::-1])[..., ::-1].reshape(-1, 4)
    height, width = geometry.size
    corners = corners.clip(0, (width, height, width, height)) / (width, height, width, height)
    centres, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    numbers = np.concatenate([centres, sizes], axis=1)
    return [
        f"{int(label)} {' '.join(f'{number:.7f}' for number in row)}"
        for label, row in zip(rows[:, 4], numbers, strict=True)
    ]
