"""Faults and variants of annotation files: each is read whole, or refused with file and line."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from suanli.core.boxes import place
from suanli.core.errors import DataError, UsageError
from suanli.core.schema import Geometry
from suanli.core.types import Columns, Source
from suanli.data.formats._rle import enclose_mask
from suanli.data.readers import annotation_file, folder
from suanli.data.source import find_source

WIDTH, HEIGHT = 40, 20


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(stream, "png")
    return stream.getvalue()


def read(top: Path, files: Mapping[str, object]) -> Source:
    """The source of a folder with these files; an image has None, and what is neither text nor bytes becomes JSON."""
    for name, content in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = picture()
        elif not isinstance(content, str | bytes):
            content = json.dumps(content)
        (top / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder.read(top, Columns())


def boxes(source: Source, name: str = "1.png") -> list[tuple[object, ...]]:
    """Of one image, in its pixels."""
    (row,) = (row for row in source.examples if row.name.endswith(name))
    corners = place(row.target, Geometry.unchanged((HEIGHT, WIDTH))).corners.round(4)
    return [(*own, box.label) for own, box in zip(corners.tolist(), row.target.boxes, strict=True)]


def splits(source: Source) -> dict[str, str | None]:
    return {row.name: row.split for row in source.examples}


# --- COCO -----------------------------------------------------------------------------------


def coco(annotations: list[object], categories: object = None, images: object = None) -> dict[str, object]:
    return {
        "images": images or [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, **one} for one in annotations],
        "categories": categories or [{"id": 1, "name": "cat"}],
    }


def test_outlines_and_masks_are_boxes_around_them(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), int)
    mask[3:7, 5:9] = 1
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=-1, append=-1))).tolist()
    source = read(
        tmp_path,
        {
            "1.png": None,
            "labels.json": coco(
                [
                    {"segmentation": [[1, 2, 9, 2, 9, 8]]},
                    {"segmentation": [[1, 2, 9, 2, 9, 8], [], [20, 1, 30, 1, 30, 19]]},
                    {"segmentation": {"size": [HEIGHT, WIDTH], "counts": runs}, "iscrowd": 1},
                    {"segmentation": [[0, 0, 1, 1, 1, 0]], "bbox": [2, 3, 4, 5]},
                    {"segmentation": [], "bbox": [2, 3, 4, 5]},
                ]
            ),
        },
    )
    assert [box[:4] for box in boxes(source)] == [
        (1, 2, 9, 8),
        (1, 1, 30, 19),
        (5, 3, 9, 7),
        (2, 3, 6, 8),
        (2, 3, 6, 8),
    ]
    assert [box.crowd for box in source.examples[0].target.boxes] == [False, False, True, False, False]
    assert "3 outlines or masks without a box, read as the boxes around them" in source.notes


def test_packed_masks_are_those_of_coco() -> None:
    tools = pytest.importorskip("pycocotools.mask", reason="pip install pycocotools==2.0.11")
    random = np.random.default_rng(0)
    for _ in range(50):
        mask = (random.random(random.integers(1, 40, 2)) < random.choice([0.02, 0.3, 0.9])).astype(np.uint8)
        packed = tools.encode(np.asfortranarray(mask))
        left, top, width, height = tools.toBbox(packed)
        given = enclose_mask({"size": list(packed["size"]), "counts": packed["counts"].decode()})
        assert given == ((left, top, left + width, top + height) if mask.any() else (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("categories", "classes", "note"),
    [
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], ("cat", "dog"), None),
        ([{"id": 0, "name": "ant"}, {"id": 1, "name": "cat"}], ("ant", "cat"), "0 to 1"),
        ([{"id": 90, "name": "dog"}, {"id": 1, "name": "cat"}], ("cat", "dog"), "1 to 90"),
        ([{"id": 10**15, "name": "dog"}, {"id": 1, "name": "cat"}], ("cat", "dog"), "1 to 1000000000000000"),
        ([{"id": 2, "name": "cat"}, {"id": 1, "name": "cat"}], ("cat",), "several ids, read as one class: cat"),
        ([{"id": "x", "name": "dog"}, {"id": 1, "name": "cat"}], ("cat", "dog"), "no whole numbers"),
        (  # as Roboflow writes it
            [{"id": 0, "name": "pets", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "pets"}],
            ("cat",),
            "0 to 1",
        ),
    ],
)
def test_ids_of_categories(
    categories: list[object], classes: tuple[str, ...], note: str | None, tmp_path: Path
) -> None:
    source = read(tmp_path, {"1.png": None, "a.json": coco([{"bbox": [1, 1, 5, 5]}], categories)})
    assert source.classes == classes
    assert boxes(source)[0][-1] == "cat"
    assert any(note in one for one in source.notes[1:]) if note else len(source.notes) == 1


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        ({}, "has neither a bbox nor a segmentation (annotations[0], id 1)"),
        ({"bbox": [1, 2, 3]}, "has [1, 2, 3] where 4 numbers belong"),
        ({"bbox": [1, 2, 3, None]}, "has None where a number belongs"),
        ({"bbox": [1, 2, 3, True]}, "has True where a number belongs"),
        ({"bbox": "1 2 3 4"}, "where 4 numbers belong"),
        ({"bbox": [1, 1, 2, 2], "category_id": 7}, "has the category_id 7, which isn't among its categories"),
        ({"bbox": [1, 1, 2, 2], "image_id": None}, "has an entry without image_id"),
        ({"segmentation": [[1, 2, 3]]}, "has an outline that isn't a list of x and y"),
        ({"segmentation": {"size": [20, 40], "counts": [900]}}, "has a mask whose counts don't fit its size 20 x 40"),
        ({"segmentation": {"size": [20, 40], "counts": "~~"}}, "has a mask whose packed counts are damaged"),
    ],
)
def test_annotations_that_are_refused(annotation: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"1.png": None, "a.json": coco([annotation])})
    assert says in caught.value.message
    assert "a.json" in caught.value.message


@pytest.mark.parametrize(
    ("images", "categories", "says"),
    [
        ([{"id": 1, "file_name": "1.png"}, {"id": 1, "file_name": "2.png"}], None, "two images with the id 1"),
        ([{"id": 1}], None, "an image without file_name (id 1)"),
        ([7], None, "something else than an object in images[0]"),
        (None, [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "two categories with the id 1: cat and dog"),
        (None, [{"id": 1, "name": ""}], "where the name of a class belongs"),
    ],
)
def test_lists_that_are_refused(images: object, categories: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"1.png": None, "a.json": coco([{"bbox": [1, 1, 5, 5]}], categories, images)})
    assert says in caught.value.message


def test_the_layout_of_coco_itself(tmp_path: Path) -> None:
    """Equal names in the folders of both splits; outlines of people and captions beside the boxes."""
    source = read(
        tmp_path,
        {
            "train2017/1.png": None,
            "val2017/1.png": None,
            "val2017/2.png": None,
            "annotations/instances_train2017.json": coco([{"bbox": [1, 1, 5, 5]}]),
            "annotations/instances_val2017.json": coco([{"bbox": [2, 2, 5, 5]}]),
            "annotations/person_keypoints_train2017.json": coco([{"bbox": [1, 1, 5, 5]}]),
            "annotations/captions_train2017.json": {"images": [], "annotations": []},
        },
    )
    assert splits(source) == {"train2017/1.png": "train", "val2017/1.png": "val"}
    assert boxes(source, "val2017/1.png") == [(2, 2, 7, 7, "cat")]
    assert any("1 image that no annotation names, left out: val2017/2.png" in note for note in source.notes)


def test_ids_may_be_texts_and_annotations_may_have_no_image(tmp_path: Path) -> None:
    content = coco([{"bbox": [1, 1, 5, 5], "image_id": "1"}, {"bbox": [1, 1, 5, 5], "image_id": 9}])
    source = read(tmp_path, {"1.png": None, "a.json": content})
    assert len(boxes(source)) == 1
    assert "1 box of an image that the file doesn't list, left out" in source.notes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"images": [],\n"annotations": [],\n"categories": [}', "(line 3)"),
        ('{"images": [], "annotations": [], "categories": ' + "[" * 100_000, "too many brackets"),
        ('{"images": {}, "annotations": [], "categories": []}', "has no list 'categories'|has no list 'images'"),
    ],
)
def test_json_that_is_no_coco(content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says.replace("(", r"\(").replace(")", r"\)")):
        read(tmp_path, {"1.png": None, "a.json": content})


# --- YOLO -----------------------------------------------------------------------------------


def test_rows_of_all_kinds_in_one_file(tmp_path: Path) -> None:
    rows = [
        "0 0.5 0.5 0.5 0.5",
        "1 0.1 0.1 0.3 0.1 0.3 0.4",  # an outline
        "0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4",  # a rotated box
        "",
        "1.0 0.5 0.5 0.2 0.2 0.93",  # with a probability
        "0 0.9 0.5 0.2004 0.2",  # 1.0002
    ]
    source = read(
        tmp_path, {"images/1.png": None, "labels/1.txt": "\r\n".join(rows), "labels/classes.txt": "cat\ndog\n"}
    )
    assert boxes(source) == [
        (10, 5, 30, 15, "cat"),
        (4, 2, 12, 8, "dog"),
        (4, 2, 12, 8, "cat"),
        (16, 8, 24, 12, "dog"),
        (31.992, 8, 40.008, 12, "cat"),
    ]
    assert "1 label file with outlines among boxes, read as the boxes around them: labels/1.txt" in source.notes


def test_poses_are_their_boxes(tmp_path: Path) -> None:
    yaml = "kpt_shape: [2, 3]\nnames:\n  0: person\n"
    row = "0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.9 0.9 2"
    source = read(tmp_path, {"images/1.png": None, "labels/1.txt": row, "data.yaml": yaml})
    assert boxes(source) == [(10, 5, 30, 15, "person")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("0 0.5 0.5 0.5", "has 4 numbers; a box has 5"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5 0.5 0.5 0.5 0.5", "has 12 numbers"),
        ("2 0.5 0.5 0.5 0.5", "has the class 2, and data.yaml names 2, from 0 on"),
        ("-1 0.5 0.5 0.5 0.5", "has -1 where the number of a class belongs"),
        ("0.5 0.5 0.5 0.5 0.5", "has 0.5 where the number of a class belongs"),
        ("0 200 100 50 50", "has pixels"),
        ("0 nan 0.5 0.5 0.5", "where a number belongs"),
        ("cat 0.5 0.5 0.5 0.5", "'cat' where a number belongs"),
    ],
)
def test_rows_that_are_refused(row: str, says: str, tmp_path: Path) -> None:
    files = {"images/1.png": None, "images/2.png": None, "labels/1.txt": "0 0.5 0.5 0.5 0.5\n"}
    files |= {"labels/2.txt": f"0 0.5 0.5 0.5 0.5\n\n{row}\n", "data.yaml": "names: [cat, dog]\n"}
    with pytest.raises(DataError) as caught:
        read(tmp_path, files)
    assert says in caught.value.message
    assert "labels/2.txt (line 3)" in caught.value.message


TWO_SPLITS = {
    "train/images/1.png": None,
    "train/labels/1.txt": "0 0.5 0.5 0.5 0.5",
    "valid/images/2.png": None,
    "valid/labels/2.txt": "1 0.5 0.5 0.5 0.5",
}


@pytest.mark.parametrize(
    "yaml",
    [
        "train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: ['cat', 'dog']\n\nroboflow:\n  license: MIT\n",
        "path: /home/me/pets # of another machine\ntrain: train/images\nval: valid/images\nnames:\n  0: cat\n  1: dog",
        "train: C:\\data\\train\\images\nval: C:\\data\\valid\\images\nnames:\n- cat\n- 'dog'\n",
        '---\nnames: {0: "cat", 1: dog}\ntrain: [train/images]\nvalid: ./valid\n',
        "names: [\n  cat,\n  dog\n]\ntrain: train/\nval: valid/\nnc: 2\n",
    ],
)
def test_variants_of_data_yaml(yaml: str, tmp_path: Path) -> None:
    source = read(tmp_path, {**TWO_SPLITS, "data.yaml": yaml})
    assert source.classes == ("cat", "dog")
    assert splits(source) == {"train/images/1.png": "train", "valid/images/2.png": "val"}


def test_lists_of_images(tmp_path: Path) -> None:
    files = {f"images/{i}.png": None for i in range(3)} | {f"labels/{i}.txt": "0 0.5 0.5 0.5 0.5" for i in range(3)}
    files |= {"train.txt": "./images/0.png\n/content/data/images/1.png\n", "val.txt": "images/2.png\n"}
    source = read(tmp_path, {**files, "x.yaml": "train: train.txt\nval: val.txt\nnames: [cat]\n"})
    assert splits(source) == {"images/0.png": "train", "images/1.png": "train", "images/2.png": "val"}


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("names: !!python/object/apply:os.system ['ls']\n", "data.yaml (line 1)"),
        ("train: a\nnames: &x [cat]\n", "data.yaml (line 2)"),
        ("names: [cat, dog\n", "a ']' is missing"),
        ("names:\n  0: cat\n  0: dog\n", "the key '0' is there twice"),
        ("names:\n  0: cat\n  7: dog\n", "has names whose numbers aren't 0 to 1"),
        ("names: [cat]\nnames: [dog]\n", "has the key 'names' twice"),
        ("names: cat\n", "neither a list nor a mapping"),
        ("names: ['cat, dog]\n", "the quote of 'cat, dog isn't closed"),
        ("  names: [cat]\n", "where a key belongs"),
    ],
)
def test_yaml_that_is_refused(yaml: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, {**TWO_SPLITS, "data.yaml": yaml})
    assert says in caught.value.message


def test_the_same_folder_for_training_and_validation(tmp_path: Path) -> None:
    files = {"images/1.png": None, "labels/1.txt": "0 0.5 0.5 0.5 0.5"}
    source = read(tmp_path, {**files, "data.yaml": "train: images\nval: images\nnames: [cat]\n"})
    assert splits(source) == {"images/1.png": None}
    assert any("images in several splits" in note for note in source.notes)


def test_labels_without_names_empty_ones_and_none(tmp_path: Path) -> None:
    files = {f"images/{i}.png": None for i in range(3)}
    source = read(
        tmp_path, {**files, "labels/0.txt": "2 0.5 0.5 0.5 0.5", "labels/1.txt": "", "labels/9.txt": "0 0 0 1 1"}
    )
    assert source.classes == ("0", "1", "2")
    for note in (
        "no file names the classes (data.yaml or classes.txt), so they have numbers",
        "1 image with an empty label file, kept as background: images/1.png",
        "1 image without labels, kept as background (move them away if they aren't labelled yet): images/2.png",
        "1 labelled image is missing: 9",
    ):
        assert note in source.notes


def test_captions_beside_images_are_no_boxes(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read(tmp_path, {"1.png": None, "1.txt": "a cat on a mat"})


# --- Pascal VOC -----------------------------------------------------------------------------


def voc(*objects: str, before: str = "", size: str = "") -> str:
    return f"{before}<annotation>\n{size}{''.join(objects)}</annotation>"


BOX = "<object><name>cat</name>\n<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
ENTITIES = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>\n'
OUTSIDE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>\n'


@pytest.mark.parametrize("before", [ENTITIES, OUTSIDE])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_has_no_entities(before: str, encoding: str, tmp_path: Path) -> None:
    text = voc(BOX.replace("cat", "&b;"), before=before)
    if encoding == "utf-16":  # which hides the words; the second file shows which format it is
        read_files = {"1.png": None, "1.xml": voc(BOX), "2.png": None, "2.xml": text.encode("utf-16")}
    else:
        read_files = {"1.png": None, "1.xml": text}
    with pytest.raises(DataError, match="DOCTYPE") as caught:
        read(tmp_path, read_files)
    assert "line 1" in caught.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (voc(BOX.replace("<ymin>2", "<ymin>two")), "1.xml (line 2)"),
        (voc(BOX.replace("<xmax>9</xmax>", "")), "has '' where a number belongs"),
        (voc(BOX.replace("cat", " ")), "where the name of a class belongs"),
        (voc("<object><name>cat</name></object>"), "has an object without a box"),
        (voc(BOX)[:-20], "1.xml (line 3)"),
        (voc("<a>" * 100), "has more than 64 elements inside of each other"),
        (voc(BOX, before='<?xml version="1.0" encoding="klingon"?>'), "1.xml (line 1)"),
    ],
)
def test_xml_that_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"1.png": None, "1.xml": text})
    assert says in caught.value.message


def test_rotated_boxes_and_parts(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    rotated = (
        "<object><name>dog</name><robndbox><cx>20</cx><cy>10</cy><w>4</w><h>8</h><angle>1.5707963267948966</angle>"
        "</robndbox></object>"
    )
    source = read(tmp_path, {"1.png": None, "1.xml": voc(BOX.replace("</object>", part + "</object>"), rotated)})
    assert boxes(source) == [(1, 2, 9, 8, "cat"), (16, 8, 24, 12, "dog")]
    assert any("rotated boxes or outlines" in note for note in source.notes)


def test_lists_of_splits(tmp_path: Path) -> None:
    files: dict[str, object] = {f"JPEGImages/{i}.png": None for i in range(5)}
    files |= {f"Annotations/{i}.xml": voc(BOX) for i in range(5)}
    lists = {"trainval": "0\n1\n2\n", "val": "2\n", "test": "3 -1\n", "cat_train": "4 1\n"}
    files |= {f"ImageSets/Main/{name}.txt": text for name, text in lists.items()}
    files["SegmentationClass/0.png"] = None
    source = read(tmp_path, files)
    expected = {0: "train", 1: "train", 2: "val", 3: "test", 4: None}
    assert splits(source) == {f"JPEGImages/{i}.png": split for i, split in expected.items()}
    assert any("1 images in no list" in note or "images in no list of ImageSets" in note for note in source.notes)


def test_masks_beside_boxes_are_no_images(tmp_path: Path) -> None:
    """As in Oxford's pets."""
    files = {f"images/{i}.png": None for i in range(3)} | {f"annotations/trimaps/{i}.png": None for i in range(3)}
    source = read(tmp_path, {**files, "annotations/xmls/1.xml": voc(BOX)})
    assert [row.name for row in source.examples] == [f"images/{i}.png" for i in range(3)]
    assert boxes(source, "1.png") == [(1, 2, 9, 8, "cat")]
    assert any("3 images in folders of masks, left out" in note for note in source.notes)


