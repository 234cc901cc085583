"""Tasks and kinds of data other than those that are shipped, served and predicted: several inputs and outputs."""

from __future__ import annotations

import json
import os
import subprocess
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
from other_tasks import READ_METER, meter_engines, register, spots_engines
from served import Served, serving
from short_timing import time_shortly
from suanli.core.errors import pip_install
from suanli.engines.answer_formats.csv import lines as csv_lines
from wire import file_of

ONE = "assert len(inputs['place']) == 1; levels, place ="  # an engine that takes one example at a time
METER, CELLS = "/v2/models/meter", "/v2/models/cells"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with register() as result:
        yield result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:  # noqa: ARG001
    place = tmp_path_factory.mktemp("models")
    meter_engines(place / "meter")
    meter_engines(place / "single", answer=READ_METER.replace("levels, place =", ONE), batches=False)
    spots_engines(place / "cells")
    return place


@pytest.fixture(scope="module")
def server(models: Path, environment: dict[str, str]) -> Iterator[Served]:
    with serving(models, "--grpc-port", "0", environment=environment) as result:
        yield result


def picture(height: int = 20, width: int = 40) -> np.ndarray:
    """Grey, with a bright spot from (4, 2) to (12, 6), x first, and a dark one from (30, 10) to (36, 18)."""
    pixels = np.full((height, width), 128, np.uint8)
    pixels[2:6, 4:12], pixels[10:18, 30:36] = 255, 0
    return pixels


def tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def infer(server: Served, path: str, *inputs: dict[str, Any], outputs: Any = ()) -> dict[str, Any]:
    body = {"inputs": inputs, "outputs": list(outputs)}
    answer = server.ask("POST", f"{path}/infer", json.dumps(body))
    assert answer.status == 200, answer.body
    return {output["name"]: output for output in answer.json()["outputs"]}


LEVELS = tensor("levels", "FP32", [2, 2], [1000.0, 1.0, 10.0, 10.0])
PLACE_21 = tensor("place", "INT64", [1], [21])
PLACE = tensor("place", "INT64", [2], [0, 2])


