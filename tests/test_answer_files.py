"""Files of answers: their names, what they replace, the ids of an annotation file, and how answers are drawn."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from other_tasks import colors_engines, register
from suanli.cli import main
from suanli.core.answers import Answer
from suanli.core.boxes import place
from suanli.core.errors import DataError, UsageError
from suanli.core.schema import Geometry
from suanli.data.drawing import COLORS, color_of, draw_answer
from suanli.data.preprocess.image import ImagePreprocess
from suanli.data.preprocess.text import TextPreprocess
from suanli.data.source import find_source
from suanli.engines.answer_format import FileNames, check_file, check_folder
from suanli.engines.answer_formats.coco import lines as coco_lines
from suanli.engines.predictor import Prediction

BOX = {"label": "cat", "box": [10.0, 20.0, 40.0, 60.0], "probability": 0.5}
ANSWER = Answer(kind="boxes", text="1 cat", values={"boxes": [BOX]})


def test_names_of_files() -> None:
    names = FileNames()
    given_names = ["a/1.jpg", "b/1.jpg", "/x/1.jpg", "/y/1.jpg", "../1.jpg", "a/1.JPG", "-", "#3", "日本/ねこ.png"]
    assert [str(names.take(name, ".txt")) for name in given_names] == [
        "a/1.txt",
        "b/1.txt",
        "1.txt",
        "1-2.txt",
        "1-3.txt",
        "a/1-2.txt",
        "input.txt",
        "3.txt",
        "日本/ねこ.txt",
    ]
    assert str(names.take("x.jpg/y.png", ".jpg")) == "x-jpg/y.jpg"  # x.jpg may be an image, too


@given(st.lists(st.text(min_size=1), max_size=6))
def test_any_name_gives_a_file_of_its_own_below_the_folder(given_names: list[str]) -> None:
    names = FileNames()
    taken = [names.take(name, ".txt") for name in given_names]
    assert len({str(path).casefold() for path in taken}) == len(given_names)
    for path in taken:
        assert not path.is_absolute()
        assert not {"..", "."} & set(path.parts)
        assert all(part[0] != "." and len(part.encode(errors="replace")) < 256 for part in path.parts)


def test_no_file_of_the_user_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="isn't empty"):
        check_folder(tmp_path, "elsewhere")
    with pytest.raises(UsageError, match="is no folder"):
        check_folder(tmp_path / "mine.jpg", "elsewhere")
    with pytest.raises(UsageError, match="inside of the inputs"):
        check_folder(tmp_path / "new", ["elsewhere", str(tmp_path)])
    with pytest.raises(UsageError, match=r"mine\.jpg exists"):
        check_file(tmp_path / "mine.jpg")
    (tmp_path / "empty").mkdir()
    assert check_folder(tmp_path / "empty", "elsewhere") == tmp_path / "empty"
    assert (
        check_folder(tmp_path / "new", [b"bytes", "a\0b", "x" * 9999, str(tmp_path / "mine.jpg")]) == tmp_path / "new"
    )


# --- COCO -----------------------------------------------------------------------------------


def entries(predictions: list[Prediction], annotations: Path | None) -> list[dict]:
    return json.loads("\n".join(coco_lines(predictions, ["cat"], annotations)))


def named(*names: str) -> list[Prediction]:
    return [Prediction(name=name, answer=ANSWER, empty=ANSWER) for name in names]


def write_annotations(file: Path, names: list[str], categories: list[dict]) -> Path:
    images = [{"file_name": name, "id": 100 + i} for i, name in enumerate(names)]
    file.write_text(json.dumps({"images": images, "categories": categories}))
    return file


def test_the_ids_of_an_annotation_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    categories = [{"id": 17, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 18, "name": "cat"}]
    file = write_annotations(tmp_path / "a.json", ["val/1.jpg", "train/1.jpg", "2.jpg"], categories)
    found = entries(named("/data/val/1.jpg", "images/2.jpg", "train/1.jpg", "1.jpg", "new.jpg"), file)
    assert [(one["image_id"], one["file_name"]) for one in found] == [
        (100, "/data/val/1.jpg"),
        (102, "images/2.jpg"),
        (101, "train/1.jpg"),
    ]
    assert found[0] == {
        "image_id": 100,
        "category_id": 17,
        "bbox": [10.0, 20.0, 30.0, 40.0],
        "score": 0.5,
        "file_name": "/data/val/1.jpg",
    }
    warnings = capsys.readouterr().err
    assert all(f"{name} is not in the annotations" in warnings for name in ("1.jpg", "new.jpg"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no COCO annotation file"),
        (b"[1, 2]", "no COCO annotation file"),
        (b'{"images": [{"file_name": 3, "id": 1}], "categories": []}', "of another type"),
        (b'{"images": [], "categories": [{"id": 1, "name": "dog"}]}', "no category 'cat'"),
        (b"[" * 100_000, "no COCO annotation file"),
    ],
)
def test_a_file_without_the_ids(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        entries(named("1.jpg"), tmp_path / "a.json")
    with pytest.raises(DataError, match="can't be read"):
        entries(named("1.jpg"), tmp_path / "none.json")


def test_pycocotools_reads_the_results(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pip install pycocotools==2.0.11")
    from pycocotools.cocoeval import COCOeval

    file = write_annotations(tmp_path / "a.json", ["1.jpg", "2.jpg"], [{"id": 17, "name": "cat"}])
    left, top, right, bottom = BOX["box"]
    box = [left, top, right - left, bottom - top]
    boxes = [{"id": i, "image_id": 99 + i, "category_id": 17, "bbox": box, "area": 1200, "iscrowd": 0} for i in (1, 2)]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": boxes}))
    (tmp_path / "results.json").write_text("\n".join(coco_lines(named("1.jpg", "2.jpg"), ["cat"], file)))
    truth = coco.COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


# --- drawing --------------------------------------------------------------------------------


def test_lines_are_where_the_box_is_and_can_be_seen_on_any_ground() -> None:
    for level in (0, 128, 255):
        pixels = np.full((300, 400, 3), level, np.uint8)
        drawn = np.asarray(draw_answer(pixels, ANSWER, ["dog", "cat"])).astype(int)
        assert drawn.shape == (300, 400, 3)
        for y, x in ((40, 10), (40, 39), (59, 25)):  # left, right, bottom; the name is above
            assert tuple(drawn[y, x]) == COLORS[1]
            assert np.abs(drawn[y, x] - level).max() > 60
        assert (drawn[25:55, 15:35] == level).all()
    grey = np.full((300, 400, 1), 128, np.uint8)
    assert np.asarray(draw_answer(grey, ANSWER, ["cat"])).shape == (300, 400, 3)


def test_lines_grow_with_the_image() -> None:
    def line(side: int) -> int:
        answer = Answer(kind="boxes", text="", values={"boxes": [{**BOX, "box": [0.3 * side] * 2 + [0.7 * side] * 2}]})
        drawn = np.asarray(draw_answer(np.zeros((side, side, 3), np.uint8), answer, ["cat"]))
        return int((drawn[side // 2, side // 2 :] == COLORS[0]).all(1).sum())

    assert [line(side) for side in (60, 600, 3000)] == [1, 2, 10]


@pytest.mark.parametrize(
    "box", [[0, 0, 0.2, 0.2], [99.9, 49.9, 100, 50], [0, 0, 100, 50], [50, 20, 50, 20], [-9, -9, 200, 200]]
)
def test_boxes_at_the_edges_and_of_less_than_a_pixel(box: list[float]) -> None:
    answer = Answer(kind="boxes", text="", values={"boxes": [{**BOX, "box": box, "label": "x" * 300}]})
    drawn = np.asarray(draw_answer(np.zeros((50, 100, 3), np.uint8), answer, ["cat"]))
    assert (drawn != 0).any()


def test_names_in_any_script_and_other_answers() -> None:
    for label in ("汽车", "ねこ", "Straße", "\u0001", "a\nb", "\ufffe"):
        answer = Answer(kind="boxes", text="", values={"boxes": [{**BOX, "label": label}]})
        assert (np.asarray(draw_answer(np.zeros((90, 90, 3), np.uint8), answer, [label])) != 0).any()
    caption = Answer(kind="classes", text="cat 98.0%", values={"label": "cat"})
    drawn = np.asarray(draw_answer(np.zeros((90, 200, 3), np.uint8), caption, ["cat"]))
    assert tuple(drawn[0, 0]) == COLORS[0]
    assert not drawn[-1].any()


def test_classes_have_colours_of_their_own() -> None:
    colors = [color_of(i) for i in range(3 * len(COLORS))]
    assert len(set(colors)) == len(colors)


def test_a_drawn_image_is_upright_and_in_its_own_size() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(stream, "JPEG", exif=exif)
    drawn = ImagePreprocess.draw(stream.getvalue(), ANSWER, ["cat"])
    with Image.open(io.BytesIO(drawn.content)) as image:
        assert (drawn.media_type, image.size, image.getexif().get(0x0112)) == ("image/jpeg", (40, 100), None)
    assert ImagePreprocess.size_of(stream.getvalue()) == (100, 40)
    with pytest.raises(UsageError, match="text can't be drawn"):
        TextPreprocess.draw("a", ANSWER, ["cat"])


def test_every_kind_of_image_is_drawn_on() -> None:
    colour = Image.fromarray(np.full((80, 90, 3), 120, np.uint8))
    for mode, kind in (("L", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "BMP")):
        stream = io.BytesIO()
        (Image.new(mode, (90, 80), 500) if mode == "I;16" else colour.convert(mode)).save(stream, kind)
        with Image.open(io.BytesIO(ImagePreprocess.draw(stream.getvalue(), ANSWER, ["cat"]).content)) as image:
            assert (image.mode, image.size) == ("RGB", (90, 80))


# --- the command line -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A detector of red, green and blue boxes."""
    with register():
        yield colors_engines(tmp_path_factory.mktemp("models") / "colors")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, left in (("a/1.png", 10), ("b/1.png", 40)):
        pixels = np.full((64, 64, 3), 128, np.uint8)
        pixels[20:50, left : left + 20] = (220, 20, 20)
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    return Path("images")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["predict", *map(str, arguments)])
    return int(end.value.code or 0), *capsys.readouterr()


