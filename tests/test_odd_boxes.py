"""One data set with all that is odd at once goes the whole way: from the check to answers for the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

import suanli

SETTINGS = {
    "preprocess.max_side": 64,
    "model_args": {"width": 8, "depths": [1, 1, 1, 1], "neck": 16},
    "warmup_epochs": 0,
    "augment": ["mosaic", "mixup", "flip", "zoom"],
}


def write_odd_images(folder: Path) -> dict[str, list[list[float]]]:
    """The images, and the boxes of each: left, top, width, height."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def noise(*shape: int) -> np.ndarray:
        return random.integers(0, 255, shape).astype(np.uint8)

    images = {
        "grey.png": Image.fromarray(noise(90, 120)),
        "16-bit.png": Image.fromarray(noise(90, 120).astype(np.uint16) << 8),
        "palette.png": Image.fromarray(noise(90, 120, 3)).quantize(16),
        "cmyk.jpg": Image.fromarray(noise(90, 120, 3)).convert("CMYK"),
        "alpha.png": Image.fromarray(noise(90, 120, 4)),
        "tiny.png": Image.fromarray(noise(40, 40, 3)),
        "huge.jpg": Image.new("RGB", (8000, 6000), (90, 120, 30)),
        "crowded.png": Image.fromarray(noise(600, 800, 3)),
        "background.png": Image.fromarray(noise(90, 120, 3)),
    }
    for name, image in images.items():
        image.save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:300])
    boxes: dict[str, list[list[float]]] = {name: [[10, 10, 30, 20], [50, 40, 1, 1]] for name in images}
    boxes["huge.jpg"] = [[4000, 3000, 900, 700], [7999, 5999, 1, 1]]
    boxes["crowded.png"] = [[16 * (i % 50), 15 * (i // 50), 9, 8] for i in range(2000)]
    boxes["background.png"] = []
    return boxes | {"broken.jpg": [[1, 1, 9, 9]]}


def test_the_whole_way(tmp_path: Path) -> None:
    boxes = write_odd_images(tmp_path / "data" / "images")
    for i in range(8):  # enough for three splits
        pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"more{i}.png")
        boxes[f"more{i}.png"] = [[5, 5, 20, 20]]
    images = [{"id": i, "file_name": name} for i, name in enumerate(boxes)]
    annotations = [
        {"id": 100 * i + j, "image_id": i, "category_id": 7, "bbox": box}
        for i, rows in enumerate(boxes.values())
        for j, box in enumerate(rows)
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "thing"}]}
    (tmp_path / "data" / "annotations.json").write_text(json.dumps(content))
    places = {"cache_dir": tmp_path / "cache", "max_bad": 0.2}

    prepared = suanli.prepare(tmp_path / "data", settings=SETTINGS, **places)
    assert prepared.task.classes == ("thing",)
    assert [bad["name"].rpartition("/")[2] for bad in prepared.findings["bad"]] == ["broken.jpg"]
    assert sum(map(len, prepared.splits.values())) == len(boxes) - 1
    assert {"grey", "16-bit", "palette", "alpha", "cmyk"} <= prepared.findings["traits"].keys()

    run = suanli.train(
        tmp_path / "data", epochs=1, batch_size=4, settings=SETTINGS, speedups="none", out=tmp_path / "run", **places
    )
    assert np.isfinite(suanli.evaluate(run, cache_dir=tmp_path / "cache").scores["map"])
    answers = {p.name: p for p in suanli.predict(run.path, tmp_path / "data" / "images", threshold=0)}
    assert [name for name, answer in answers.items() if answer.error] == ["broken.jpg"]
    assert all(0 <= x <= 8000 for box in answers["huge.jpg"].values["boxes"] for x in box["box"])
    assert all(0 <= x <= 40 for box in answers["tiny.png"].values["boxes"] for x in box["box"])