def test_metadata_and_configuration_name_every_tensor(server: Served) -> None:
    about = server.ask("GET", METER).json()
    assert about["inputs"] == [
        {"name": "levels", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "place", "datatype": "INT64", "shape": [-1]},
    ]
    assert about["outputs"] == [
        {"name": "loss", "datatype": "FP32", "shape": [-1]},
        {"name": "place", "datatype": "INT64", "shape": [-1]},
        {"name": "answer", "datatype": "BYTES", "shape": [-1]},
    ]
    config = server.ask("GET", f"{METER}/config").json()
    assert [(one["name"], one["data_type"], one["dims"]) for one in config["input"]] == [
        ("levels", "TYPE_FP32", [2]),
        ("place", "TYPE_INT64", [1]),
    ]
    about = server.ask("GET", CELLS).json()
    assert about["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 20, 20, 1]}]
    assert [(one["name"], one["shape"]) for one in about["outputs"]] == [
        ("boxes", [-1, 3, 4]),
        ("scores", [-1, 3, 2]),
        ("count", [-1]),
        ("answer", [-1]),
    ]


@pytest.mark.parametrize("inputs", [(LEVELS, PLACE), (PLACE, LEVELS)])
def test_several_inputs_in_any_order(server: Served, inputs: tuple[dict[str, Any], ...]) -> None:
    outputs = infer(server, METER, *inputs)
    assert outputs["loss"]["data"] == pytest.approx([30, 2])
    assert outputs["place"]["data"] == [0, -(2**41)]
    answers = [json.loads(text) for text in outputs["answer"]["data"]]
    assert answers == [{"loss": pytest.approx(30), "unit": "dB"}, {"loss": pytest.approx(2), "unit": "dB"}]
    (only,) = infer(server, METER, *inputs, outputs=[{"name": "place"}]).values()
    assert (only["datatype"], only["shape"]) == ("INT64", [2])


def test_an_engine_that_takes_one_example_at_a_time(server: Served, models: Path, tmp_path: Path) -> None:
    assert infer(server, "/v2/models/single", LEVELS, PLACE)["loss"]["data"] == pytest.approx([30, 2])
    np.save(tmp_path / "levels.npy", np.array([[1000.0, 1, 2], [1, 1, 0]]))
    here = suanli.predict(models / "single", tmp_path / "levels.npy")
    assert [one.values["loss"] for one in here] == pytest.approx([32, 0])


def test_several_inputs_over_grpc(server: Served) -> None:
    client = pytest.importorskip("tritonclient.grpc", reason=f"needs: {pip_install('suanli[test]')}")
    with client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as connection:
        levels = client.InferInput("levels", [70, 2], "FP32")  # more than a batch
        levels.set_data_from_numpy(np.tile(np.float32([[100, 1]]), (70, 1)))
        place = client.InferInput("place", [70], "INT64")
        place.set_data_from_numpy(np.arange(70) % 3)
        answer = connection.infer("meter", [place, levels])
    np.testing.assert_allclose(answer.as_numpy("loss"), 20 + np.arange(70) % 3, rtol=1e-6)
    assert json.loads(answer.as_numpy("answer")[1])["loss"] == pytest.approx(21)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([LEVELS], "has the inputs 'levels', 'place'; the request has 'levels'"),
        ([LEVELS, tensor("room", "INT64", [2], [0, 0])], "the request has 'levels, room'"),
        ([LEVELS, tensor("place", "INT64", [1], [0])], "different numbers of examples: 'levels' 2, 'place' 1"),
        ([LEVELS, tensor("place", "INT32", [2], [0, 0])], "'place' must be INT64 [-1], not INT32 [2]"),
        ([LEVELS, tensor("place", "INT64", [2, 1], [0, 0])], "'place' must be INT64 [-1], not INT64 [2, 1]"),
        ([LEVELS, tensor("place", "BYTES", [2], ["0", "0"])], "'place' must be INT64 [-1], not BYTES [2]"),
        ([LEVELS, tensor("place", "INT64", [2], [0, 3])], "not from 0 to 2"),
        ([LEVELS, tensor("place", "INT64", [2], [-1, 0])], "not from 0 to 2"),
        ([tensor("meter", "BYTES", [1], ["x"])], "the request has 'meter'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(server: Served, inputs: list[dict[str, Any]], reason: str) -> None:
    answer = server.ask("POST", f"{METER}/infer", json.dumps({"inputs": inputs}))
    assert answer.status == 400
    assert reason in answer.json()["error"]


def test_outputs_that_do_not_fit_are_refused(server: Served) -> None:
    outputs = [{"name": "loss", "parameters": {"classification": 1}}]
    answer = server.ask("POST", f"{METER}/infer", json.dumps({"inputs": [LEVELS, PLACE], "outputs": outputs}))
    assert (answer.status, "no names" in answer.json()["error"]) == (400, True)
    answer = server.ask("POST", f"{METER}/infer", json.dumps({"inputs": [LEVELS, PLACE], "outputs": [{"name": "x"}]}))
    assert "has the outputs 'loss', 'place' and 'answer', not 'x'" in answer.json()["error"]


def test_an_answer_that_is_not_finite_is_an_error(server: Served) -> None:
    inputs = [tensor("levels", "FP32", [1, 2], [0.0, 0.0]), tensor("place", "INT64", [1], [0])]
    answer = server.ask("POST", f"{METER}/infer", json.dumps({"inputs": inputs}))
    assert (answer.status, "not a number" in answer.json()["error"]) == (500, True)
    assert infer(server, METER, LEVELS, PLACE)


def test_what_takes_no_file_is_refused_as_one(server: Served) -> None:
    for media_type in ("", "application/octet-stream", "image/png", "text/plain", "application/json"):
        body = b'{"inputs": ["a"]}'
        assert server.ask("POST", "/predict?model=meter", body, {"Content-Type": media_type}).status == 415


def test_boxes_are_in_the_coordinates_of_the_picture(server: Served, models: Path, tmp_path: Path) -> None:
    """Its picture is scaled to half and padded at the top and the bottom."""
    content = file_of(picture())
    answer = server.ask("POST", "/predict?model=cells", content, {"Content-Type": "image/png"}).json()
    assert answer["texts"] == ["bright, dark"]
    (result,) = answer["predictions"]
    assert result.keys() == {"name", "boxes", "count", "error"}
    assert [box["label"] for box in result["boxes"]] == ["bright", "dark"]
    np.testing.assert_allclose([box["box"] for box in result["boxes"]], [[4, 2, 12, 6], [30, 10, 36, 18]], atol=2)
    outputs = infer(server, CELLS, tensor("image", "UINT8", [1, 20, 40, 1], picture().ravel().tolist()))
    assert json.loads(outputs["answer"]["data"][0])["boxes"] == result["boxes"]
    (tmp_path / "spots.png").write_bytes(content)
    (here,) = suanli.predict(models / "cells", tmp_path / "spots.png")
    assert here.values["boxes"] == result["boxes"]
    assert (here.label, here.probability, here.probabilities) == (None, None, {})


def test_boxes_of_an_encoded_picture_are_in_its_own_coordinates(server: Served) -> None:
    outputs = infer(server, CELLS, tensor("image", "UINT8", [1, 20, 20, 1], picture(20, 20).ravel().tolist()))
    assert outputs["boxes"]["data"][:4] == [4, 2, 12, 6]
    (box,) = json.loads(outputs["answer"]["data"][0])["boxes"]
    assert (box["box"], outputs["count"]["data"]) == ([4, 2, 12, 6], [1])


def test_classification_of_any_output_with_names(server: Served) -> None:
    outputs = [{"name": "scores", "parameters": {"classification": 9}}]
    image = tensor("image", "UINT8", [1, 20, 20, 1], picture(20, 20).ravel().tolist())
    (scores,) = infer(server, CELLS, image, outputs=outputs).values()
    assert scores["shape"] == [1, 3, 2]
    assert scores["data"][:4] == ["0.900000:0:bright", "0.000000:1:dark", "0.000000:0:bright", "0.000000:1:dark"]


def test_a_server_and_this_machine_give_the_same_table(server: Served, models: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_of(picture()))
    (tmp_path / "b.png").write_bytes(b"no picture")
    here = suanli.predict(models / "cells", tmp_path)
    there = suanli.predict(None, tmp_path, url=f"{server.url}{CELLS}")
    assert there == here
    assert [*csv_lines(here)][:3] == [
        "name,label,probability,left,top,right,bottom,error",
        "a.png,bright,0.900000,4,2,12,6,",
        "a.png,dark,0.700000,30,10,36,18,",
    ]
    assert here[1].to_json() == {"name": "b.png", "boxes": [], "count": None, "error": here[1].error}
    np.save(tmp_path / "levels.npy", np.array([[1000, 1, 2], [1.0, 1.0, 0.0]]))
    assert [*csv_lines(suanli.predict(models / "meter", tmp_path / "levels.npy"))] == [
        "name,loss,unit,error",
        "levels.npy[0],32,dB,",
        "levels.npy[1],0,dB,",
    ]


def test_tensors_of_any_size_are_not_served(tmp_path: Path, environment: dict[str, str]) -> None:
    subject = meter_engines(tmp_path / "meter", length=None)
    command = [sys.executable, "-m", "suanli", "serve", str(subject), "--port", "0"]
    own = os.environ | environment | {"COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=own)
    assert done.returncode == 4, done.stderr
    assert "levels (?,)" in done.stderr


GRAPH = """<ir_version: 10, opset_import: ["": 18]>
    two (float[batch, 3] levels, int64[batch] place) => (float[batch, 3] squares, int64[batch] twice) {
        squares = Mul(levels, levels)
        twice = Add(place, place)
    }"""


def test_a_graph_of_tensors_is_predicted_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = pytest.importorskip("onnx.parser", reason=f"needs: {pip_install('suanli[engines]')}")
    time_shortly(monkeypatch)
    (tmp_path / "two.onnx").write_bytes(parser.parse_model(GRAPH).SerializeToString())
    suanli.optimize(tmp_path / "two.onnx", engines="onnxruntime", out=tmp_path / "two")
    np.savez(tmp_path / "in.npz", levels=np.float32([1, 2, 3]), place=np.int64(21))
    (here,) = suanli.predict(tmp_path / "two", tmp_path / "in.npz")
    assert here.values["outputs"] == {
        "squares": {"shape": [3], "dtype": "float32", "first": [1, 4, 9]},
        "twice": {"shape": [], "dtype": "int64", "first": [42]},
    }
    engine = suanli.load(tmp_path / "two")
    assert engine.predict({"levels": np.float32([1, 2, 3]), "place": np.int64(21)})[0].values == here.values
    with serving(tmp_path / "two") as server:
        assert suanli.predict(None, tmp_path / "in.npz", url=server.url)[0].values == here.values
        outputs = infer(server, "/v2/models/two", tensor("levels", "FP32", [1, 3], [1, 2, 3]), PLACE_21)
        assert {name: output["data"] for name, output in outputs.items()} == {"squares": [1, 4, 9], "twice": [42]}
        content = (tmp_path / "in.npz").read_bytes()
        answer = server.ask("POST", "/predict", content, {"Content-Type": "application/octet-stream"})
        assert answer.json()["predictions"][0]["outputs"]["twice"]["first"] == [42]


# --- the page ---


SHOW = """
const [kind, text, values] = arguments;
return import("/page/answers.js").then(({Batch, Item, Result}) => {
  const batch = new Batch();
  batch.show([new Item({name: null, text: "input"})], {results: [new Result(kind, text, {error: null, ...values})]});
  document.getElementById("list").replaceChildren(batch.root);
  return batch.root.querySelector(".item > div").innerText;
});
"""


@pytest.mark.skipif(chromium.WHY_NOT is not None, reason=str(chromium.WHY_NOT))
def test_the_page_draws_an_answer_by_its_kind(server: Served, tmp_path: Path) -> None:
    pixels = np.asarray(Image.fromarray(picture()).resize((400, 200), Image.Resampling.NEAREST))
    (tmp_path / "large.png").write_bytes(file_of(pixels))
    (tmp_path / "small.png").write_bytes(file_of(picture()))
    with Browser(tmp_path / "profile") as page:
        for width in (1400, 360):
            page.size(width, 900)
            page.go(f"{server.url}/")
            page.until("document.getElementById('title').textContent === 'cells'")
            assert page.text("#empty").startswith("The answer will appear here")
            page.click("#tab-picture")
            for name in ("small.png", "large.png"):
                page.write("#files", str(tmp_path / name))
                page.until("document.querySelectorAll('.batch:first-child .box').length === 2")
                image, box = page.run(
                    "return [...document.querySelectorAll('.batch:first-child :is(img, .box)')].slice(0, 2)"
                    ".map((e) => e.getBoundingClientRect().toJSON())"
                )
                scale = image["width"] / 40
                assert [(box["left"] - image["left"]) / scale, (box["top"] - image["top"]) / scale] == pytest.approx(
                    [4, 2], abs=1
                )
                assert [box["width"] / scale, box["height"] / scale] == pytest.approx([8, 4], abs=2)
                page.run("document.getElementById('forget').click()")
            assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.run(
            "const list = document.getElementById('model');"
            "list.value = [...list.options].find((o) => o.text === 'meter').value;"
            "list.dispatchEvent(new Event('change'))"
        )
        assert page.text("#empty").startswith("This model reads tensors")
        assert page.text("#shell summary").startswith("Names and shapes")
        values, number = page.run(SHOW, "match", "two alike", {"pairs": [[1, 2]]}), page.run(SHOW, "value", "3 dB", {})
        assert values.replace("\n\n", "\n") == 'two alike\n{\n  "pairs": [\n    [\n      1,\n      2\n    ]\n  ]\n}'
        assert number == "3 dB"
        assert page.messages() == []
