"""A sample of each task, for the tests that hold for every one. A new task adds its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from suanli.core import registry
from suanli.core.boxes import Box, Boxes
from suanli.core.schema import Arrays, Geometry, Ragged, Stored
from suanli.core.task import Task

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
HERE = Geometry.unchanged((32, 32))
Random = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`answer` gives what `predict` would, right or nearly right where `wrong` (N,) is False; `worsen` what another
    model would, whose primary metric is worse by this much (a share of the score where the tolerance is one)."""

    classes: Sequence[str] = ()
    draw: Callable[[Random, int], list[Any]]  # raw targets
    answer: Callable[[Mapping[str, Stored], np.ndarray], dict[str, np.ndarray]]
    worsen: Callable[[Arrays, Mapping[str, Stored], float], dict[str, np.ndarray]]
    raw: Callable[[int], Any]  # what a network might return for so many examples
    write: Callable[[Path], Path]  # data for a training of seconds, into an empty folder
    settings: Mapping[str, Any] = field(default_factory=dict)  # of that training
    reaches: float = 0.0  # the primary metric that it must reach
    geometry: Geometry = HERE  # of the inputs
    many: int = 3000  # examples that tell whether a loss is within the tolerance


def encode(task: Task, targets: Sequence[Any]) -> dict[str, Stored]:
    """The columns of these raw targets, as the cache holds them."""
    encoded = [task.encode(target, SAMPLES[task.name].geometry) for target in targets]
    columns: dict[str, Stored] = {}
    for name, column in task.targets.items():
        arrays, empty = [one[name] for one in encoded], np.zeros((0, *column.fixed_shape), column.dtype)
        columns[name] = Ragged.of(arrays, like=empty) if column.is_ragged else np.stack(arrays) if arrays else empty
    return columns


def make_task(name: str) -> Task:
    """The task, fitted to a sample of targets."""
    sample, task = SAMPLES[name], registry.load("tasks", name).of(SAMPLES[name].classes, {})
    fitted: Task = task.fit(encode(task, sample.draw(np.random.default_rng(0), 500)))
    return fitted


def _write_pictures(folder: Path, paint: Callable[[Random, np.ndarray], Any], count: int, size: int) -> list[Any]:
    """Noise that `paint` has changed, and what it returned for each."""
    random = np.random.default_rng(0)
    targets = []
    for i in range(count):
        pixels = random.integers(90, 160, (size, size, 3))
        targets.append(paint(random, pixels))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return targets


def _write_table(folder: Path, targets: Sequence[Any]) -> Path:
    lines = [f"{i:03d}.png,{target}\n" for i, target in enumerate(targets)]
    (folder / "table.csv").write_text("".join(["path,label\n", *lines]))
    return folder / "table.csv"


# --- classification -------------------------------------------------------------------------


def _name_classes(random: Random, count: int) -> list[str]:
    return random.permutation([CLASSES[i % len(CLASSES)] for i in range(count)]).tolist()


def _classify(targets: Mapping[str, Stored], wrong: np.ndarray) -> dict[str, np.ndarray]:
    place = (np.asarray(targets["class"]) + wrong) % len(CLASSES)
    return {"probabilities": 0.9 * np.eye(len(CLASSES), dtype=np.float32)[place] + np.float32(0.1 / len(CLASSES))}


def _misclassify(answers: Arrays, targets: Mapping[str, Stored], amount: float) -> dict[str, np.ndarray]:  # noqa: ARG001
    probabilities = answers["probabilities"].copy()
    spoiled = np.random.default_rng(2).random(len(probabilities)) < amount
    probabilities[spoiled] = np.roll(probabilities[spoiled], 1, axis=1)
    return {"probabilities": probabilities}


def _write_classes(folder: Path) -> Path:
    def paint(random: Random, pixels: np.ndarray) -> str:
        label = int(random.integers(3))
        pixels += 40 * (label - 1)
        return CLASSES[label]

    return _write_table(folder, _write_pictures(folder, paint, 150, 12))


# --- several labels -------------------------------------------------------------------------


def _draw_labels(random: Random, count: int) -> list[tuple[str, ...]]:
    return [tuple(name for name in CLASSES if random.random() < 0.4) for _ in range(count)]


def _label(targets: Mapping[str, Stored], wrong: np.ndarray) -> dict[str, np.ndarray]:
    labels = np.asarray(targets["labels"]).astype(bool) ^ wrong[:, None]
    noise = np.random.default_rng(len(wrong)).random(labels.shape)
    return {"probabilities": (np.where(labels, 0.6, 0.1) + 0.3 * noise).astype(np.float32)}


