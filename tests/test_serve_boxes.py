"""A detector behind every door: the server's answers are those of `suanli predict` on the same images, in the pixels of
the image that was sent."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import browser as chromium
import suanli
from browser import Browser
from other_tasks import colors_engines, register
from served import Served, serving
from suanli.core.errors import pip_install

COLORS = ((220, 20, 20), (20, 220, 20), (20, 20, 220))
INFER = "/v2/models/colors/infer"
NAMES = ("red", "green", "blue")


def paint(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Boxes of left, top, right, bottom: the first is red, the second green, the third blue."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    for (left, top, right, bottom), color in zip(boxes, COLORS, strict=False):
        pixels[top:bottom, left:right] = color
    return pixels


def jpeg(pixels: np.ndarray, orientation: int = 1) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling=0, exif=exif)
    return stream.getvalue()


BOXES = ((20, 10, 60, 40), (80, 60, 120, 110), (130, 10, 150, 30))
UPRIGHT = paint(120, 160, *BOXES)
FILES = {  # of different sizes, one rotated by EXIF, one without any object
    "wide.jpg": jpeg(UPRIGHT),
    "turned.jpg": jpeg(np.ascontiguousarray(np.rot90(UPRIGHT)), 6),
    "large.jpg": jpeg(paint(300, 260, (100, 40, 200, 220))),
    "empty.jpg": jpeg(paint(50, 90)),
}
CUT = FILES["wide.jpg"][:900]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with register() as environment:
        folder = colors_engines(tmp_path_factory.mktemp("models") / "colors")
        (folder / "environment.json").write_text(json.dumps(environment))
        yield folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    environment = json.loads((model / "environment.json").read_text())
    with serving(model, "--grpc-port", "0", environment=environment) as result:
        yield result


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, content in FILES.items():
        (tmp_path / "images" / name).write_bytes(content)
    return tmp_path / "images"


def tensors_of(answers: list[suanli.Prediction]) -> list[dict[str, list[Any]]]:
    """What clients get of each answer, up to the rows that are none."""
    return [
        {
            "det_boxes": [box["box"] for box in answer.values["boxes"]],
            "det_scores": [box["probability"] for box in answer.values["boxes"]],
            "det_classes": [NAMES.index(box["label"]) for box in answer.values["boxes"]],
        }
        for answer in answers
    ]


def check(outputs: dict[str, np.ndarray], answers: list[suanli.Prediction]) -> None:
    assert outputs["num_dets"].shape == (len(answers), 1)
    assert outputs["num_dets"].dtype == outputs["det_classes"].dtype == np.int32
    for i, wanted in enumerate(tensors_of(answers)):
        count = int(outputs["num_dets"][i, 0])
        assert count == len(wanted["det_boxes"])
        for name, values in wanted.items():
            assert outputs[name][i, :count] == pytest.approx(
                np.reshape(values, outputs[name][i, :count].shape), abs=0.02
            )
            assert not outputs[name][i, count:].any()


def test_predict_finds_the_boxes_where_they_are(model: Path, images: Path) -> None:
    found = {p.name: p for p in suanli.predict(model, images, threshold=0)}
    for name in ("wide.jpg", "turned.jpg"):
        boxes = {box["label"]: box["box"] for box in found[name].values["boxes"]}
        for label, box in zip(NAMES, BOXES, strict=True):
            assert boxes[label] == pytest.approx(box, abs=3)
    assert found["empty.jpg"].values["boxes"] == []
    shown = suanli.predict(model, images / "wide.jpg")[0]
    assert [box["label"] for box in shown.values["boxes"]] == ["red", "green"]  # from 0.6
    assert [box["label"] for box in suanli.predict(model, images / "wide.jpg", top=1)[0].values["boxes"]] == ["red"]
    assert suanli.load(model).predict(images / "wide.jpg", threshold=0.4)[0].values["count"] == 3


def test_files_over_http(server: Served, model: Path, images: Path) -> None:
    """Several of different sizes in one request, as binary tensors; and one as the raw body."""
    here = suanli.predict(model, sorted(images.iterdir()), threshold=0)
    data = b"".join(len(c).to_bytes(4, "little") + c for c in (path.read_bytes() for path in sorted(images.iterdir())))
    image = {"name": "image", "datatype": "BYTES", "shape": [len(FILES)], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [image]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = server.ask("POST", INFER, head + data, headers)
    assert answer.status == 200, answer.body
    check(read_json(answer.json()), here)
    answer = server.ask("POST", INFER, FILES["turned.jpg"], {"Inference-Header-Content-Length": "0"})
    assert answer.status == 200, answer.body
    length = int(answer.headers["inference-header-content-length"])
    outputs, rest = {}, answer.body[length:]
    for one in json.loads(answer.body[:length])["outputs"]:
        part, rest = (rest[: (size := one["parameters"]["binary_data_size"])], rest[size:])
        if one["datatype"] != "BYTES":
            outputs[one["name"]] = np.frombuffer(part, {"INT32": "<i4", "FP32": "<f4"}[one["datatype"]]).reshape(
                one["shape"]
            )
    check(outputs, suanli.predict(model, images / "turned.jpg", threshold=0))


def read_json(answer: dict[str, Any]) -> dict[str, np.ndarray]:
    kinds = {"INT32": np.int32, "FP32": np.float32}
    return {
        one["name"]: np.array(one["data"], kinds[one["datatype"]]).reshape(one["shape"])
        for one in answer["outputs"]
        if one["datatype"] != "BYTES"
    }


def test_tensors_over_http(server: Served, model: Path) -> None:
    """Pixels of another size are resized, and boxes are in them; those of the model's size are what the model sees."""
    for pixels in (UPRIGHT, paint(64, 64, (10, 20, 30, 40))):
        image = {"name": "image", "datatype": "UINT8", "shape": [1, *pixels.shape], "data": pixels.ravel().tolist()}
        answer = server.ask("POST", INFER, json.dumps({"inputs": [image]}))
        assert answer.status == 200, answer.body
        here = suanli.predict(model, pixels, threshold=0)
        check(read_json(answer.json()), here)
        (text,) = next(one["data"] for one in answer.json()["outputs"] if one["name"] == "answer")
        assert json.loads(text)["boxes"] == suanli.predict(model, pixels)[0].values["boxes"]
    assert here[0].values["boxes"][0]["box"] == [10, 20, 30, 40]