def test_formats_on_the_command_line(model: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = call(capsys, model, images, "--format", "coco", "--draw", "drawn")
    assert (code, [one["bbox"] for one in json.loads(printed)]) == (0, [[10, 20, 20, 30], [40, 20, 20, 30]])
    assert sorted(str(path) for path in Path("drawn").rglob("*.png")) == ["drawn/a/1.png", "drawn/b/1.png"]
    before = {path: path.read_bytes() for path in Path().rglob("*.png")}
    assert call(capsys, model, images, "--format", "csv") == call(capsys, model, images, "--csv")
    code, printed, _ = call(
        capsys, model, images, "--format", "jsonl", "--out", "all.jsonl", "--json", "--threshold", 1
    )
    assert json.loads(printed) | {"seconds": 0} == {
        "model": str(model),
        "format": "jsonl",
        "out": "all.jsonl",
        "count": 2,
        "errors": [
            {"name": "bad.png", "error": "Not an image that suanli can read: it is text that starts with 'no image'."}
        ],
        "seconds": 0,
    }
    assert [json.loads(line).get("count") for line in Path("all.jsonl").read_text().splitlines()] == [0, 0, None]
    for wrong, message in (
        (["--format", "yolo"], "Name a folder for them: --out FOLDER"),
        (["--format", "voc"], "Unknown answer format 'voc'"),
        (["--format", "coco", "--json"], "exclude each other"),
        (["--format", "coco", "--csv"], "exclude each other"),
        (["--format", "csv", "--annotations", "x.json"], "can't be used with --format csv"),
        (["--out", "x"], "without --features or --format"),
        (["--features", "--format", "coco"], "--format can't be used with --features"),
        (["--draw", "images"], "isn't empty"),
        (["--draw", "images/drawn"], "inside of the inputs"),
        (["--format", "jsonl", "--out", "all.jsonl"], "all.jsonl exists"),
        (["--threshold", "2"], "less than or equal to 1"),
    ):
        code, _, said = call(capsys, model, images, *wrong)
        assert (code, message in said) == (2, True), said
    assert {path: path.read_bytes() for path in Path().rglob("*.png")} == before
    assert call(capsys, model, "images/bad.png", "--format", "yolo", "--out", "none")[0] == 3


def test_answers_as_yolo_are_a_data_set(model: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "bad.png").unlink()
    assert call(capsys, model, images, "--format", "yolo", "--out", "set")[0] == 0
    shutil.copytree(images, Path("set/images"))
    source = find_source("set", data_dir=Path("none"))
    assert (source.annotation, source.classes) == ("boxes", ("red", "green", "blue"))
    for example, left in zip(source.examples, (10, 40), strict=True):
        (corners,) = place(example.target, Geometry.unchanged((64, 64))).corners.tolist()
        assert corners == pytest.approx([left, 20, left + 20, 50], abs=1e-3)
        assert [box.label for box in example.target.boxes] == ["red"]