def test_a_file_that_was_renamed(tmp_path: Path) -> None:
    """Its own name counts; else the one that it states, with another suffix or none."""
    stated = "<filename>photo.JPG</filename>"
    assert len(boxes(read(tmp_path / "a", {"1.png": None, "1.xml": voc(BOX, size=stated)}))) == 1
    assert len(boxes(read(tmp_path / "b", {"photo.png": None, "x.xml": voc(BOX, size=stated)}), "photo.png")) == 1


# --- tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        "filename,width,height,class,xmin,ymin,xmax,ymax\n1.png,40,20,cat,1,2,9,8\n",
        "image_path;label;x1;y1;x2;y2\n1.png;cat;1;2;9;8\n",
        "Image,X_Min,Y_Min,X_Max,Y_Max,Label\n1.png,1,2,9,8,cat\n",
        "image_name,bbox_x,bbox_y,bbox_width,bbox_height,image_width,image_height,label_name\n1.png,1,2,8,6,40,20,cat\n",
        'image_id,width,height,bbox,class_name\n1,40,20,"[1.0, 2.0, 8.0, 6.0]",cat\n',
        "ImageID,Source,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n1,x,cat,0.025,0.225,0.1,0.4,0\n",
        "1.png,1,2,9,8,cat\n",
        "\ufeffimage,left,top,right,bottom,category\r\n1.png,1,2,9,8,cat\r\n",
    ],
)
def test_usual_spellings(table: str, tmp_path: Path) -> None:
    source = read(tmp_path, {"images/1.png": None, "boxes.csv": table})
    assert boxes(source) == [(1, 2, 9, 8, "cat")]
    assert source.classes == ("cat",)
    alone = find_source(tmp_path / "boxes.csv", data_dir=tmp_path)
    assert boxes(alone) == boxes(source)