def _mislabel(answers: Arrays, targets: Mapping[str, Stored], amount: float) -> dict[str, np.ndarray]:  # noqa: ARG001
    probabilities = answers["probabilities"].copy()
    spoiled = np.random.default_rng(2).random(len(probabilities)) < amount
    probabilities[spoiled] = 1 - probabilities[spoiled]
    return {"probabilities": probabilities}


def _write_labels(folder: Path) -> Path:
    def paint(random: Random, pixels: np.ndarray) -> str:
        flags = random.random(3) < (0.6, 0.4, 0.3)
        pixels += np.where(flags, 50, -50)
        return "|".join(name for name, flag in zip(CLASSES, flags, strict=False) if flag) or "none"

    return _write_table(folder, _write_pictures(folder, paint, 200, 12))


# --- regression -----------------------------------------------------------------------------


def _draw_values(random: Random, count: int) -> list[float]:
    return random.normal(50, 10, count).tolist()


def _estimate(targets: Mapping[str, Stored], wrong: np.ndarray) -> dict[str, np.ndarray]:
    target = np.asarray(targets["value"])
    noise = np.random.default_rng(len(wrong) + int(wrong.sum())).normal(size=len(wrong))
    return {"value": (target + noise * np.where(wrong, 5, 1)).astype(np.float32)}


def _misestimate(answers: Arrays, targets: Mapping[str, Stored], amount: float) -> dict[str, np.ndarray]:
    error = answers["value"] - np.asarray(targets["value"])
    return {"value": answers["value"] + np.float32(amount) * error}


def _write_values(folder: Path) -> Path:
    def paint(random: Random, pixels: np.ndarray) -> float:
        value = float(random.uniform(-80, 80))
        pixels += int(value)
        return value

    return _write_table(folder, _write_pictures(folder, paint, 150, 12))


# --- counts, of CONTRIBUTING.md ------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}


def _paint_boxes(random: Random, pixels: np.ndarray) -> list[tuple[Any, ...]]:
    boxes: list[tuple[Any, ...]] = []
    for _ in range(random.integers(1, 4)):
        width, height = random.integers(8, 20, 2).tolist()
        left, top = random.integers(0, len(pixels) - width), random.integers(0, len(pixels) - height)
        box = (int(left), int(top), int(left + width), int(top + height))
        if all(box[0] > b[2] or b[0] > box[2] or box[1] > b[3] or b[1] > box[3] for b in boxes):
            label = str(random.choice(list(COLOURS)))
            pixels[box[1] : box[3], box[0] : box[2]] = COLOURS[label]
            boxes.append((*box, label))
    return boxes


def _draw_boxes(random: Random, count: int) -> list[Any]:
    painted = [_paint_boxes(random, np.zeros((48, 48, 3))) for _ in range(count)]
    return [Boxes(tuple(Box(*box) for box in boxes)) for boxes in painted]


def _count(targets: Mapping[str, Stored], wrong: np.ndarray) -> dict[str, np.ndarray]:
    truth = np.asarray(targets["count"])
    noise = np.random.default_rng(len(wrong)).random(truth.shape)
    return {"count": (truth + np.where(wrong, 3, 0.5)[:, None] * noise).astype(np.float32)}


def _miscount(answers: Arrays, targets: Mapping[str, Stored], amount: float) -> dict[str, np.ndarray]:
    error = answers["count"] - np.asarray(targets["count"])
    return {"count": answers["count"] + np.float32(amount) * error}


