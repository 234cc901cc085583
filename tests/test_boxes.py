"""Boxes from what a file states to pixels of the image, and what the data check says of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import suanli
from report_runs import write
from suanli.core.boxes import Box, Boxes, place
from suanli.core.errors import DataError
from suanli.core.schema import Geometry
from suanli.data import checks
from suanli.data.decode import decode
from suanli.tasks._clean_boxes import CROWD, clean

WIDTH, HEIGHT = 40, 20


def upright(orientation: int = 1) -> Geometry:
    """Of a stored image of 40x20 px."""
    size = (WIDTH, HEIGHT) if orientation > 4 else (HEIGHT, WIDTH)
    return Geometry(size=size, scale=(1.0, 1.0), shift=(0.0, 0.0), orientation=orientation)


def png(pixels: np.ndarray, orientation: int = 1) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(stream, "png", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_pixels(orientation: int) -> None:
    """A box around the bright pixels of the stored image is around them in the decoded one."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[3:9, 5:25] = 255
    image = decode(png(pixels, orientation))
    rows, columns = np.nonzero(image.pixels[:, :, 0])
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    geometry = Geometry(size=image.pixels.shape[:2], scale=(1.0, 1.0), shift=(0.0, 0.0), orientation=image.orientation)
    stated = Boxes((Box(5, 3, 25, 9, "a"),), (HEIGHT, WIDTH))
    placed = place(stated, geometry)
    if orientation > 4:
        assert (placed.how, placed.corners[0].tolist()) == ("turned", expected)
        own = Boxes((Box(*map(float, expected), "a"),), (WIDTH, HEIGHT))  # of the image as it is shown
        assert (place(own, geometry).how, place(own, geometry).corners[0].tolist()) == ("", expected)
    else:  # sides don't tell
        assert (placed.how, placed.corners[0].tolist()) == ("", [5, 3, 25, 9])


@pytest.mark.parametrize(
    ("size", "how", "corners"),
    [
        ((20, 40), "", [4, 2, 8, 6]),
        (None, "", [4, 2, 8, 6]),
        ((0, 0), "", [4, 2, 8, 6]),
        ((10, 20), "scaled", [8, 4, 16, 12]),
        ((40, 80), "scaled", [2, 1, 4, 3]),
        ((21, 41), "scaled", None),
        ((40, 40), "unlike", [4, 2, 8, 6]),
    ],
)
def test_sizes_that_lie(size: tuple[float, float] | None, how: str, corners: list[float] | None) -> None:
    placed = place(Boxes((Box(4, 2, 8, 6, "a"),), size), upright())
    assert placed.how == how
    if corners is not None:
        assert placed.corners[0].tolist() == corners


def test_shares_are_of_the_image() -> None:
    placed = place(Boxes((Box(0.25, 0.5, 0.5, 1.0, "a"),), relative=True), upright())
    assert placed.corners[0].tolist() == [10, 10, 20, 20]


def test_a_rotated_image_whose_label_states_no_size() -> None:
    """Where a box fits only into the pixels before the rotation it is turned; else nothing tells."""
    assert place(Boxes((Box(0, 0, 30, 5, "a"),)), upright(6)).how == "turned"
    assert place(Boxes((Box(0, 0, 5, 5, "a"),)), upright(6)).how == "unsure"
    assert place(Boxes((Box(0, 0, 0.5, 0.5, "a"),), relative=True), upright(6)).how == "unsure"