def test_other_names_of_the_class(tmp_path: Path) -> None:
    """The only column of words; or the one that the user names; else all boxes are of one class."""
    table = "filename,cell_type,xmin,xmax,ymin,ymax\n1.png,RBC,1,9,2,8\n1.png,WBC,1,9,2,9\n"
    source = read(tmp_path, {"1.png": None, "boxes.csv": table})
    assert boxes(source) == [(1, 2, 9, 8, "RBC"), (1, 2, 9, 9, "WBC")]
    assert "the column cell_type of boxes.csv read as the class" in source.notes
    (tmp_path / "boxes.csv").write_text(table.replace("cell_type", "cell_type,stain").replace("BC,", "BC,pink,"))
    assert folder.read(tmp_path, Columns()).classes == ("object",)
    assert folder.read(tmp_path, Columns(label="stain")).classes == ("pink",)
    with pytest.raises(UsageError, match="Unknown label column of boxes.csv 'stein'") as caught:
        folder.read(tmp_path, Columns(label="stein"))
    assert "Did you mean 'stain'" in caught.value.fix


def test_tables_of_splits(tmp_path: Path) -> None:
    head = "image,xmin,ymin,xmax,ymax,label\n"
    files = {"images/1.png": None, "images/2.png": None, "images/3.png": None}
    files |= {"train.csv": f"{head}1.png,1,2,9,8,cat\n", "test.csv": f"{head}2.png,1,2,9,8,dog\n"}
    read_by_folder_reader = files
    for name, content in read_by_folder_reader.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture() if content is None else content.encode())
    source = find_source(tmp_path, data_dir=tmp_path)
    assert splits(source) == {"images/1.png": "train", "images/2.png": "test", "images/3.png": None}
    assert any("1 image without labels" in note for note in source.notes)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1.png,1,2,x,8,cat", "boxes.csv (line 3)"),
        ("1.png,1,2,,8,cat", "has '' where a number belongs"),
        ("1.png,1,2,9,8,", "where the name of a class belongs"),
        ("../../1.png,1,2,9,8,cat", "leads out of the folder"),
    ],
)
def test_rows_of_tables_that_are_refused(row: str, says: str, tmp_path: Path) -> None:
    table = f"image,xmin,ymin,xmax,ymax,label\n1.png,1,2,9,8,cat\n{row}\n"
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a" / "b", {"images/x.png" if ".." in row else "1.png": None, "boxes.csv": table})
    assert says in caught.value.message


