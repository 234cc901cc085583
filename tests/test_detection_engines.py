"""Detectors in engines and plain files: lists of boxes, compared as lists and computed in float."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import suanli
from box_model import SIZE, save_detector
from suanli.core.boxes import Box, Boxes
from suanli.core.schema import Geometry, Ragged, random_inputs
from suanli.core.types import EngineInputs
from suanli.engines import onnx_import, timing
from suanli.engines.acceptance import DRIFT, LISTS
from suanli.engines.backends import _tensorrt_graph
from suanli.engines.backends import onnxruntime as engine
from suanli.engines.candidates import Candidate
from suanli.engines.examples import StackedExamples
from suanli.engines.graphs import find_float_nodes
from suanli.engines.search import EngineSearch
from suanli.engines.subject import Subject
from suanli.machine import device
from suanli.models.model_folder import build_task

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# --- plain files ----------------------------------------------------------------------------

# As a user would write it: pixels by the code in the file, boxes back into the pixels of the image.
READER = """
import json, sys
import onnxruntime
session = onnxruntime.InferenceSession("boxes.onnx")
about = session.get_modelmeta().custom_metadata_map
path = "photo.png"
exec(json.loads(about["code"]))
count, boxes, scores, classes = (array[0] for array in session.run(None, {"image": image}))
raw = onnxruntime.InferenceSession("boxes-raw.onnx").run(["boxes", "logits"], {"image": image})
left, top = (image.shape[2] - w) // 2, (image.shape[1] - h) // 2
boxes = (boxes[: count[0]] - [left, top, left, top]) / scale
numpy.savez("found.npz", boxes=boxes, scores=scores[: count[0]], classes=classes[: count[0]], raw=raw[0], logits=raw[1])
json.dump({name: json.loads(about[name]) for name in ("classes", "outputs")}, open("about.json", "w"))
assert not {"suanli", "torch"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its graph and its graph without suppression."""
    folder = tmp_path_factory.mktemp("exported")
    model = save_detector(folder / "boxes")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for raw in (False, True):
            written = suanli.export(model, to="onnx", raw=raw, trust_code=True)
            assert written.path.name == ("boxes-raw.onnx" if raw else "boxes.onnx")
    return folder


def test_from_pixels_to_boxes_by_onnxruntime_alone(exported: Path) -> None:
    """With suppression, and by hand without it."""
    pixels = np.random.default_rng(3).integers(0, 256, (64, 72, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(exported / "photo.png")
    subprocess.run([sys.executable, "-I", "-c", READER], cwd=exported, check=True)
    found = np.load(exported / "found.npz")
    (expected,) = suanli.load(exported / "boxes", trust_code=True, threads=1).predict(exported / "photo.png", top=40)
    shown = found["scores"] >= 0.5
    assert shown.sum() > 5
    boxes = found["boxes"][shown].clip(0, [72, 64, 72, 64])
    assert [entry["label"] for entry in expected.values["boxes"]] == [
        ("ant", "bee", "cat")[i] for i in found["classes"][shown]
    ]
    np.testing.assert_allclose([entry["box"] for entry in expected.values["boxes"]], boxes, atol=0.01)

    raw, logits = found["raw"][0], found["logits"][0]
    assert len(raw) == len(logits) == SIZE[0] * SIZE[1] // 64
    kept = suppress(raw, 1 / (1 + np.exp(-logits)))
    for (cell, label), box, at in zip(kept, found["boxes"], found["classes"], strict=False):
        assert label == at
        np.testing.assert_allclose(raw[cell] - [12, 0, 12, 0], box, atol=1e-3)


def suppress(boxes: np.ndarray, scores: np.ndarray, overlap: float = 0.65) -> list[tuple[int, int]]:
    """Cell and class of the boxes that stay, the best first, found one by one."""
    kept: list[tuple[int, int]] = []
    for cell, label in zip(*np.unravel_index(np.argsort(-scores, axis=None), scores.shape), strict=True):
        others = boxes[[i for i, at in kept if at == label]]
        box = boxes[cell]
        shared = (np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])).clip(0).prod(1)
        areas = (others[:, 2:] - others[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
        if not (shared > overlap * (areas - shared)).any():
            kept.append((int(cell), int(label)))
    return kept


def test_a_file_has_standard_operators_only(exported: Path) -> None:
    for name in ("boxes.onnx", "boxes-raw.onnx"):
        model = onnx.load(exported / name)
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        assert not {"MatMul", "Loop", "If"} & {node.op_type for node in model.graph.node}


def test_both_files_can_be_optimised(exported: Path) -> None:
    """The one as a detector, the other as a graph whose tensors have no meaning."""
    for name, outputs in (
        ("boxes.onnx", "num_dets det_boxes det_scores det_classes"),
        ("boxes-raw.onnx", "boxes logits"),
    ):
        graph = onnx_import.import_exported(onnx_import.load(exported / name), onnx_import.PictureOptions())
        assert list(graph.task.outputs) == outputs.split()
        assert graph.task.name == ("tensors" if "raw" in name else "detection")
        assert graph.task.classes == ("ant", "bee", "cat")


def test_weights_alone_have_nothing_to_leave_out(exported: Path) -> None:
    with pytest.raises(suanli.UsageError, match="with or without --raw"):
        suanli.export(exported / "boxes", to="safetensors", raw=True, trust_code=True)


# --- what stays in float --------------------------------------------------------------------


def compute(graph: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    source = graph if isinstance(graph, str) else graph.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, inputs), strict=True))


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_boxes_are_made_in_float32(precision: str, exported: Path, tmp_path: Path) -> None:
    """The graph for TensorRT, in which types say what is computed in which precision."""
    path = exported / "boxes.onnx"
    columns = suanli.load(exported / "boxes", trust_code=True, threads=1).preprocess.inputs
    inputs = random_inputs(columns, 8)
    of = EngineInputs(model=None, onnx=path, calibration=(inputs,))
    model = _tensorrt_graph.prepare_graph(of, precision, tmp_path)
    onnx.checker.check_model(model, full_check=True)
    floats, values = set(find_float_nodes(path)), onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {one.name: one.type.tensor_type.elem_type for one in values}
    made = {n.op_type: types[n.output[0]] for n in model.graph.node if n.name in floats and n.output[0] in types}
    assert made["Exp"] == made["Sub"] == made["Sigmoid"] == made["Max"] == onnx.TensorProto.FLOAT
    task = build_task("detection", ("ant", "bee", "cat"), {"most": 40})
    drift = task.drift(compute(str(path), inputs), compute(model, inputs))
    assert np.median(drift) <= LISTS * DRIFT[precision]


def test_int8_leaves_alone_what_follows_the_last_convolution(tmp_path: Path) -> None:
    """Of any graph: no value behind it is rounded, but all before it are."""
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    random = np.random.default_rng(0)
    weights = {name: random.normal(0, 0.3, (4, 4, 1, 1)).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], name="conv1"),
        helper.make_node("Add", ["a", "x"], ["b"], name="between"),
        helper.make_node("Conv", ["b", "second"], ["c"], name="conv2"),
        helper.make_node("Add", ["c", "far"], ["y"], name="behind"),
    ]
    sides = ["batch", 4, 6, 6]
    graph = helper.make_graph(
        nodes,
        "decode",
        [helper.make_tensor_value_info("x", single, sides)],
        [helper.make_tensor_value_info("y", single, sides)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
        + [onnx.numpy_helper.from_array(np.float32(1000), "far")],
    )
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    assert find_float_nodes(path) == ["behind"]
    x = {"x": random.standard_normal((8, 4, 6, 6)).astype(np.float32)}
    engine.quantize(EngineInputs(model=None, onnx=path, calibration=(x,)), tmp_path)
    quantized = onnx.load(tmp_path / engine.FILE)
    rounded = {node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    assert {"x", "a", "b"} <= rounded
    assert "y" not in rounded
    assert np.abs(compute(quantized, x)["y"] - compute(str(path), x)["y"]).max() < 0.1  # of 1000


# --- the gate -------------------------------------------------------------------------------

MOST, COUNT = 6, 120
TASK = build_task("detection", ("ant", "bee"), {"most": MOST})
LISTED = """
from dataclasses import replace
import numpy as np
from suanli.core.types import LoadedEngine
from suanli.engines.backends import onnxruntime as real
def change(of, batch):
    {change}
def load(folder, precision, placement):
    loaded = real.load(folder, precision, placement)
    def answer(arrays):
        of = {{name: np.array(array) for name, array in loaded.answer(arrays).items()}}
        return change(of, len(of["num_dets"])) or of
    return LoadedEngine(answer=answer, find_precision=lambda arrays: precision)
ENGINE = replace(real.ENGINE, name={name!r}, precisions=({precision!r},), load=load, why_not=lambda *a: None)
"""
SWAP = "[a.__setitem__((slice(None), [0, 1]), a[:, [1, 0]]) for name, a in of.items() if name != 'num_dets']"
CHANGES = {
    "swaps": ("float32", SWAP),  # neighbours of equal scores
    "rounds": ("int8", "of['det_boxes'] += np.float32(0.05); of['num_dets'] -= 1"),  # the last is the least likely
    "shifts": ("int8", "of['det_boxes'] += np.float32(0.2)"),
    "batches": ("int8", "of['det_boxes'] += np.float32(9 * (batch == 1))"),
}


def write_lists(folder: Path) -> tuple[StackedExamples, dict[str, Any]]:
    """A graph that answers with boxes that are its own input, and the labels, which they find but for a few."""
    random, helper, types = np.random.default_rng(0), onnx.helper, onnx.TensorProto
    starts = np.stack([20.0 * np.arange(MOST), np.full(MOST, 10.0)], 1) + random.uniform(0, 4, (COUNT, MOST, 2))
    boxes = np.concatenate([starts, starts + 15], 2).astype(np.float32)
    arrays = {
        "num_dets_in": np.full((COUNT, 1), MOST, np.int32),
        "det_boxes_in": boxes,
        "det_scores_in": np.tile(np.array([0.9, 0.9, 0.8, 0.7, 0.6, 0.01], np.float32), (COUNT, 1)),
        "det_classes_in": random.integers(0, 2, (COUNT, MOST)).astype(np.int32),
    }
    columns = TASK.outputs.items()
    kinds = {"float32": types.FLOAT, "int32": types.INT32}
    ends = [
        [helper.make_tensor_value_info(f"{n}{end}", kinds[c.dtype], ["batch", *c.shape]) for n, c in columns]
        for end in ("_in", "")
    ]
    nodes = [helper.make_node("Identity", [f"{name}_in"], [name], name=name) for name, _ in columns]
    graph = helper.make_graph(nodes, "lists", *ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "g.onnx")
    geometry = Geometry.unchanged((60, 160))
    targets = [
        TASK.encode(Boxes(tuple(Box(*box, TASK.classes[c]) for box, c in zip(*one, strict=True))), geometry)
        for one in zip(boxes[:, :5].astype(float).tolist(), arrays["det_classes_in"][:, :5].tolist(), strict=True)
    ]
    return StackedExamples(arrays=arrays), {
        "boxes": Ragged.of([one["boxes"] for one in targets], like=np.zeros((0, 6), np.float32)),
        "geometry": np.stack([one["geometry"] for one in targets]),
    }


def test_lists_are_judged_as_lists(engine_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "TURN_S", 0.01)
    for name, (precision, change) in CHANGES.items():
        engine_folder(name, LISTED.format(name=name, precision=precision, change=change))
    examples, targets = write_lists(tmp_path)
    (tmp_path / "work").mkdir()
    subject = Subject(
        model=None,
        graph=tmp_path / "g.onnx",
        task=TASK,
        examples=examples,
        origin="labelled",
        count=COUNT,
        calibration=examples.first(8),
        targets=targets,
    )
    search = EngineSearch(
        subject,
        device.detect("cpu"),
        tmp_path / "work",
        goal="latency",
        tolerance=None,
        budget_s=300,
        engines=list(CHANGES),
    )
    of: dict[str, Candidate] = {one.engine: one for one in search.search().candidates}
    assert of["onnxruntime"].score == pytest.approx(1)
    for name in ("swaps", "rounds"):
        assert of[name].state == "accepted", of[name]
    assert of["shifts"].reason == "map -10.00 points (-10.00 to -10.00)"  # at an overlap of 0.95
    assert of["batches"].reason.startswith("answers at batch 1 and 64 differ")