def test_what_is_clean() -> None:
    boxes = (
        Box(1, 2, 5, 6, "a"),
        Box(1, 2, 5, 6, "a"),  # again
        Box(1, 2, 5, 6, "b"),  # of another class
        Box(7, 8, 7, 12, "a"),  # no width
        Box(-9, 2, -1, 6, "a"),  # outside
        Box(30, 10, 50, 25, "a"),  # reaches out
        Box(8, 6, 3, 4, "a", crowd=True),  # corners exchanged
        Box(39.5, 19.5, 40.4, 20.4, "a"),  # rounding
        Box(10, 10, 11, 11, "a"),  # a pixel
    )
    cleaned = clean(Boxes(boxes, (HEIGHT, WIDTH)), upright())
    assert cleaned.corners.tolist() == [
        [1, 2, 5, 6],
        [1, 2, 5, 6],
        [30, 10, 40, 20],
        [3, 4, 8, 6],
        [39.5, 19.5, 40, 20],
        [10, 10, 11, 11],
    ]
    assert cleaned.labels == ["a", "b", "a", "a", "a", "a"]
    assert cleaned.flags.tolist() == [0, 0, 0, CROWD, 0, 0]
    assert cleaned.problems == {"repeated": 1, "no area": 1, "outside": 1, "clipped": 1, "exchanged": 1}


@pytest.mark.parametrize(
    "target", [Boxes((Box(1, 2, 5, 6, "a"),), (20, 40)), Boxes((Box(0, 0, 1, 1, "a"),), relative=True)]
)
def test_an_image_that_can_not_be_decoded_has_no_boxes(target: Boxes) -> None:
    """The cache encodes its target, too, for an image of no size."""
    assert len(clean(target, Geometry.unchanged((0, 0))).corners) == 0