def test_boxes_have_no_entries_with_names(server: Served) -> None:
    image = {"name": "image", "datatype": "UINT8", "shape": [1, 64, 64, 3], "data": [128] * (64 * 64 * 3)}
    for name in ("det_classes", "det_scores"):
        outputs = [{"name": name, "parameters": {"classification": 3}}]
        answer = server.ask("POST", INFER, json.dumps({"inputs": [image], "outputs": outputs}))
        assert (answer.status, "no names" in answer.json()["error"]) == (400, True)


def test_files_over_grpc(server: Served, model: Path, images: Path) -> None:
    client = pytest.importorskip("tritonclient.grpc", reason=f"needs: {pip_install('suanli[test]')}")
    contents = [path.read_bytes() for path in sorted(images.iterdir())]
    with client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as connection:
        image = client.InferInput("image", [len(contents)], "BYTES")
        image.set_data_from_numpy(np.array(contents, object))
        answer = connection.infer("colors", [image])
    names = ("num_dets", "det_boxes", "det_scores", "det_classes")
    check({name: answer.as_numpy(name) for name in names}, suanli.predict(model, sorted(images.iterdir()), threshold=0))
    assert json.loads(answer.as_numpy("answer")[0])["count"] == 0  # empty.jpg


def test_an_image_that_is_cut_short_among_good_ones(server: Served, model: Path, images: Path) -> None:
    (images / "cut.jpg").write_bytes(CUT)
    here = suanli.predict(model, images, threshold=0.1)
    there = suanli.predict(None, images, url=server.url, threshold=0.1)
    assert there == here
    assert [one.name for one in here if one.error] == ["cut.jpg"]
    data = len(CUT).to_bytes(4, "little") + CUT
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [image]}).encode()
    answer = server.ask("POST", INFER, head + data, {"Inference-Header-Content-Length": str(len(head))})
    assert (answer.status, "Input 0 can't be read" in answer.json()["error"]) == (400, True)


