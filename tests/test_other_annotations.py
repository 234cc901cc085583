"""Data for tasks that suanli doesn't have yet is named, and numbers that were measured are not learned as classes."""

from __future__ import annotations

from dataclasses import replace
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


MASKS = "Masks aren't supported yet"


def test_real_masks(shared_data: Path) -> None:
    with pytest.raises(DataError, match=MASKS) as caught:
        suanli.prepare(shared_data / "labelmefacade_seg.zip")
    assert caught.match(r"masks in the folder labels \(labels/")
    assert "into a folder of its class" in caught.value.fix


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train/image/1.jpg", "train/mask/1.png", "test/image/2.jpg", "test/mask/2.png"], "masks"),
        (["imgs/train/1.jpg", "imgs/val/2.jpg", "masks/train/1_mask.png", "masks/val/2_mask.png"], "masks"),
        (["Annotations/1.xml", "JPEGImages/1.jpg", "JPEGImages/2.jpg", "SegmentationClass/1.png"], "SegmentationClass"),
    ],
)
def test_usual_forms_of_masks(names: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=MASKS) as caught:
        folder.read(write_files(tmp_path / "data", *names), Columns())
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt"],
            r"train/labels/1\.txt",
        ),
        (["images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt", "labels/val/2.txt"], r"labels/train/1\.txt"),
        (["train/1.jpg", "train/_annotations.coco.json", "test/2.jpg", "test/_annotations.coco.json"], "COCO"),
        (["images/1.jpg", "images/2.jpg", "annotations/instances_train.json"], "COCO"),
        (["1.jpg", "1.json", "2.jpg", "2.json"], r"1\.json"),
    ],
)
def test_files_beside_images_that_no_format_knows(names: list[str], says: str, tmp_path: Path) -> None:
    """They look like annotations by their names, and are empty."""
    with pytest.raises(DataError, match=says) as caught:
        folder.read(write_files(tmp_path / "data", *names), Columns())
    assert "Known are COCO, CSV, CVAT" in caught.value.fix


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["cat/1.jpg", "dog/1.jpg", "cat/2.jpg"], None),
        (["mask/1.jpg", "no_mask/1.jpg"], None),
        (["images/1.jpg", "labels/2.jpg"], None),
        (["cat/1.jpg", "cat/1.xml", "dog/2.jpg", "dog/2.xml"], "only the class folders are learned"),
        (["ill/1.png", "ill/1_mask.png", "well/2.png", "well/2_mask.png"], "2 images whose names look like masks"),
        (["face/1_mask.png", "other/1.png"], None),
    ],
)
def test_class_folders_stay_class_folders(names: list[str], note: str | None, tmp_path: Path) -> None:
    source = folder.read(write_files(tmp_path / "data", *names), Columns())
    assert len(source.examples) == sum(not name.endswith("xml") for name in names)
    if note is None:
        assert source.notes == ()
    else:
        assert any(note in n for n in source.notes)


@pytest.mark.parametrize(
    ("file", "input_column", "label", "says", "count"),
    [
        ("hitters.csv", "League", "Salary", "150 different numbers as labels, from 67.5 to 2460", 263),
        ("seattle_weather.csv", "date", "temp_max", "from -1.6 to 35.6", 1461),
    ],
)
def test_real_numbers_with_fractions_are_values(
    file: str, input_column: str, label: str, says: str, count: int, shared_data: Path
) -> None:
    source = table.read(shared_data / "tables" / file, Columns(input=input_column, label=label))
    assert (source.annotation, source.classes, len(source.examples)) == ("value", (), count)
    assert all(type(example.target) is float for example in source.examples)
    assert says in source.notes[0]
    assert "--set task=classification" in source.notes[0]


def test_real_whole_numbers_may_be_either(shared_data: Path) -> None:
    ames, columns = shared_data / "tables" / "ames.csv", Columns(input="Neighborhood", label="Sale_Price")
    with pytest.raises(DataError, match="1,032 different numbers as labels, from 12789 to 755000; these are not") as e:
        table.read(ames, columns)
    assert "--set task=regression" in e.value.fix
    assert "low, middle and high" in e.value.fix
    source = table.read(ames, replace(columns, annotation="value"))
    assert source.annotation == "value"
    assert source.notes == ()


