"""Large images in overlapping tiles: cut, learned, answered and merged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import suanli
from other_tasks import colors_engines, register
from served import serving
from suanli.core.errors import UsageError
from suanli.core.registry import load
from suanli.core.schema import Geometry
from suanli.core.task import Task

COLORS = ((220, 20, 20), (20, 220, 20), (20, 20, 220))
SIDE = 128
TILED = load("preprocess", "image")(height=SIDE, width=SIDE, resize="pad", tiles=SIDE)
NAMES = ("red", "green", "blue")


def make_task(**values: Any) -> Task:
    task: Task = load("tasks", "detection").of(NAMES, values)
    return task


def paint(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Boxes of left, top, right, bottom: the first is red, the second green, the third blue."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    for (left, top, right, bottom), color in zip(boxes, COLORS, strict=False):
        pixels[top:bottom, left:right] = color
    return pixels


@given(
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    overlap=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_tiles_are_the_image(height: int, width: int, overlap: float, seed: int) -> None:
    """Together they are all of it, each in its own size, and none begins outside of a larger image."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)
    preprocess = load("preprocess", "image")(height=64, width=64, tiles=64, tile_overlap=overlap)
    encoded = preprocess.encode(pixels)
    assert encoded.arrays["image"].shape == (len(encoded.windows), 64, 64, 3)
    assert np.array_equal(preprocess.join_windows(encoded.arrays, encoded.windows)["image"], pixels)
    assert encoded.geometry.size == (height, width)
    if max(height, width) > 64:
        whole = encoded.windows[-1]
        assert max(whole.to_model(np.array([height, width]))) == pytest.approx(64, abs=1)
    for length, axis in ((height, 0), (width, 1)):
        starts = sorted({-window.shift[axis] for window in encoded.windows[: max(1, len(encoded.windows) - 1)]})
        if length > 64:
            assert starts[0] == 0
            assert starts[-1] == length - 64
            assert all(b - a <= 64 * (1 - overlap) + 1 for a, b in pairwise(starts))