def _write_boxes(folder: Path) -> Path:
    lines = [
        {"file": f"{i:03d}.png", "boxes": [{"label": label, "box": box} for *box, label in boxes]}
        for i, boxes in enumerate(_write_pictures(folder, _paint_boxes, 300, 48))
    ]
    (folder / "boxes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


# --- detection ------------------------------------------------------------------------------

PHOTO = Geometry(size=(480, 640), scale=(0.5, 0.5), shift=(40.0, 0.0))  # in a square of 320 px


def _draw_objects(random: Random, count: int) -> list[Any]:
    """One to five in a grid of six, so that none overlaps another; small, medium and large ones."""
    targets = []
    for _ in range(count):
        boxes = []
        for place in random.permutation(6)[: random.integers(1, 6)].tolist():
            side = float(random.choice([20, 60, 150]) * random.uniform(0.9, 1.1))
            left, top = 10 + 210 * (place % 3), 10 + 230 * (place // 3)
            boxes.append(Box(left, top, left + side, top + 0.8 * side, str(random.choice(CLASSES[:3]))))
        targets.append(Boxes(tuple(boxes), PHOTO.size))
    return targets


def _find_objects(targets: Mapping[str, Stored], wrong: np.ndarray) -> dict[str, np.ndarray]:
    """Nearly right boxes; of wrong images with another class, and all with one on nothing."""
    random, most = np.random.default_rng(len(wrong)), 100
    answers = {
        "num_dets": np.zeros((len(wrong), 1), np.int32),
        "det_boxes": np.zeros((len(wrong), most, 4), np.float32),
        "det_scores": np.zeros((len(wrong), most), np.float32),
        "det_classes": np.zeros((len(wrong), most), np.int32),
    }
    for i, is_wrong in enumerate(wrong):
        rows = np.asarray(targets["boxes"][i])
        n = len(rows) + 1
        side = rows[:, 2:3] - rows[:, :1]
        answers["num_dets"][i] = n
        answers["det_boxes"][i, : n - 1] = rows[:, :4] + random.normal(0, 0.03, (n - 1, 4)) * side
        answers["det_boxes"][i, n - 1] = [0, 300, 30, 318]
        answers["det_scores"][i, : n - 1] = np.sort(random.uniform(0.5, 1, n - 1))[::-1]
        answers["det_scores"][i, n - 1] = random.uniform(0.01, 0.2)
        answers["det_classes"][i, : n - 1] = (rows[:, 4] + is_wrong) % 3
    return answers


def _lose_objects(answers: Arrays, targets: Mapping[str, Stored], amount: float) -> dict[str, np.ndarray]:  # noqa: ARG001
    """Objects that aren't found cost their share of the recall, and with it of the precision."""
    classes = answers["det_classes"].copy()
    classes[np.random.default_rng(2).random(classes.shape) < amount / 0.9] += 1
    return {**answers, "det_classes": classes % 3}


def _return_boxes(count: int) -> tuple[torch.Tensor, ...]:
    """Boxes, logits and points of the cells of PHOTO's square at strides 16 and 32."""
    points = torch.tensor(
        [(x + s / 2, y + s / 2, s) for s in (16, 32) for y in range(0, 320, s) for x in range(0, 320, s)]
    ).expand(count, -1, -1)
    sides = points[..., 2:] * torch.rand(count, points.shape[1], 4) * 2
    boxes = torch.cat([points[..., :2] - sides[..., :2], points[..., :2] + sides[..., 2:]], 2)
    return boxes, torch.randn(count, points.shape[1], 3) - 3, points


def _write_objects(folder: Path) -> Path:
    rows = [
        f"{i:03d}.png,{','.join(map(str, box))}\n"
        for i, boxes in enumerate(_write_pictures(folder, _paint_boxes, 150, 64))
        for box in boxes
    ]
    (folder / "boxes.csv").write_text("".join(["image,xmin,ymin,xmax,ymax,label\n", *rows]))
    return folder


SAMPLES = {
    "detection": Sample(
        classes=CLASSES[:3],
        draw=_draw_objects,
        answer=_find_objects,
        worsen=_lose_objects,
        raw=_return_boxes,
        write=_write_objects,
        settings={
            "model": "detnet_n",
            "model_args": {"width": 16, "depths": [1, 1, 1, 1], "neck": 32},
            "epochs": 12,
            "warmup_epochs": 1,
            "augment": [],
            "ema_decay": 0.98,
            "lr": 1e-2,
            "validate_every": 12,
        },
        reaches=0.25,
        geometry=PHOTO,
        many=200,
    ),
    "classification": Sample(
        classes=CLASSES,
        draw=_name_classes,
        answer=_classify,
        worsen=_misclassify,
        raw=lambda count: torch.randn(count, len(CLASSES)),
        write=_write_classes,
        settings={"epochs": 4, "batch_size": 30},
        reaches=0.8,
    ),
    "multilabel": Sample(
        classes=CLASSES,
        draw=_draw_labels,
        answer=_label,
        worsen=_mislabel,
        raw=lambda count: torch.randn(count, len(CLASSES)),
        write=_write_labels,
        settings={"epochs": 4, "batch_size": 30},
        reaches=0.8,
    ),
    "regression": Sample(
        draw=_draw_values,
        answer=_estimate,
        worsen=_misestimate,
        raw=lambda count: torch.randn(count, 1),
        write=_write_values,
        settings={"epochs": 10, "batch_size": 30},
        reaches=20,
    ),
    "counts": Sample(
        classes=("blue", "green", "red"),
        draw=_draw_boxes,
        answer=_count,
        worsen=_miscount,
        raw=lambda count: torch.randn(count, 3),
        write=_write_boxes,
        settings={"task": "counts", "model": "speednet", "epochs": 6, "batch_size": 32, "lr": 0.003},
        reaches=0.5,
    ),
}