def test_the_user_decides(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"word {i},{i % 30 / 2}\n" for i in range(200)))
    for wanted, annotation, classes in ((None, "value", 0), ("value", "value", 0), ("class", "class", 30)):
        source = table.read(tmp_path / "t.csv", Columns(annotation=wanted))
        assert (source.annotation, len(source.classes)) == (annotation, classes)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_rows_without_a_number_are_skipped_with_a_remark(name: str, tmp_path: Path) -> None:
    cells = ["1.5", "", "n/a", "-2", "1e3", "NaN"]
    lines = {
        "csv": ["text,price", *(f"a word,{cell}" for cell in cells)],
        "tsv": ["text\tprice", *(f"a word\t{cell}" for cell in cells)],
        "jsonl": [f'{{"text": "a word", "price": {cell}}}' for cell in ("1.5", "null", '"n/a"', "-2", "1e3", "NaN")],
    }
    (tmp_path / name).write_text("\n".join(lines[name.split(".")[1]]) + "\n")
    source = table.read(tmp_path / name, Columns(annotation="value"))
    assert [example.target for example in source.examples] == [1.5, -2.0, 1000.0]
    assert any("3 lines" in note and "skipped" in note for note in source.notes)


@pytest.mark.parametrize("cell", ['"1,234.5"', "1e400", "inf", "12 px", "1_000", "٣", "0x1f", "true"])
def test_cells_that_are_no_numbers_are_named(cell: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"text,label\na,1.5\nb,{cell}\nc,2.5\n")
    with pytest.raises(DataError, match="must have numbers, and has") as caught:
        table.read(tmp_path / "t.csv", Columns(annotation="value"))
    assert f"{cell.strip(chr(34))!r} in line 3" in caught.value.message


@pytest.mark.parametrize("file", ["tables/ames.csv", "credit/default.csv"])
def test_real_tables_of_features_need_a_target(file: str, shared_data: Path) -> None:
    with pytest.raises(DataError, match="no column of it is named like a target"):
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
    source = npz.read(tmp_path / "a.npz", Columns())
    assert source.annotation == "value"
    assert [example.target for example in source.examples] == (np.arange(60) * 1.5).tolist()
    assert "--set task=classification" in source.notes[-1]
    assert len(npz.read(tmp_path / "a.npz", Columns(annotation="class")).classes) == 60
    np.savez(tmp_path / "b.npz", x=images, y=np.arange(60) ** 2)
    with pytest.raises(DataError, match="60 different numbers as labels, from 0 to 3481"):
        npz.read(tmp_path / "b.npz", Columns())
    source = npz.read(tmp_path / "b.npz", Columns(annotation="value"))
    assert [example.target for example in source.examples] == (np.arange(60) ** 2).tolist()


def test_arrays_that_have_no_numbers_or_several(tmp_path: Path) -> None:
    images = np.zeros((4, 4, 4), np.uint8)
    for labels, says in (
        (np.eye(4, dtype=np.int64), "one label per row"),
        (np.array(["1.5", "two", "3", "4"]), "'two' at position 1"),
    ):
        np.savez(tmp_path / "c.npz", x=images, y=labels)
        with pytest.raises(DataError, match=says):
            npz.read(tmp_path / "c.npz", Columns(annotation="value"))


def test_a_number_that_is_not_finite_is_a_bad_example(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    targets = random.normal(size=200)
    targets[7] = np.nan
    np.savez(tmp_path / "d.npz", x=random.integers(0, 255, (200, 4, 4), np.uint8), y=targets)
    findings = suanli.prepare(tmp_path / "d.npz").findings
    assert [bad["name"] for bad in findings["bad"]] == ["x[7]"]
    assert "not a finite number" in findings["bad"][0]["reason"]
    targets[:50] = np.inf
    np.savez(tmp_path / "d.npz", x=random.integers(0, 255, (200, 4, 4), np.uint8), y=targets)
    with pytest.raises(DataError, match=r"50 of 200 examples can't be decoded(.|\n)*x\[0\]: Its target inf"):
        suanli.prepare(tmp_path / "d.npz")