def test_two_thousand_boxes_in_an_image() -> None:
    boxes = tuple(Box(i % 50, i // 50, i % 50 + 1, i // 50 + 1, "a") for i in range(2000))
    cleaned = clean(Boxes(boxes), Geometry.unchanged((50, 50)))
    assert len(cleaned.corners) == 2000
    assert not cleaned.problems


# --- suanli prepare -------------------------------------------------------------------------


def write_voc(top: Path, images: dict[str, tuple[str, bytes]]) -> Path:
    """Images with the elements of their XML files."""
    top.mkdir()
    for name, (elements, content) in images.items():
        (top / f"{name}.png").write_bytes(content)
        (top / f"{name}.xml").write_text(f"<annotation>{elements}</annotation>")
    return top


def element(label: str, left: float, top: float, right: float, bottom: float) -> str:
    sides = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    return f"<object><name>{label}</name><bndbox>{sides}</bndbox></object>"


def size_of(width: int, height: int) -> str:
    return f"<size><width>{width}</width><height>{height}</height></size>"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> suanli.PreparedData:
    """Images of 64x48 px with everything that the check looks for."""
    top, random = tmp_path_factory.mktemp("voc") / "data", np.random.default_rng(0)

    def image(width: int = 64, height: int = 48, orientation: int = 1) -> bytes:
        return png(random.integers(0, 255, (height, width, 3), np.uint8), orientation)

    plain = size_of(64, 48) + element("cell", 4, 4, 40, 40)
    images = {f"p{i:02d}": (plain, image()) for i in range(30)}
    images["empty"] = (size_of(64, 48), image())
    images["flat"] = (plain + element("cell", 9, 9, 9, 20), image())
    images["out"] = (plain + element("cell", 70, 9, 90, 20) + element("cell", 50, 9, 90, 20), image())
    images["twice"] = (plain + element("cell", 4, 4, 40, 40), image())
    images["tiny"] = (plain + element("dot", 10, 10, 11, 11), image())
    images["turned"] = (size_of(64, 48) + element("cell", 50, 4, 63, 20), image(orientation=6))
    images["small"] = (size_of(128, 96) + element("cell", 8, 8, 80, 80), image())
    images["odd"] = (size_of(100, 20) + element("cell", 8, 8, 20, 20), image())
    write_voc(top, images)
    (top / "nolabel.png").write_bytes(image())
    (top / "gone.xml").write_text(f"<annotation>{plain}</annotation>")
    settings = {"preprocess.size": 32, "preprocess.resize": "pad"}
    cache = tmp_path_factory.mktemp("cache")
    return suanli.prepare(top, settings=settings, cache_dir=cache, max_bad=0.0)


def test_the_check_counts_what_is_wrong(prepared: suanli.PreparedData) -> None:
    said = checks.format_findings(prepared.findings)
    for sentence in (
        "1 box without an area, left out: flat.png",
        "1 box outside of its image, left out: out.png",
        "1 box that is there twice, left out once: twice.png",
        "1 box reaches out of its image, clipped: out.png",
        "1 image whose boxes are of the pixels before the EXIF rotation: turned with the image: turned.png",
        "1 image of another size than their labels state: boxes scaled to it: small.png",
        "1 image of another shape than their labels state: boxes taken as they are, look at some of them: odd.png",
        "1 image without labels, kept as background (move them away if they aren't labelled yet): nolabel.png",
        "1 labelled image is missing: gone",
    ):
        assert sentence in said
    assert any(
        line.startswith("the smallest object has 0.5 px at the training size of 32 px (tiny.png)") for line in said
    )
    missing = [line for line in said if line.startswith("classes without objects")]
    assert len(missing) == 2
    assert all(line.endswith(": dot") for line in missing)


def test_every_image_and_box_is_there(prepared: suanli.PreparedData) -> None:
    assert sum(map(len, prepared.splits.values())) == 39
    assert prepared.task.classes == ("cell", "dot")
    boxes = {
        name: split.targets["boxes"][i] for split in prepared.splits.values() for i, name in enumerate(split.names)
    }
    assert {name: len(rows) for name, rows in boxes.items() if not name.startswith("p")} == {
        "empty.png": 0, "flat.png": 1, "nolabel.png": 0, "odd.png": 1, "out.png": 2, "small.png": 1, "tiny.png": 2,
        "turned.png": 1, "twice.png": 1,
    }  # fmt: skip
    # In the model's coordinates: 64x48 px become 32x24 between bars of 4 px.
    assert boxes["small.png"].tolist() == [[2, 6, 20, 24, 0, 0]]
    # Turned by 90 degrees: 48x64 px become 24x32; (50, 4) to (63, 20) are (28, 50) to (44, 63) there.
    assert boxes["turned.png"].tolist() == [[18, 25, 26, 31.5, 0, 0]]


def test_sizes_and_shapes_are_figures_for_the_report(prepared: suanli.PreparedData) -> None:
    figures = prepared.findings["target_figures"]
    assert sum(count for _, count in figures["object_sides_px"]) == 39
    assert figures["objects_per_image"][:2] == [[0, 2], [1, 35]]
    sections = prepared.task.data_sections(figures)
    assert [section.title for section in sections] == ["Sizes of objects", "", ""]
    assert prepared.task.data_sections({}) == []


def test_the_report_shows_sizes_and_what_is_wrong(prepared: suanli.PreparedData, tmp_path: Path) -> None:
    about = {"recipe": {"task": "detection"}, "data": prepared.to_json(), "check": dict(prepared.findings)}
    for name, content in about.items():
        write(tmp_path / "run" / f"{name}.json", content)
    page = suanli.report(tmp_path / "run").read_text(encoding="utf-8")
    for words in ("Sizes of objects", "side at the training size, px", "1 box without an area, left out: flat.png"):
        assert words in page


def test_no_boxes_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no boxes at all"):
        suanli.prepare(write_voc(tmp_path / "data", {"a": ("", png(np.zeros((8, 8, 3), np.uint8)))}))


def test_real_blood_cells_and_cards(shared_data: Path) -> None:
    from suanli.core.types import Columns
    from suanli.data.readers import archive

    for file, counts, boxes in (
        ("bccd_voc.zip", {"train": 205, "val": 87, "test": 72}, 4888),
        ("playing_cards_voc.zip", {"train": 74, "test": 67}, 274),
    ):
        source = archive.read(shared_data / file, Columns())
        assert {s: sum(row.split == s for row in source.examples) for s in counts} == counts
        assert sum(len(row.target.boxes) for row in source.examples) == boxes