# --- LabelMe, Label Studio, CVAT ------------------------------------------------------------


def test_shapes_of_labelme(tmp_path: Path) -> None:
    shapes = [
        {"label": "cat", "points": [[1, 2], [9, 2], [5, 8]], "shape_type": "polygon"},
        {"label": "cat", "points": [[10, 10], [13, 14]], "shape_type": "circle"},
        {"label": "cat", "points": [[10, 10]], "shape_type": "point"},
    ]
    content = {"shapes": shapes, "imagePath": "..\\photos\\1.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    source = read(tmp_path, {"1.png": None, "1.json": content})
    assert boxes(source) == [(1, 2, 9, 8, "cat"), (5, 5, 15, 15, "cat")]
    assert "1 point or line, which has no box, left out" in source.notes
    del shapes[0]["points"]
    with pytest.raises(DataError, match=r"1\.json .* has no list 'points' \(shapes\[0\]\)"):
        read(tmp_path, {"1.json": content})


def test_label_studio_in_its_short_form_and_rotated(tmp_path: Path) -> None:
    value = {"x": 50, "y": 20, "width": 20, "height": 20, "rotation": 90, "rectanglelabels": ["cat"]}
    size = {"original_width": WIDTH, "original_height": HEIGHT}
    short = [{"id": 1, "image": "/data/local-files/?d=pets%2F1.png", "label": [{**value, **size}]}]
    source = read(tmp_path, {"1.png": None, "export.json": short})
    assert boxes(source) == [(16, 4, 20, 12, "cat")]  # 8x4 px at (20, 4), turned about that corner
    assert any("rotated boxes" in note for note in source.notes)


def test_label_studio_tasks_without_an_answer(tmp_path: Path) -> None:
    def task(name: str, annotations: list[object]) -> dict[str, object]:
        return {"data": {"image": f"s3://bucket/{name}"}, "annotations": annotations}

    result = [{"value": {"x": 0, "y": 0, "width": 10, "height": 10, "rectanglelabels": ["cat"]}}]
    tasks = [
        task("1.png", [{"result": [], "was_cancelled": True}, {"result": result}]),
        task("2.png", []),
        task("3.png", [{"result": []}]),
    ]
    source = read(tmp_path, {"1.png": None, "2.png": None, "3.png": None, "export.json": tasks})
    assert [row.name for row in source.examples] == ["1.png", "3.png"]
    assert boxes(source) == [(0, 0, 4, 2, "cat")]
    assert any("images that nobody has labelled yet, left out: " in note for note in source.notes)


def test_shapes_of_cvat(tmp_path: Path) -> None:
    shapes = (
        '<box label="cat" xtl="16" ytl="8" xbr="24" ybr="12" rotation="90"/>'
        '<polygon label="dog" points="1,2;9,2;5,8"/><ellipse label="cat" cx="10" cy="10" rx="3" ry="2"/>'
        '<mask label="cat" left="1" top="2" width="3" height="4" rle="1, 2"/><points label="cat" points="1,2"/>'
    )
    text = f'<annotations><image id="0" name="1.png" width="40" height="20">{shapes}</image></annotations>'
    source = read(tmp_path, {"1.png": None, "annotations.xml": text})
    assert boxes(source) == [
        (18, 6, 22, 14, "cat"),
        (1, 2, 9, 8, "dog"),
        (7, 8, 13, 12, "cat"),
        (1, 2, 4, 6, "cat"),
    ]
    with pytest.raises(DataError, match=r"annotations\.xml \(line 1\) .* isn't a list of x,y"):
        read(tmp_path, {"annotations.xml": text.replace("1,2;9,2;5,8", "1,2;9")})


def test_tracks_of_cvat(tmp_path: Path) -> None:
    box = '<box frame="{}" outside="{}" xtl="1" ytl="2" xbr="9" ybr="8"/>'
    track = f'<track id="0" label="cat">{box.format(0, 0)}{box.format(1, 1)}{box.format(7, 0)}</track>'
    files = {"frame_000000.png": None, "frame_000001.png": None, "a.xml": f"<annotations>{track}</annotations>"}
    source = read(tmp_path, files)
    assert boxes(source, "0.png") == [(1, 2, 9, 8, "cat")]
    assert boxes(source, "1.png") == []
    assert any("1 labelled image is missing: frame 7" in note for note in source.notes)


# --- which labels are read ------------------------------------------------------------------


def test_class_folders_stay_class_folders_unless_the_user_says_so(tmp_path: Path) -> None:
    files = {"cat/1.png": None, "cat/1.xml": voc(BOX), "dog/2.png": None, "dog/2.xml": voc(BOX)}
    source = read(tmp_path, files)
    assert (source.annotation, source.classes) == ("class", ("cat", "dog"))
    assert any("only the class folders are learned" in note for note in source.notes)
    source = folder.read(tmp_path, Columns(annotation="boxes"))
    assert (source.annotation, len(source.examples)) == ("boxes", 2)


def test_of_several_formats_one_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    table = "image,xmin,ymin,xmax,ymax,label\n1.png,3,3,9,8,dog\n"
    source = read(tmp_path, {"1.png": None, "1.xml": voc(BOX), "test_labels.csv": table})
    assert boxes(source) == [(1, 2, 9, 8, "cat")]
    assert any("CSV labels not read: Pascal VOC was found, too (test_labels.csv)" in note for note in source.notes)
    alone = annotation_file.read(tmp_path / "test_labels.csv", Columns())
    assert boxes(alone) == [(3, 3, 9, 8, "dog")]


@pytest.mark.parametrize("name", ["settings.json", "layout.xml", "config.yaml"])
def test_a_file_of_something_else(name: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture())
    (tmp_path / name).write_text({"json": '{"a": 1}', "xml": "<a/>", "yaml": "a: 1\n"}[name.split(".")[1]])
    with pytest.raises((DataError, UsageError)) as caught:
        find_source(tmp_path / name, data_dir=tmp_path)
    assert "is in no format of annotations that suanli knows" in caught.value.message
    assert "Pascal VOC" in caught.value.fix