def test_predict_takes_a_threshold_and_all_boxes(server: Served) -> None:
    def boxes(query: str) -> Any:
        answer = server.ask("POST", f"/predict?{query}", FILES["wide.jpg"], {"Content-Type": "image/jpeg"})
        if answer.status != 200:
            return answer.status, answer.json()["error"]
        return [box["label"] for box in answer.json()["predictions"][0]["boxes"]]

    assert boxes("") == ["red", "green"]
    assert boxes("threshold=0.1") == [*NAMES]
    assert boxes("threshold=0.1&top=1") == ["red"]
    assert boxes("threshold=1") == []
    for wrong in ("2", "-0.1", "nan", "x"):
        assert boxes(f"threshold={wrong}") == (400, "threshold must be a number from 0 to 1.")
    assert server.ask("GET", "/status").json()["models"][0]["answer"]["threshold"] == 0.6


def test_what_is_written_is_the_same_here_and_from_a_server(server: Served, model: Path, images: Path) -> None:
    for options in ({}, {"url": server.url}):
        folder = images.parent / f"drawn{len(options)}"
        suanli.predict(None if options else model, images, draw=folder, **options)
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (images.parent / "drawn0" / name).read_bytes() == (images.parent / "drawn1" / name).read_bytes()


def test_a_threshold_that_the_task_cannot_have(model: Path, images: Path) -> None:
    with pytest.raises(suanli.UsageError, match="no probability"):
        suanli.predict(model, images, threshold=1.5)


GUIDE = Path(__file__).parents[1] / "docs" / "detection.md"


def test_the_lines_of_the_guide(
    server: Served,
    model: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In Python, for supervision where it is installed, and for Triton's client."""
    _, guide = GUIDE.read_text(encoding="utf-8").split("## Predict")
    here, supervision, served = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (images / "wide.jpg").rename(images / "image.jpg")
    monkeypatch.chdir(images)
    names: dict[str, Any] = {}
    exec(here.replace("runs/cells-1", str(model)), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["red", "green"]
    if importlib.util.find_spec("supervision") is not None:
        exec(supervision, names)
        assert names["detections"].class_id.tolist() == [0, 1]
    pytest.importorskip("tritonclient.http", reason=f"needs: {pip_install('suanli[test]')}")
    monkeypatch.setattr(sys, "argv", ["client", f"{server.host}:{server.port}", "image.jpg", "colors"])
    exec(served, {})
    rows = [[float(number) for number in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert [row[1:] for row in rows[:2]] == [
        pytest.approx([float(number) for number in line.split()[2:]], abs=0.02) for line in lines
    ]
    assert len(rows) == 3  # also the one below the threshold


SLIDE = "const t = document.getElementById('threshold'); t.value = arguments[0]; t.dispatchEvent(new Event('input'))"
SHOWN = "return [...document.querySelectorAll('.batch:first-child .box')].map((e) => e.innerText.split(' ')[0])"


@pytest.mark.skipif(chromium.WHY_NOT is not None, reason=str(chromium.WHY_NOT))
def test_the_page_shows_boxes_from_a_threshold(server: Served, images: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as page:
        for width in (1400, 360):
            page.size(width, 900)
            page.go(f"{server.url}/")
            page.until("document.getElementById('threshold-value').textContent.startsWith('60.00')")
            page.write("#files", str(images / "turned.jpg"))
            page.until("document.querySelectorAll('.batch:first-child .box').length === 2")
            assert page.text(".batch .label") == "1 red, 1 green"
            image, box = page.run(
                "return [...document.querySelectorAll('.batch:first-child :is(img, .box)')].slice(0, 2)"
                ".map((e) => e.getBoundingClientRect().toJSON())"
            )
            scale = image["width"] / 160
            place = [(box["left"] - image["left"]) / scale, (box["top"] - image["top"]) / scale]
            assert place == pytest.approx(BOXES[0][:2], abs=3)
            page.run(SLIDE, 0.4)
            assert page.run(SHOWN) == [*NAMES]
            page.run(SLIDE, 0.8)
            assert page.run(SHOWN) == ["red"]
            page.run(SLIDE, 1)
            assert (page.run(SHOWN), page.text(".batch .label")) == ([], "Nothing found")
            assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.messages() == []
