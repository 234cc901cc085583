"""What holds for every file of data/formats/: the same boxes, whatever the format. A new one needs a sample here."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from suanli.core import registry
from suanli.core.boxes import Box, place
from suanli.core.errors import DataError, SuanliError
from suanli.core.schema import Geometry
from suanli.core.types import Columns, Source
from suanli.data.annotated import Files, Format
from suanli.data.members import Member
from suanli.data.readers import annotation_file, archive, folder

FORMATS: dict[str, Format] = registry.load_all("formats")
CLASSES = ("cat", "dog")
WIDTH, HEIGHT = 40, 20
# The same for all formats: three images, one of them without a box.
BOXES = {
    "a": [Box(2, 3, 12, 13, "cat"), Box(20, 4, 36, 16, "dog")],
    "b": [Box(0, 0, 40, 20, "dog")],
    "c": [],
}


def picture(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "png")
    return stream.getvalue()


def images(place_of: str = "{}.png") -> dict[str, bytes]:
    return {place_of.format(stem): picture() for stem in BOXES}


def voc() -> dict[str, bytes]:
    files = images("JPEGImages/{}.png")
    for stem, boxes in BOXES.items():
        objects = "".join(
            f"<object><name>{b.label}</name><bndbox><xmin>{b.left}</xmin><ymin>{b.top}</ymin>"
            f"<xmax>{b.right}</xmax><ymax>{b.bottom}</ymax></bndbox></object>"
            for b in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        text = f"<annotation><filename>{stem}.png</filename>{size}{objects}</annotation>"
        files[f"Annotations/{stem}.xml"] = text.encode()
    return files


def coco() -> dict[str, bytes]:
    listed = [
        {"id": i, "file_name": f"{stem}.png", "width": WIDTH, "height": HEIGHT} for i, stem in enumerate(BOXES, start=7)
    ]
    annotations = [
        {
            "image_id": i,
            "category_id": CLASSES.index(b.label),
            "bbox": [b.left, b.top, b.right - b.left, b.bottom - b.top],
        }
        for i, boxes in enumerate(BOXES.values(), start=7)
        for b in boxes
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": listed, "annotations": annotations, "categories": categories}
    return {**images("images/{}.png"), "annotations/instances.json": json.dumps(content).encode()}


def yolo() -> dict[str, bytes]:
    files = images("images/{}.png")
    for stem, boxes in BOXES.items():
        rows = [
            f"{CLASSES.index(b.label)} {(b.left + b.right) / 2 / WIDTH} {(b.top + b.bottom) / 2 / HEIGHT} "
            f"{(b.right - b.left) / WIDTH} {(b.bottom - b.top) / HEIGHT}"
            for b in boxes
        ]
        files[f"labels/{stem}.txt"] = "\n".join(rows).encode()
    return {**files, "data.yaml": b"names: [cat, dog]\n"}


def box_table() -> dict[str, bytes]:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
    for stem, boxes in BOXES.items():
        for b in boxes:
            writer.writerow([f"{stem}.png", WIDTH, HEIGHT, b.label, *b[:4]])
        if not boxes:
            writer.writerow([f"{stem}.png", WIDTH, HEIGHT, *[""] * 5])
    return {**images("images/{}.png"), "labels.csv": stream.getvalue().encode()}


def labelme() -> dict[str, bytes]:
    files = images()
    for stem, boxes in BOXES.items():
        shapes = [
            {"label": b.label, "points": [[b.right, b.bottom], [b.left, b.top]], "shape_type": "rectangle"}
            for b in boxes
        ]
        content = {"shapes": shapes, "imagePath": f"{stem}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        files[f"{stem}.json"] = json.dumps(content).encode()
    return files


def label_studio() -> dict[str, bytes]:
    tasks = []
    for stem, boxes in BOXES.items():
        results = [
            {
                "type": "rectanglelabels",
                "original_width": WIDTH,
                "original_height": HEIGHT,
                "value": {
                    "x": 100 * b.left / WIDTH,
                    "y": 100 * b.top / HEIGHT,
                    "width": 100 * (b.right - b.left) / WIDTH,
                    "height": 100 * (b.bottom - b.top) / HEIGHT,
                    "rotation": 0,
                    "rectanglelabels": [b.label],
                },
            }
            for b in boxes
        ]
        data = {"image": f"/data/upload/1/0a1b2c3d-{stem}.png"}
        tasks.append({"id": 1, "data": data, "annotations": [{"result": results, "was_cancelled": False}]})
    return {**images("images/{}.png"), "project.json": json.dumps(tasks).encode()}


def cvat() -> dict[str, bytes]:
    listed = "".join(
        f'<image id="{i}" name="{stem}.png" width="{WIDTH}" height="{HEIGHT}">'
        + "".join(
            f'<box label="{b.label}" xtl="{b.left}" ytl="{b.top}" xbr="{b.right}" ybr="{b.bottom}" occluded="0"/>'
            for b in boxes
        )
        + "</image>"
        for i, (stem, boxes) in enumerate(BOXES.items())
    )
    text = f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{listed}</annotations>'
    return {**images("images/{}.png"), "annotations.xml": text.encode()}


SAMPLES: dict[str, Callable[[], dict[str, bytes]]] = {
    "voc": voc,
    "coco": coco,
    "yolo": yolo,
    "box_table": box_table,
    "labelme": labelme,
    "label_studio": label_studio,
    "cvat": cvat,
}
ALONE = {  # the one file of annotations that a user may name
    "coco": "annotations/instances.json",
    "yolo": "data.yaml",
    "box_table": "labels.csv",
    "label_studio": "project.json",
    "cvat": "annotations.xml",
}


@pytest.fixture(params=sorted(FORMATS))
def form(request: pytest.FixtureRequest) -> Format:
    assert request.param in SAMPLES, "add a sample to this file"
    return FORMATS[request.param]


def write(files: dict[str, bytes], top: Path) -> Path:
    for name, content in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)
    return top


def check(source: Source) -> None:
    """That these are the boxes of `BOXES`."""
    assert source.annotation == "boxes"
    assert source.classes == CLASSES
    assert {Path(row.name).stem for row in source.examples} == set(BOXES)
    for row in source.examples:
        expected = BOXES[Path(row.name).stem]
        placed = place(row.target, Geometry.unchanged((HEIGHT, WIDTH)))
        assert [box.label for box in row.target.boxes] == [box.label for box in expected]
        assert placed.corners.tolist() == [pytest.approx(box[:4], abs=1e-6) for box in expected]
        assert placed.how == ""
        assert row.read() == picture()


def test_is_named_as_its_file(form: Format) -> None:
    assert FORMATS[form.name] is form


def test_orders_differ() -> None:
    assert len({form.order for form in FORMATS.values()}) == len(FORMATS)


def test_a_folder(form: Format, tmp_path: Path) -> None:
    top = write(SAMPLES[form.name](), tmp_path / "data")
    source = folder.read(top, Columns())
    check(source)
    assert source.name == "data"
    assert source.notes[0].startswith("labels read from")
    assert form.title in source.notes[0]


def test_an_archive_with_a_folder_around_everything(form: Format, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for name, content in SAMPLES[form.name]().items():
            file.writestr(f"export/{name}", content)
    check(archive.read(tmp_path / "data.zip", Columns()))


def test_the_file_of_annotations_alone(form: Format, tmp_path: Path) -> None:
    if form.name not in ALONE:
        pytest.skip("it has a file for each image")
    top = write(SAMPLES[form.name](), tmp_path / "data")
    named = top / ALONE[form.name]
    if named.parent != top:  # images lie in the folder of the file, or below
        named = named.replace(top / named.name)
    assert annotation_file.why_not(named) is None
    check(annotation_file.read(named, Columns()))


def test_no_other_format_finds_its_files(form: Format) -> None:
    files = SAMPLES[form.name]()
    members = [Member(name, len(content), lambda content=content: content) for name, content in files.items()]
    listed = Files([m for m in members if m.path.endswith("png")], [m for m in members if m.path[-3:] != "png"], "Here")
    assert [name for name, other in FORMATS.items() if other.find(listed)] == [form.name]


def test_splits_of_folders(form: Format, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write(SAMPLES[form.name](), tmp_path / "data" / split)
    if form.name == "yolo":  # one description for both
        (tmp_path / "data" / "train" / "data.yaml").replace(tmp_path / "data" / "data.yaml")
        (tmp_path / "data" / "valid" / "data.yaml").unlink()
    source = folder.read(tmp_path / "data", Columns())
    assert {row.name.split("/")[0]: row.split for row in source.examples} == {"train": "train", "valid": "val"}
    assert len(source.examples) == 6


def test_images_that_are_missing_are_counted(form: Format, tmp_path: Path) -> None:
    files = SAMPLES[form.name]()
    gone = next(name for name in files if name.endswith("b.png"))
    del files[gone]
    source = folder.read(write(files, tmp_path / "data"), Columns())
    assert len(source.examples) == 2
    assert any("1 labelled image is missing" in note for note in source.notes), source.notes


def test_no_image_at_all_is_an_error(form: Format, tmp_path: Path) -> None:
    files = {name: content for name, content in SAMPLES[form.name]().items() if not name.endswith(".png")}
    with pytest.raises(DataError) as caught:
        folder.read(write(files, tmp_path / "data"), Columns())
    assert caught.value.fix


def annotation_paths(form: Format) -> list[str]:
    return [name for name in SAMPLES[form.name]() if not name.endswith((".png", ".yaml"))]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_that_is_cut_short_is_named(form: Format, share: float, tmp_path: Path) -> None:
    """With its line where the format has lines; a table or a list of rows may end anywhere."""
    files = SAMPLES[form.name]()
    path = annotation_paths(form)[0]
    files[path] = files[path][: int(share * len(files[path]))]
    top = write(files, tmp_path / "data")
    if form.name in ("yolo", "box_table"):
        with contextlib.suppress(DataError):
            assert len(folder.read(top, Columns()).examples) == 3
        return
    with pytest.raises(DataError) as caught:
        folder.read(top, Columns())
    assert Path(path).name in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize("word", [b"NaN", b"1e999", b'"x"', b"-inf", b"1" * 5000, b"{}", b"\xff\xfe"])
def test_what_is_no_number_is_refused(form: Format, word: bytes, tmp_path: Path) -> None:
    """The left side of the first box of "b", which is 0 in all formats that have it as a number."""
    files = SAMPLES[form.name]()
    spots = {
        "voc": ("Annotations/b.xml", b"<xmin>0</xmin>", b"<xmin>%s</xmin>"),
        "coco": ("annotations/instances.json", b"[0, 0, 40, 20]", b"[%s, 0, 40, 20]"),
        "yolo": ("labels/b.txt", b"1 0.5 ", b"1 %s "),
        "box_table": ("labels.csv", b"dog,0,0,40,20", b"dog,%s,0,40,20"),
        "labelme": ("b.json", b"[0, 0]", b"[%s, 0]"),
        "label_studio": ("project.json", b'"x": 0.0, "y": 0.0', b'"x": %s, "y": 0.0'),
        "cvat": ("annotations.xml", b'xtl="0"', b'xtl="%s"'),
    }
    path, before, after = spots[form.name]
    assert before in files[path]
    files[path] = files[path].replace(before, after % word)
    with pytest.raises(DataError) as caught:
        folder.read(write(files, tmp_path / "data"), Columns())
    assert Path(path).name in caught.value.message
    assert len(caught.value.message) < 600


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_a_file_is_read_or_refused(form: Format, data: st.DataObject) -> None:
    """Bytes that were changed, cut out or put in: an error of suanli, never another one."""
    files = SAMPLES[form.name]()
    path = data.draw(st.sampled_from([name for name in files if not name.endswith(".png")]))
    content = bytearray(files[path])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 6)))
        some = st.sampled_from([b"", b'"', b"{", b"[", b"-1", b"null", b"<", b"0", b"\n", b",", b":", b"\xff", b"x"])
        content[start:end] = data.draw(some)
    files[path] = bytes(content)
    members = [Member(name, len(content), lambda content=content: content) for name, content in files.items()]
    listed = Files([m for m in members if m.path.endswith("png")], [m for m in members if m.path[-3:] != "png"], "Here")
    with contextlib.suppress(SuanliError):
        if paths := form.find(listed):
            read = form.read(listed, paths)
            assert set(read.targets) <= set(listed.images)
            assert {box.label for target in read.targets.values() for box in target.boxes} <= set(read.classes)


def test_a_file_that_is_too_large_is_not_opened(form: Format) -> None:
    files = SAMPLES[form.name]()
    images = [Member(name, 9, bytes) for name in files if name.endswith("png")]
    others = [Member(name, 1 << 40, lambda: pytest.fail("it was read")) for name in files if not name.endswith("png")]
    with pytest.raises(DataError, match="the limit is|is too large"):
        form.find(Files(images, others, "Here"))


def test_names_that_lead_out_are_not_opened(form: Format, tmp_path: Path) -> None:
    """An image of that name lies where the path leads."""
    (tmp_path / "b.png").write_bytes(picture())
    files = SAMPLES[form.name]()
    gone = next(name for name in files if name.endswith("b.png"))
    del files[gone]
    for name, content in files.items():
        if not name.endswith(".png"):
            files[name] = content.replace(b"b.png", b"../../../b.png")
    top = write(files, tmp_path / "data" / "inner")
    if form.name not in ("yolo", "label_studio"):  # whose files don't name images, or by the address of a server
        with pytest.raises(DataError, match=r"leads out of the folder"):
            folder.read(top, Columns())
    else:
        assert [Path(row.name).stem for row in folder.read(top, Columns()).examples] == ["a", "c"]