@given(
    places=st.lists(
        st.tuples(st.integers(0, 480), st.integers(0, 380), st.integers(5, 24), st.integers(5, 24), st.integers(0, 2)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_answers_of_tiles_become_one(places: list[tuple[int, int, int, int, int]]) -> None:
    """A network that finds what each tile has of the objects: each object is found once, whole, also where borders of
    tiles cut it. Objects don't touch each other."""
    rows = np.array([[x, y, x + w, y + h, label, 0] for x, y, w, h, label in places], np.float32)
    apart = [i for i in range(len(rows)) if not any(_near(rows[i], rows[j]) for j in range(i))]
    rows = rows[apart]
    geometry = Geometry.unchanged((420, 520))
    task = make_task(most=20)
    target = {"boxes": rows, "geometry": geometry.to_array()}
    windows = TILED.encode(np.zeros((420, 520, 3), np.uint8)).windows
    answers = []
    for window in windows:
        cut = task.cut(target, window, (SIDE, SIDE))["boxes"]
        found = {
            "num_dets": np.array([len(cut)], np.int32),
            "det_boxes": np.zeros((20, 4), np.float32),
            "det_scores": np.zeros(20, np.float32),
            "det_classes": np.zeros(20, np.int32),
        }
        found["det_boxes"][: len(cut)], found["det_classes"][: len(cut)] = cut[:, :4], cut[:, 4]
        found["det_scores"][: len(cut)] = 0.9
        answers.append(found)
    merged = task.merge({name: np.stack([one[name] for one in answers]) for name in answers[0]}, windows, (SIDE, SIDE))
    count = int(merged["num_dets"][0])
    boxes = np.concatenate([merged["det_boxes"][:count], merged["det_classes"][:count, None]], axis=1)
    assert sorted(map(tuple, boxes.round().tolist())) == sorted(map(tuple, rows[:, :5].tolist()))


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[:2] < other[2:4] + 2).all() and (other[:2] < one[2:4] + 2).all())


def test_a_part_is_no_object_but_one_that_no_tile_has_whole_is() -> None:
    """Two tiles beside each other, without an image of the whole."""
    task = make_task(most=4)
    windows = [Geometry(size=(100, 180), scale=(1.0, 1.0), shift=(0.0, shift)) for shift in (0.0, -80.0)]

    def merge(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
        predictions: dict[str, np.ndarray] = {
            "num_dets": np.array([[len(left)], [len(right)]], np.int32),
            "det_boxes": np.zeros((2, 4, 4), np.float32),
            "det_scores": np.zeros((2, 4), np.float32),
            "det_classes": np.zeros((2, 4), np.int32),
        }
        for i, found in enumerate((left, right)):
            for j, (x, y, x2, y2, score) in enumerate(found):
                predictions["det_boxes"][i, j], predictions["det_scores"][i, j] = (x, y, x2, y2), score
        merged = task.merge(predictions, windows, (100, 100))
        count = int(merged["num_dets"][0])
        return [
            [*map(float, box), round(float(s), 2)]
            for box, s in zip(merged["det_boxes"][:count], merged["det_scores"], strict=False)
        ]

    # The left tile sees a part, up to its border at 100; the right one all of it.
    assert merge([[85, 10, 100, 30, 0.9]], [[5, 10, 40, 30, 0.8]]) == [[85, 10, 120, 30, 0.8]]
    # What looks like the whole is hardly believed: the part stays.
    assert merge([[85, 10, 100, 30, 0.9]], [[5, 10, 40, 30, 0.1]]) == [[85, 10, 100, 30, 0.9], [85, 10, 120, 30, 0.1]]
    # The border of the image cuts nothing off: both stay.
    assert merge([[0, 10, 9, 30, 0.5], [2, 12, 9, 28, 0.4]], []) == [[0, 10, 9, 30, 0.5], [2, 12, 9, 28, 0.4]]
    assert merge([], []) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with register() as environment:
        folder = colors_engines(tmp_path_factory.mktemp("models") / "colors", tiles=True)
        (folder / "environment.json").write_text(json.dumps(environment))
        yield folder


BOXES = ((3, 5, 11, 12), (290, 130, 301, 139), (48, 170, 60, 181))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.fromarray(paint(190, 310, *BOXES)).save(tmp_path / "images" / "large.png")
    Image.fromarray(paint(40, 50, (10, 12, 20, 24))).save(tmp_path / "images" / "small.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    return tmp_path / "images"


def test_small_objects_are_found_in_a_large_image(model: Path, images: Path) -> None:
    found = {p.name: p for p in suanli.predict(model, images)}
    boxes = {box["label"]: box["box"] for box in found["large.png"].values["boxes"]}
    assert found["large.png"].values["count"] == 2, "from a score of 0.6: red and green"
    for label, box in zip(NAMES[:2], BOXES, strict=False):
        assert boxes[label] == pytest.approx(box, abs=1)
    assert found["small.png"].values["boxes"][0]["box"] == pytest.approx([10, 12, 20, 24], abs=1)
    assert found["broken.png"].error


def test_a_server_merges_as_predict_does(model: Path, images: Path) -> None:
    here = suanli.predict(model, images / "large.png", threshold=0)[0].values["boxes"]
    assert len(here) == 3
    environment = json.loads((model / "environment.json").read_text())
    with serving(model, environment=environment) as server:
        content = (images / "large.png").read_bytes()
        answer = server.ask("POST", "/predict?threshold=0", content, {"Content-Type": "image/png"})
        assert answer.status == 200, answer.body
        assert [box["box"] for box in answer.json()["predictions"][0]["boxes"]] == [box["box"] for box in here]
        tile = {"name": "image", "datatype": "UINT8", "shape": [1, 64, 64, 3], "data": [128] * (64 * 64 * 3)}
        answer = server.ask("POST", "/v2/models/colors/infer", json.dumps({"inputs": [tile]}).encode())
        assert answer.status == 200, answer.body
        assert answer.json()["outputs"][0]["data"] == [0], "a tensor is one tile"


def write_shapes(root: Path) -> None:
    """Images of 150x230 px with squares of 8 px, in YOLO's layout."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(100, 140, (150, 230, 3)).astype(np.uint8)
            lines = []
            for label in (0, 1):
                left, top = random.integers(0, (222, 142)).tolist()
                pixels[top : top + 8, left : left + 8] = COLORS[label]
                lines.append(f"{label} {(left + 4) / 230} {(top + 4) / 150} {8 / 230} {8 / 150}")
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
            (root / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("train: images/train\nval: images/val\ntest: images/test\nnames: [red, green]\n")


def test_tiles_are_learned_and_whole_images_are_scored(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data")
    places = {"cache_dir": tmp_path / "cache"}
    prepared = suanli.prepare(tmp_path / "data", tiles=96, draw=tmp_path / "drawn", **places)
    assert len(prepared.splits["train"]) == 6 * (2 * 3 + 1), "with the whole of each"
    assert [len(prepared.splits[name]) for name in ("val", "test")] == [2, 2]
    assert len(list((tmp_path / "drawn").rglob("*.*"))) == 24
    targets = prepared.splits["train"].targets["boxes"]
    sides = targets.values[:, 2:4] - targets.values[:, :2]
    assert sides.max() == pytest.approx(8), "tiles have the image's own size"
    run = suanli.train(
        tmp_path / "data",
        tiles=96,
        model="detnet_n",
        epochs=0.3,
        batch_size=4,
        settings={"model_args": {"width": 8, "depths": [1, 1, 1, 1], "neck": 16}, "warmup_epochs": 0},
        speedups="none",
        out=tmp_path / "run",
        **places,
    )
    evaluation = suanli.evaluate(run, **places)
    assert evaluation.count == 2
    suanli.report(run)
    predictions = suanli.predict(run.path, tmp_path / "data" / "images" / "test", threshold=0)
    assert {p.error for p in predictions} == {None}
    assert all(0 <= value <= 230 for p in predictions for box in p.values["boxes"] for value in box["box"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocess.tiles": 100}, "multiple of 32"),
        ({"preprocess.tiles": 0}, "multiple of 32"),
        ({"preprocess.tiles": 96, "preprocess.tile_overlap": 0.9}, "share of a tile"),
        ({"preprocess.tiles": 96, "preprocess.size": 64}, "Leave one out"),
    ],
)
def test_impossible_tiles_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_shapes(tmp_path / "data")
    with pytest.raises(UsageError) as error:
        suanli.prepare(tmp_path / "data", settings=changes, cache_dir=tmp_path / "cache")
    assert message in f"{error.value.message} {error.value.fix}"


def test_classes_of_images_have_no_tiles(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i + 10 * len(name)).integers(0, 255, (70, 70, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    with pytest.raises(UsageError, match="can't put answers for parts"):
        suanli.prepare(tmp_path / "data", tiles=64, cache_dir=tmp_path / "cache")
