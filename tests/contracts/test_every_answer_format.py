"""What holds for every file of engines/answer_formats/: the same boxes come back. A new one needs a sample here."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from suanli.core import registry
from suanli.core.answers import BOX_COLUMNS, Answer
from suanli.core.errors import BadInput, UsageError
from suanli.data.preprocess.image import ImagePreprocess
from suanli.data.source import find_source
from suanli.engines.answer_format import Answered, AnswerFormat, write_files
from suanli.engines.predictor import Prediction

FORMATS: dict[str, AnswerFormat] = registry.load_all("answer_formats")
CLASSES = ("cat", 'a "dog": big\\', "鱼 🐟")
WIDTH, HEIGHT = 40, 20
Boxes = list[tuple[str, list[float], float]]
BOXES: dict[str, Boxes] = {
    "a.png": [("cat", [2, 3, 12, 13], 0.9), (CLASSES[1], [20, 4, 36.5, 16.25], 0.5)],
    "b, c/d.png": [(CLASSES[2], [0, 0, 40, 20], 0.25)],
    "empty.png": [],
}
EMPTY = Answer(kind="boxes", text="", values={"count": None, "boxes": []}, columns=BOX_COLUMNS)


def make_answers() -> list[Answered]:
    """Of the images above, and one that can't be read."""
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(stream, "png")
    answers: list[Answered] = [(Prediction(name="bad.png", answer=None, error="cut", empty=EMPTY), BadInput("cut"))]
    for name, boxes in BOXES.items():
        entries = [{"label": label, "box": box, "probability": share} for label, box, share in boxes]
        answer = Answer(kind="boxes", text="", values={"count": len(boxes), "boxes": entries}, columns=BOX_COLUMNS)
        answers.append((Prediction(name=name, answer=answer, empty=EMPTY), stream.getvalue()))
    return answers


def read_coco(text: str) -> dict[str, Boxes]:
    found = defaultdict(list)
    for one in json.loads(text):
        left, top, width, height = one["bbox"]
        label = CLASSES[one["category_id"] - 1]
        found[one["file_name"]].append((label, [left, top, left + width, top + height], one["score"]))
        assert one["image_id"] == 2 + list(BOXES).index(one["file_name"])
    return found


def read_csv(text: str) -> dict[str, Boxes]:
    found = defaultdict(list)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["name"] for row in rows} == {"bad.png", *BOXES}
    assert [row["error"] for row in rows if row["name"] == "bad.png"] == ["cut"]
    for row in rows:
        if row["label"]:
            box = [float(row[side]) for side in BOX_COLUMNS[2:]]
            found[row["name"]].append((row["label"], box, float(row["probability"])))
    return found


def read_jsonl(text: str) -> dict[str, Boxes]:
    values = [json.loads(line) for line in text.splitlines()]
    assert [one["error"] for one in values] == ["cut", None, None, None]
    return {one["name"]: [(box["label"], box["box"], box["probability"]) for box in one["boxes"]] for one in values}


def read_yolo(folder: Path) -> dict[str, Boxes]:
    found = {}
    for name in BOXES:
        file = folder / "labels" / Path(name.replace(", ", "-")).with_suffix(".txt")
        found[name] = []
        for line in file.read_text().splitlines():
            number, x, y, width, height, share = map(float, line.split())
            sides = (
                (x - width / 2) * WIDTH,
                (y - height / 2) * HEIGHT,
                (x + width / 2) * WIDTH,
                (y + height / 2) * HEIGHT,
            )
            found[name].append((CLASSES[int(number)], [*sides], share))
    (folder / "images").mkdir()
    for name in BOXES:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / Path(name).name)
    assert find_source(folder, data_dir=folder).classes == CLASSES
    assert {file.name for file in folder.rglob("*.txt")} == {"a.txt", "d.txt", "empty.txt"}
    return found


def look_at_images(folder: Path) -> dict[str, Boxes]:
    """The boxes whose lines are where they should be."""
    for name, boxes in BOXES.items():
        with Image.open(folder / name.replace(", ", "-")) as image:
            pixels = np.asarray(image).astype(int)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        assert (pixels != 90).any() == bool(boxes)
        for _, (_, _, right, bottom), _ in boxes:  # its name may cover the other corner
            assert (pixels[round(bottom) - 1, round(right) - 1] != 90).any()
    return BOXES


READERS: dict[str, Callable[..., dict[str, Boxes]]] = {
    "coco": read_coco,
    "csv": read_csv,
    "images": look_at_images,
    "jsonl": read_jsonl,
    "yolo": read_yolo,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_boxes_come_back(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    assert form.name == name
    assert (form.lines is None) != (form.file is None)
    answers = make_answers()
    if form.lines is not None:
        found = READERS[name]("\n".join(form.lines([prediction for prediction, _ in answers], CLASSES, None)))
    else:
        passed = list(write_files(answers, form, tmp_path, ImagePreprocess, CLASSES))
        assert passed == answers
        found = READERS[name](tmp_path)
    for image, boxes in BOXES.items():
        got = found.get(image, [])
        assert [(label, share) for label, _, share in got] == [(label, share) for label, _, share in boxes]
        for (_, sides, _), (_, wanted, _) in zip(got, boxes, strict=True):
            assert sides == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_to_write(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    failed: Sequence[Answered] = make_answers()[:1]
    if form.lines is not None:
        for predictions in ([], [one for one, _ in failed]):
            text = "\n".join(form.lines(predictions, CLASSES, None))
            assert "cat" not in text
    else:
        list(write_files(failed, form, tmp_path, ImagePreprocess, CLASSES))
        assert not list(tmp_path.rglob("bad*"))


@pytest.mark.parametrize("name", FORMATS)
def test_answers_that_it_has_no_room_for_are_refused(name: str) -> None:
    form = FORMATS[name]
    form.check("boxes")
    if form.kinds:
        with pytest.raises(UsageError, match=f"{name} is for answers of the kind boxes; these are of the kind classes"):
            form.check("classes")
