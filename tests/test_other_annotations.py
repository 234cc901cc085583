"""Data for tasks that suanli doesn't have yet is named, and not learned as classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import suanli
from suanli.core.errors import DataError
from suanli.core.types import Columns
from suanli.data.readers import folder, npz, table


def write_files(top: Path, *names: str) -> Path:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"")
    return top


BOXES = "Boxes and masks aren't supported yet"


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("bccd_voc.zip", r"Pascal VOC files \(BCCD/Annotations/BloodImage_00000\.xml for BCCD/JPEGImages/"),
        ("playing_cards_voc.zip", "Pascal VOC files"),
        ("labelmefacade_seg.zip", r"masks in the folder labels \(labels/"),
    ],
)
def test_real_boxes_and_masks(file: str, says: str, shared_data: Path) -> None:
    with pytest.raises(DataError, match=BOXES) as caught:
        suanli.prepare(shared_data / file)
    assert caught.match(says)
    assert "into a folder of its class" in caught.value.fix


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt"], "YOLO"),
        (["images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt", "labels/val/2.txt"], "YOLO"),
        (["train/1.jpg", "train/_annotations.coco.json", "test/2.jpg", "test/_annotations.coco.json"], "COCO"),
        (["images/1.jpg", "images/2.jpg", "annotations/instances_train.json"], "COCO"),
        (["1.jpg", "1.json", "2.jpg", "2.json"], "outlines or boxes"),
        (["train/image/1.jpg", "train/mask/1.png", "test/image/2.jpg", "test/mask/2.png"], "masks"),
        (["imgs/train/1.jpg", "imgs/val/2.jpg", "masks/train/1_mask.png", "masks/val/2_mask.png"], "masks"),
        (
            ["Annotations/1.xml", "JPEGImages/1.jpg", "JPEGImages/2.jpg", "SegmentationClass/1.png"],
            "masks in the folder SegmentationClass",
        ),
    ],
)
def test_usual_forms_of_boxes_and_masks(names: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=BOXES) as caught:
        folder.read(write_files(tmp_path / "data", *names), Columns())
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["cat/1.jpg", "dog/1.jpg", "cat/2.jpg"], None),
        (["mask/1.jpg", "no_mask/1.jpg"], None),
        (["images/1.jpg", "labels/2.jpg"], None),
        (["cat/1.jpg", "cat/1.xml", "dog/2.jpg", "dog/2.xml"], "only the class folders are learned"),
        (["ill/1.png", "ill/1_mask.png", "well/2.png", "well/2_mask.png"], "2 inputs whose names look like masks"),
        (["face/1_mask.png", "other/1.png"], None),
    ],
)
def test_class_folders_stay_class_folders(names: list[str], note: str | None, tmp_path: Path) -> None:
    source = folder.read(write_files(tmp_path / "data", *names), Columns())
    assert len(source.rows) == sum(not name.endswith("xml") for name in names)
    if note is None:
        assert source.notes == ()
    else:
        assert any(note in n for n in source.notes)


@pytest.mark.parametrize(
    ("file", "input_column", "label", "says"),
    [
        ("ames.csv", "Neighborhood", "Sale_Price", "1,032 different numbers as labels, from 12789 to 755000"),
        ("hitters.csv", "League", "Salary", "150 different numbers"),
        ("seattle_weather.csv", "date", "temp_max", "from -1.6 to 35.6"),
    ],
)
def test_real_numbers_as_targets(file: str, input_column: str, label: str, says: str, shared_data: Path) -> None:
    with pytest.raises(DataError, match="regression") as caught:
        suanli.prepare(shared_data / "tables" / file, input_column=input_column, label_column=label)
    assert says in caught.value.message
    assert "low, middle and high" in caught.value.fix


@pytest.mark.parametrize("file", ["tables/ames.csv", "tables/soybean.csv", "credit/default.csv"])
def test_real_tables_of_features(file: str, shared_data: Path) -> None:
    with pytest.raises(DataError, match="tables of features aren't supported yet"):
        suanli.prepare(shared_data / file)


@pytest.mark.parametrize(
    "labels",
    [
        [str(i % 10) for i in range(200)],
        [str(i % 100) for i in range(200)],  # names of classes, as in CIFAR-100
        [str(100 + 7 * (i % 30)) for i in range(200)],
        [f"{i % 10 / 2}" for i in range(200)],  # stars from 0.0 to 4.5
    ],
)
def test_numbers_that_are_names_stay_classes(labels: list[str], tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("text,label\n" + "".join(f"word {i},{label}\n" for i, label in enumerate(labels)))
    assert set(table.read(file, Columns()).classes) == set(labels)


def test_numbers_as_targets_in_arrays(tmp_path: Path) -> None:
    images = np.zeros((60, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(60) * 1.5)
    with pytest.raises(DataError, match="regression"):
        npz.read(tmp_path / "a.npz", Columns())
    np.savez(tmp_path / "b.npz", x=images, y=np.arange(60) ** 2)
    with pytest.raises(DataError, match="60 different numbers as labels, from 0 to 3481"):
        npz.read(tmp_path / "b.npz", Columns())
