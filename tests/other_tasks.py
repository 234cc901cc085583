"""Kinds of data and tasks that suanli doesn't have, for tests that hold for any: how they are served and predicted.

    with register() as environment:
        folder = boxes_engines(place / "cells")

`cells` finds the bright and the dark spot of a picture: boxes, with names and scores. `meter` takes two arrays and
gives a number with a unit, and a whole number.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from registered import register_files
from suanli.core.registry import load
from suanli.core.types import Preprocess
from suanli.engines.store import StoredEngine, save
from suanli.machine import device

ENGINE = """
from pathlib import Path
import numpy as np
from suanli.core.types import Engine, LoadedEngine

def load(folder, precision, placement):
    names = {"np": np}
    exec((Path(folder) / "answer.txt").read_text(), names)
    return LoadedEngine(answer=names["answer"], find_precision=lambda inputs: precision)

ENGINE = Engine(name="scripted", precisions=("float32",), packages=(), why_not=lambda d, p: None,
                build=lambda *a: None, load=load, needs="onnx")
"""

TASK = """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from suanli.core.schema import Column
from suanli.core.task import Answer, Metric, Task

@dataclass(frozen=True, kw_only=True)
class Plain(Task):
    annotation: ClassVar[str] = "none"
    metric: ClassVar[Metric] = Metric(name="score", tolerance=0.1)
    targets = model_args = {}
    def encode(self, target, geometry): return {}
    def count_targets(self, targets): return {}
    def loss(self, outputs, targets): return {}
    def guessing_loss(self): return 0.0
    def predict(self, outputs): return outputs
    def records(self, predictions, targets): return {}
    def scores(self, records, weights=None): return {}
    def errors(self, records): return np.zeros(0)
    def describe_target(self, target, geometry): return Answer(kind="text", text="", values={})
    def drift(self, expected, answered): return np.zeros(0)
"""

SPOTS = (
    TASK
    + """
from suanli.core.answers import BOX_COLUMNS

@dataclass(frozen=True, kw_only=True)
class Spots(Plain):
    name: ClassVar[str] = "spots"
    least: float = 0.5

    @property
    def outputs(self):
        return {
            "boxes": Column(shape=(3, 4), dtype="float32", role="boxes"),
            "scores": Column(shape=(3, len(self.classes)), dtype="float32", role="probabilities", names=self.classes),
            "count": Column(shape=(), dtype="int64", role="number"),
        }

    def answer(self, prediction, geometry, *, top):
        boxes = []
        for box, scores in list(zip(prediction["boxes"], prediction["scores"]))[: int(prediction["count"])]:
            if scores.max() >= self.least:
                corners = geometry.to_input(box.reshape(2, 2)[:, ::-1])[:, ::-1].ravel()
                label = self.classes[scores.argmax()]
                box = [float(side) for side in corners]
                boxes.append({"label": label, "probability": float(scores.max()), "box": box})
        boxes = boxes[:top]
        return Answer(kind="boxes", text=", ".join(box["label"] for box in boxes) or "nothing",
                      values={"boxes": boxes, "count": len(boxes)}, columns=BOX_COLUMNS)

TASK = Spots
"""
)

# Boxes around all bright and all dark pixels of a grey picture, by columns left, top, right and bottom.
FIND_SPOTS = """
def answer(inputs):
    rows = inputs["image"][..., 0].astype(int)
    boxes, scores = np.zeros((len(rows), 3, 4), np.float32), np.zeros((len(rows), 3, 2), np.float32)
    count = np.zeros(len(rows), np.int64)
    for i, row in enumerate(rows):
        for kind, spot in enumerate((row > 200, row < 50)):
            y, x = np.nonzero(spot)
            if len(x):
                boxes[i, count[i]] = x.min(), y.min(), x.max() + 1, y.max() + 1
                scores[i, count[i], kind] = 0.9 - 0.2 * kind
                count[i] += 1
    return {"boxes": boxes, "scores": scores, "count": count}
"""

# A box around all red, all green and all blue pixels, with scores 0.9, 0.7 and 0.5, as a detector gives them.
FIND_COLORS = """
def answer(inputs):
    rows, most = inputs["image"].astype(int), 5
    found = {"num_dets": np.zeros((len(rows), 1), np.int32), "det_boxes": np.zeros((len(rows), most, 4), np.float32),
             "det_scores": np.zeros((len(rows), most), np.float32),
             "det_classes": np.zeros((len(rows), most), np.int32)}
    for i, row in enumerate(rows):
        for label in range(3):
            y, x = np.nonzero((row[..., label] > 170) & (row.sum(2) - row[..., label] < 140))
            if len(x):
                n = int(found["num_dets"][i, 0])
                found["num_dets"][i] = n + 1
                found["det_boxes"][i, n] = x.min(), y.min(), x.max() + 1, y.max() + 1
                found["det_scores"][i, n] = 0.9 - 0.2 * label
                found["det_classes"][i, n] = label
    return found
"""

METER = """
import hashlib
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from suanli.core.errors import BadInput
from suanli.core.schema import Column, Geometry
from suanli.core.types import EncodedInput, Preprocess

@dataclass(frozen=True, kw_only=True)
class Meter(Preprocess):
    kind: ClassVar[str] = "meter"
    roles: ClassVar[tuple[str, ...]] = ("features", "category")
    length: int | None = 2

    @property
    def inputs(self):
        return {
            "levels": Column(shape=(self.length,), dtype="float32", role="features"),
            "place": Column(shape=(), dtype="int64", role="category", limit=3),
        }

    input_shape = (2,)
    model_args = {}

    @classmethod
    def fit(cls, raws, settings): return cls()
    def measure(self, inputs): return self
    def to_model(self, inputs): return inputs
    def preview(self, inputs): raise NotImplementedError

    @classmethod
    def find_inputs(cls, path):
        return [(f"{path.name}[{i}]", row.copy) for i, row in enumerate(np.load(path))]

    def encode(self, raw):
        if not isinstance(raw, np.ndarray) or raw.shape != (3,):
            raise BadInput("Not two levels and a place.")
        arrays = {"levels": raw[:2].astype(np.float32), "place": np.array(raw[2], np.int64)}
        return EncodedInput(arrays=arrays, digest=hashlib.blake2b(raw.tobytes(), digest_size=16).digest(),
                            geometry=Geometry.unchanged((2,)))

PREPROCESS = Meter
"""

LOSS = (
    TASK
    + """
@dataclass(frozen=True, kw_only=True)
class Loss(Plain):
    name: ClassVar[str] = "loss"
    unit: str = "dB"

    @property
    def outputs(self):
        return {"loss": Column(shape=(), dtype="float32", role="value"),
                "place": Column(shape=(), dtype="int64", role="class")}

    def answer(self, prediction, geometry, *, top):
        loss = float(prediction["loss"])
        return Answer(kind="value", text=f"{loss:.4g} {self.unit}", values={"loss": loss, "unit": self.unit},
                      columns=("loss", "unit"))

TASK = Loss
"""
)

READ_METER = """
def answer(inputs):
    levels, place = inputs["levels"], inputs["place"]
    with np.errstate(all="ignore"):
        loss = (10 * np.log10(levels[:, 0] / levels[:, 1]) + place).astype(np.float32)
    return {"loss": loss, "place": place * -(2**40)}
"""


def register() -> contextlib.AbstractContextManager[dict[str, str]]:
    """As `registered.register_files`."""
    tasks = {"spots": SPOTS, "loss": LOSS}
    return register_files({"engines": {"scripted": ENGINE}, "tasks": tasks, "preprocess": {"meter": METER}})


def spots_engines(folder: Path, *, answer: str = FIND_SPOTS, height: int = 20, width: int = 20) -> Path:
    """Engines that find spots in grey pictures, which are padded to this size."""
    preprocess = load("preprocess", "image")(height=height, width=width, channels=1, resize="pad")
    return _save(folder, preprocess, answer, {"name": "spots", "settings": {"least": 0.5}}, ["bright", "dark"])


def colors_engines(folder: Path, *, side: int = 64, tiles: bool = False) -> Path:
    """Engines of the task detection, for images that are padded to a square, or cut into such tiles."""
    preprocess = load("preprocess", "image")(
        height=side, width=side, channels=3, resize="pad", tiles=side if tiles else 0
    )
    task = {"name": "detection", "settings": {"most": 5, "threshold": 0.6}}
    return _save(folder, preprocess, FIND_COLORS, task, ["red", "green", "blue"])


def meter_engines(folder: Path, *, answer: str = READ_METER, length: int | None = 2, batches: bool = True) -> Path:
    preprocess = load("preprocess", "meter")(length=length)
    return _save(folder, preprocess, answer, {"name": "loss", "settings": {"unit": "dB"}}, [], batches=batches)


def _save(
    folder: Path,
    preprocess: Preprocess,
    answer: str,
    task: dict[str, object],
    classes: list[str],
    *,
    batches: bool = True,
) -> Path:
    with tempfile.TemporaryDirectory() as name:
        files = Path(name) / "files"
        files.mkdir()
        (files / "answer.txt").write_text(answer)
        stored = StoredEngine(
            engine="scripted", precision="float32", folder=files, threads=1, packages=(), portable=True
        )
        about = {"classes": classes, "preprocess": preprocess.to_json(), "task": task, "batches": batches}
        folder.mkdir(parents=True, exist_ok=True)
        save(folder, [stored], device=device.detect("cpu"), about=about)
    return folder
