"""Networks that weren't trained here: ONNX files of any framework, and functions that build a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import suanli
from served import digits_run
from short_timing import time_shortly
from suanli.core.errors import DamagedFile, DataError, UsageError
from suanli.core.schema import Arrays
from suanli.core.types import EngineInputs
from suanli.engines import onnx_edit
from suanli.engines.backends import onnxruntime
from suanli.engines.examples import SeparateExamples, StackedExamples
from suanli.engines.onnx_import import ImportedGraph, PictureOptions
from suanli.models.model_folder import load_model
from suanli.verbs._examples import ChosenExamples
from suanli.verbs._onnx_subject import GraphOptions, resolve_graph

pytestmark = [  # torch's exporter uses what torch itself is about to give up
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    time_shortly(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory)


def plain(run: Path, path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The network alone, as people export it: normalised pictures (B, C, H, W) in, logits out. Its mean and std."""
    saved = load_model(run / "model")
    saved.module(torch.zeros(2, 1, 8, 8))
    torch.onnx.export(
        saved.module,
        (torch.zeros(2, 1, 8, 8),),
        str(path),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        input_names=["pixels"],
        output_names=["logits"],
        verbose=False,
    )
    return saved.preprocess.mean, saved.preprocess.std  # type: ignore[attr-defined]


def small(
    path: Path,
    *,
    shape: tuple[object, ...] = ("n", 8, 8, 1),
    out: tuple[object, ...] = ("n", 10),
    opset: int = 13,
    more_inputs: tuple[str, ...] = (),
    number: int = TensorProto.FLOAT,
    softmax: bool = False,
) -> np.ndarray:
    """A linear classifier as an exporter of another framework might write it: weights among the inputs, channels
    last. Its weights."""
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    float_in = "pixels" if number == TensorProto.FLOAT else "as_float"
    nodes = [] if number == TensorProto.FLOAT else [helper.make_node("Cast", ["pixels"], ["as_float"], to=1)]
    nodes += [
        helper.make_node("Reshape", [float_in, "flat"], ["vector"]),
        helper.make_node("MatMul", ["vector", "weights"], ["scores" if not softmax else "raw"]),
    ]
    if softmax:
        nodes += [
            helper.make_node("Softmax", ["raw"], ["soft"], axis=1),
            helper.make_node("Identity", ["soft"], ["scores"]),
        ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("pixels", number, shape),
            helper.make_tensor_value_info("weights", TensorProto.FLOAT, weights.shape),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 3)) for name in more_inputs),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([-1, 64]), "flat")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return weights


def run(graph: onnx.ModelProto, inputs: Arrays) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == inputs.keys()
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(inputs)), strict=True))


def read(path: Path, data: Path | str | None = None, **pictures: object) -> tuple[ImportedGraph, ChosenExamples]:
    options = GraphOptions(data=data, cache_dir=path.parent / "cache", pictures=PictureOptions(**pictures))  # type: ignore[arg-type]
    return resolve_graph(path, options)


def check(graph: ImportedGraph, chosen: ChosenExamples) -> dict[str, np.ndarray]:
    """Runs the graph for the first example: it takes and gives what preprocessing and task say. The outputs."""
    inputs = chosen.examples.batch(0, 1)
    outputs = run(graph.model, inputs)
    for schema, arrays in ((graph.preprocess.inputs, inputs), (graph.task.outputs, outputs)):
        assert arrays.keys() == schema.keys()
        for name, column in schema.items():
            assert arrays[name].dtype == column.dtype
            assert len(arrays[name]) == 1
            sides = zip(arrays[name].shape[1:], column.shape, strict=True)
            assert all(wanted in (None, side) for side, wanted in sides)
    return outputs


# --- what is imported ---


def test_a_plain_network_scores_as_the_model_that_it_is(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    mean, std = plain(trained, path)
    result = suanli.optimize(
        path,
        data="digits",
        mean=mean,
        std=std,
        engines="onnxruntime,eager",
        cache_dir=trained.parent / "cache",
    )
    own = suanli.evaluate(shutil.copytree(trained, tmp_path / "run"), split="val").scores["accuracy"]
    states = {c.name: c for c in result.search.candidates}
    assert states["onnxruntime float32"].score == pytest.approx(own)
    assert states["onnxruntime int8"].state == "accepted"
    assert "only an ONNX graph" in states["eager float32"].reason
    assert result.path == Path("net-engines")
    row = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    there, here = suanli.load("net-engines", engine="reference"), suanli.load(trained, engine="reference")
    assert (there.engine, there.precision) == ("onnxruntime", "float32")
    np.testing.assert_allclose(
        there.answer({"image": row})["probabilities"], here.answer({"image": row})["probabilities"], atol=1e-5
    )
    assert suanli.load("net-engines").predict(row[0])[0].label in [str(i) for i in range(10)]
    again = suanli.optimize(
        path, data="digits", mean=mean, std=std, engines="eager", cache_dir=trained.parent / "cache"
    )
    assert again.path == result.path


@pytest.mark.long
def test_wrong_normalisation_shows_in_the_score(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    plain(trained, path)
    result = suanli.optimize(
        path, data="digits", mean=[5.0], std=[0.1], engines="onnxruntime", cache_dir=trained.parent / "cache"
    )
    assert result.search.candidates[0].score < 0.6


def test_an_exported_file_is_imported_unchanged(trained: Path, tmp_path: Path) -> None:
    exported = suanli.export(trained, to="onnx", out=tmp_path / "digits.onnx")
    graph, chosen = read(exported.path)
    saved = load_model(trained / "model")
    assert graph.preprocess == saved.preprocess
    assert graph.task == saved.task
    assert chosen.origin == "made up"
    rows = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    expected = suanli.load(trained, engine="reference").answer({"image": rows})["probabilities"]
    np.testing.assert_allclose(run(graph.model, {"image": rows})["probabilities"], expected, atol=1e-5)
    np.save(tmp_path / "rows.npy", rows)
    assert read(exported.path, tmp_path / "rows.npy")[1].origin == "unlabelled"


def test_a_file_that_an_older_version_exported(tmp_path: Path) -> None:
    small(tmp_path / "net.onnx", softmax=True, number=TensorProto.UINT8)
    model = onnx.load(tmp_path / "net.onnx")
    onnx_edit.rename_values(model, {"pixels": "rows", "scores": "probabilities"})
    preprocess = {"kind": "image", "settings": {"height": 8, "width": 8, "channels": 1, "mean": [0.5], "std": [0.2]}}
    metadata = {"preprocess": preprocess, "classes": list("abcdefghij"), "rows": {"shape": [8, 8, 1]}}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    graph, chosen = read(tmp_path / "net.onnx")
    assert graph.task.classes == tuple("abcdefghij")
    check(graph, chosen)
    with pytest.raises(UsageError, match="has its own"):
        read(tmp_path / "net.onnx", mean=[0.5])
    task = {
        "name": "tensors",
        "settings": {"columns": {"probabilities": {"shape": [10], "dtype": "float32", "role": ""}}},
    }
    onnx.helper.set_model_props(model, {"preprocess": json.dumps(preprocess), "task": json.dumps(task)})
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert read(tmp_path / "net.onnx")[0].task.name == "tensors"  # a newer one names the task
    damaged = json.dumps(preprocess | {"kind": "smell"})
    onnx.helper.set_model_props(model, {"preprocess": damaged, "task": json.dumps(task)})
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DamagedFile, match="smell"):
        read(tmp_path / "net.onnx")


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("number", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_channels_last_of_another_framework(tmp_path: Path, softmax: bool, number: int, opset: int) -> None:
    weights = small(tmp_path / "net.onnx", softmax=softmax, number=number, opset=opset)
    graph, _ = read(tmp_path / "net.onnx", mean=[0.25], std=[0.5])
    assert graph.task.classes == tuple("0123456789")
    assert not graph.has_class_names
    assert graph.preprocess.inputs["image"].shape == (8, 8, 1)
    rows = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    logits = ((rows.reshape(3, 64) / 255 - 0.25) / 0.5) @ weights
    expected = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(
        run(graph.model, {"image": rows})["probabilities"],
        expected / expected.sum(1, keepdims=True),
        atol=2e-2 if number == 10 else 1e-4,
    )


@pytest.mark.parametrize("batch", ["n", "", "?", -1, 0])
def test_an_open_batch_in_every_spelling(tmp_path: Path, batch: object) -> None:
    small(tmp_path / "net.onnx", shape=(batch, 8, 8, 1), out=(batch, 10))
    graph, chosen = read(tmp_path / "net.onnx")
    assert (graph.task.name, graph.preprocess.kind, graph.batches) == ("classification", "image", True)
    check(graph, chosen)
    run(graph.model, chosen.examples.batch(0, 5))


def test_an_open_size_has_to_be_given(tmp_path: Path) -> None:
    small(tmp_path / "net.onnx", shape=("n", "h", "w", 1))
    with pytest.raises(UsageError, match="--size"):
        read(tmp_path / "net.onnx")
    assert read(tmp_path / "net.onnx", size=(4, 16))[0].preprocess.inputs["image"].shape == (4, 16, 1)


def test_pictures_without_labels(tmp_path: Path, picture_folder: Callable[..., Path]) -> None:
    small(tmp_path / "net.onnx")
    pictures = tmp_path / "unlabelled"
    pictures.mkdir()
    for number, file in enumerate(sorted(picture_folder().rglob("*.png"))):
        shutil.copy(file, pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    graph, chosen = read(tmp_path / "net.onnx", pictures)
    assert (graph.task.name, chosen.origin) == ("classification", "unlabelled")
    assert chosen.calibration is not None
    assert len(chosen.examples) + len(chosen.calibration) == number + 1
    check(graph, chosen)


# --- by the signature ---

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
End = tuple[str, int, "Sequence[object] | None"]  # name, type and shape of an input or output


def graph_file(
    path: Path,
    inputs: Sequence[End],
    outputs: Sequence[End],
    nodes: Sequence[onnx.NodeProto],
    *,
    constants: Arrays | None = None,
    opset: int = 17,
) -> Path:
    ends = [[helper.make_tensor_value_info(*end) for end in side] for side in (inputs, outputs)]
    values = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    model = helper.make_model(
        helper.make_graph(list(nodes), "graph", *ends, values),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    path.write_bytes(model.SerializeToString())
    return path


def two_by_two(path: Path, batch: object = "n") -> Path:
    """A text model: tokens and a mask in, a vector for each text and one for each token out."""
    return graph_file(
        path,
        [("ids", INT64, (batch, "length")), ("mask", BOOL, (batch, "length"))],
        [("tokens", FLOAT, (batch, "length", 6)), ("text", FLOAT, None)],
        [
            helper.make_node("Gather", ["table", "ids"], ["vectors"]),
            helper.make_node("Cast", ["mask"], ["shares"], to=FLOAT),
            helper.make_node("Unsqueeze", ["shares", "last"], ["column"]),
            helper.make_node("Mul", ["vectors", "column"], ["tokens"]),
            helper.make_node("ReduceMean", ["tokens"], ["text"], axes=[1], keepdims=0),
        ],
        constants={"table": np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32), "last": np.array([2])},
    )


def with_state(path: Path, opset: int = 17) -> Path:
    """A model of sound like those that packages ship: samples, a state (2, B, 3) and a rate in, the state out again.
    One branch for each rate takes the state from outside."""
    branches = []
    for name, factor in (("then", 1.0), ("else", 2.0)):
        scale = helper.make_node(
            "Constant", [], [f"{name}_factor"], value=numpy_helper.from_array(np.array(factor, np.float32))
        )
        product = helper.make_node("Mul", ["state", f"{name}_factor"], [f"{name}_state"])
        out = helper.make_tensor_value_info(f"{name}_state", FLOAT, None)
        branches.append(helper.make_graph([scale, product], name, [], [out]))
    return graph_file(
        path,
        [("sound", FLOAT, ("batch", "samples")), ("state", FLOAT, (2, "batch", 3)), ("rate", INT64, ())],
        [("share", FLOAT, ("batch", 1)), ("state_after", FLOAT, (2, "batch", 3))],
        [
            helper.make_node("Slice", ["sound", "start", "end", "axis"], ["part"]),
            helper.make_node("MatMul", ["part", "weights"], ["sum"]),
            helper.make_node("Sigmoid", ["sum"], ["share"]),
            helper.make_node("Equal", ["rate", "sixteen"], ["is_fast"]),
            helper.make_node("If", ["is_fast"], ["state_after"], then_branch=branches[0], else_branch=branches[1]),
        ],
        constants={
            "start": np.array([0]), "end": np.array([400]), "axis": np.array([1]), "sixteen": np.array(16000),
            "weights": np.ones((400, 1), np.float32),
        },
        opset=opset,
    )  # fmt: skip


def detector(path: Path, batch: object = "n", *, height: object = "h", width: object = "w", out: str = "map") -> Path:
    """A picture in, a map of half its size out; no side is below 41."""
    return graph_file(
        path,
        [("x", FLOAT, (batch, 3, height, width))],
        [(out, FLOAT, (batch, 1, None, None))],
        [
            helper.make_node("Conv", ["x", "kernel"], ["wide"], dilations=[20, 20], pads=[20, 20, 20, 20]),
            helper.make_node("Conv", ["x", "kernel"], ["narrow"], dilations=[20, 20]),
            helper.make_node("ReduceMean", ["narrow"], ["level"], axes=[2, 3]),
            helper.make_node("Add", ["wide", "level"], ["sum"]),
            helper.make_node("MaxPool", ["sum"], [out], kernel_shape=[2, 2], strides=[2, 2]),
        ],
        constants={"kernel": np.random.default_rng(1).normal(size=(1, 3, 3, 3)).astype(np.float32)},
    )


def test_two_inputs_and_two_outputs(tmp_path: Path) -> None:
    graph, chosen = read(two_by_two(tmp_path / "net.onnx"))
    assert (graph.task.name, graph.preprocess.kind) == ("tensors", "tensors")
    assert graph.batches
    assert chosen.origin == "made up"
    assert isinstance(chosen.examples, StackedExamples)
    assert chosen.examples.arrays["ids"].max() <= 1
    outputs = check(graph, chosen)
    np.testing.assert_allclose(outputs["text"], outputs["tokens"].mean(1), atol=1e-6)


def test_texts_of_different_lengths_are_calls_of_their_own(tmp_path: Path) -> None:
    data = tmp_path / "texts"
    data.mkdir()
    for length in (3, 5, 8, 8):
        np.savez(data / f"{len(list(data.iterdir()))}.npz", ids=np.arange(length), mask=np.ones(length, bool))
    graph, chosen = read(two_by_two(tmp_path / "net.onnx"), data)
    assert graph.batches
    assert isinstance(chosen.examples, SeparateExamples)
    assert (chosen.origin, len(chosen.examples), chosen.count) == ("unlabelled", 2, 2)
    check(graph, chosen)
    for file in data.iterdir():
        file.unlink()
    np.savez(data / "batch.npz", ids=np.arange(20).reshape(4, 5), mask=np.ones((4, 5), bool))
    _, chosen = read(tmp_path / "net.onnx", data / "batch.npz")
    assert isinstance(chosen.examples, StackedExamples)
    assert chosen.examples.arrays["ids"].shape == (2, 5)


@pytest.mark.parametrize("opset", [12, 17])
def test_a_state_and_a_scalar(tmp_path: Path, opset: int) -> None:
    path = with_state(tmp_path / "net.onnx", 17)
    if opset < 13:
        model = onnx.load(path)
        model.opset_import[0].version = opset
        path.write_bytes(model.SerializeToString())
    graph, chosen = read(path)
    assert not graph.batches
    outputs = check(graph, chosen)
    assert chosen.examples.batch(0, 1)["sound"].shape == (1, 1, 512)  # the first usual length that it accepts
    assert outputs["state_after"].shape == (1, 2, 1, 3)
    rates = {
        "sound": np.zeros((2, 1, 500)), "state": np.ones((2, 2, 1, 3)), "rate": np.array([16000, 8000]),
    }  # fmt: skip
    np.savez(tmp_path / "two.npz", **rates)
    graph, chosen = read(path, tmp_path / "two.npz")
    assert chosen.calibration is not None
    (factor,) = np.unique(run(graph.model, chosen.examples.batch(0, 1))["state_after"])
    (other,) = np.unique(run(graph.model, chosen.calibration.batch(0, 1))["state_after"])
    assert {factor, other} == {1, 2}


def test_a_sequence_whose_first_axis_counts_no_examples(tmp_path: Path) -> None:
    path = graph_file(
        tmp_path / "net.onnx",
        [("steps", FLOAT, ("time", 4))],
        [("sums", FLOAT, ("time", 4))],
        [helper.make_node("CumSum", ["steps", "axis"], ["sums"])],
        constants={"axis": np.array(0)},
    )
    graph, chosen = read(path)
    assert not graph.batches  # two sequences of one step aren't one of two
    check(graph, chosen)
    np.save(tmp_path / "one.npy", np.ones((7, 4), np.float32))
    graph, chosen = read(path, tmp_path / "one.npy")
    assert run(graph.model, chosen.examples.batch(0, 1))["sums"][0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert chosen.calibration is None  # the only example is for evaluation


@pytest.mark.parametrize("ends_in", ["Softmax", "Sigmoid", "Identity"])
def test_probabilities_of_any_input_are_classes(tmp_path: Path, ends_in: str) -> None:
    path = graph_file(
        tmp_path / "net.onnx",
        [("x", TensorProto.DOUBLE, ("n", 5))],
        [("y", FLOAT, ("n", 3))],
        [
            helper.make_node("Cast", ["x"], ["float"], to=FLOAT),
            helper.make_node("MatMul", ["float", "weights"], ["logits"]),
            helper.make_node(ends_in, ["logits"], ["y"]),
        ],
        constants={"weights": np.eye(5, 3, dtype=np.float32)},
    )
    graph, chosen = read(path)
    assert graph.task.name == ("classification" if ends_in == "Softmax" else "tensors")
    check(graph, chosen)


def test_a_distribution_without_a_softmax_is_classes(tmp_path: Path) -> None:
    path = graph_file(
        tmp_path / "net.onnx",
        [("x", FLOAT, ("n", 5))],
        [("y", FLOAT, ("n", 5))],
        [
            helper.make_node("Exp", ["x"], ["positive"]),
            helper.make_node("ReduceSum", ["positive", "axis"], ["total"], keepdims=1),
            helper.make_node("Div", ["positive", "total"], ["y"]),
        ],
        constants={"axis": np.array([1])},
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"classes": json.dumps(list("abcde"))})
    path.write_bytes(model.SerializeToString())
    graph, chosen = read(path)
    assert graph.task.classes == tuple("abcde")
    check(graph, chosen)


@pytest.mark.parametrize("batch", ["n", 1])
def test_pictures_into_a_map(tmp_path: Path, picture_folder: Callable[..., Path], batch: object) -> None:
    path = detector(tmp_path / "net.onnx", batch, out="image")
    graph, chosen = read(path)
    assert graph.preprocess.kind == "tensors"  # nobody said how pictures become its inputs
    assert check(graph, chosen)["image"].shape == (1, 1, 112, 112)
    assert graph.batches == (batch == "n")
    pictures = picture_folder()
    graph, chosen = read(path, pictures, size=(60, 80), mean=[0.5] * 3, std=[0.5] * 3)
    assert (graph.preprocess.kind, graph.task.name, chosen.origin) == ("image", "tensors", "unlabelled")
    assert graph.preprocess.inputs["image"].shape == (60, 80, 3)
    assert graph.batches == (batch == "n")
    (values,) = check(graph, chosen).values()
    assert values.shape == (1, 1, 30, 40)
    assert read(path, pictures)[0].preprocess.inputs["image"].shape == (224, 224, 3)
    with pytest.raises(DataError, match="doesn't accept inputs with h 20, w 20"):
        read(path, pictures, size=(20, 20))


def test_a_picture_classifier_gets_arrays_as_they_are(tmp_path: Path) -> None:
    weights = small(tmp_path / "net.onnx")
    pixels = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    np.savez(tmp_path / "pixels.npz", pixels=pixels)
    graph, chosen = read(tmp_path / "net.onnx", tmp_path / "pixels.npz")
    assert (graph.preprocess.kind, graph.task.name) == ("tensors", "tensors")
    one = chosen.examples.batch(0, 1)
    np.testing.assert_allclose(run(graph.model, one)["scores"], one["pixels"].reshape(1, 64) @ weights, atol=1e-4)


def test_a_fixed_batch_of_pictures_with_labels(tmp_path: Path) -> None:
    small(tmp_path / "net.onnx", shape=(1, 8, 8, 1), out=(1, 10), softmax=True)
    graph, chosen = read(tmp_path / "net.onnx", "digits")
    assert (graph.task.name, chosen.origin, graph.batches) == ("classification", "labelled", False)
    assert not chosen.examples.batches
    assert chosen.targets is not None
    assert len(chosen.targets["class"]) == len(chosen.examples)
    check(graph, chosen)


TYPES = (FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, INT64, BOOL)


def test_stored_engines_of_a_text_model(tmp_path: Path) -> None:
    path = two_by_two(tmp_path / "net.onnx")
    random = np.random.default_rng(0)
    ids, mask = random.integers(0, 30, (40, 7)), random.random((40, 7)) < 0.8
    np.savez(tmp_path / "texts.npz", ids=ids, mask=mask)
    result = suanli.optimize(path, data=tmp_path / "texts.npz", engines="onnxruntime,openvino")
    assert {c.name: c.state for c in result.search.candidates}["onnxruntime float32"] == "accepted"
    assert result.search.origin == "unlabelled"
    predictor = suanli.load("net-engines")
    assert predictor.batches
    expected = suanli.load("net-engines", engine="reference").answer({"ids": ids[:3], "mask": mask[:3]})
    (one,) = predictor.predict({"ids": ids[0], "mask": mask[0]}, top=3)
    first = one.values["outputs"]["text"]
    assert first["shape"] == [6]
    np.testing.assert_allclose(first["first"], expected["text"][0, :3], atol=1e-5)
    batch = predictor.predict({"ids": ids[:3], "mask": mask[:3]})
    assert [p.name for p in batch] == ["#0", "#1", "#2"]
    short = {"ids": ids[0, :4], "mask": mask[0, :4]}
    both = predictor.predict([short, {"ids": ids[0], "mask": mask[0]}, {"ids": ids[0]}])
    assert [p.values["outputs"]["tokens"]["shape"] for p in both[:2]] == [[4, 6], [7, 6]]
    assert "no array 'mask'" in str(both[2].error)
    files = suanli.predict("net-engines", tmp_path / "texts.npz")
    assert [p.name for p in files[:2]] == [f"{tmp_path / 'texts.npz'}[0]", f"{tmp_path / 'texts.npz'}[1]"]
    assert len(files) == 40


def test_stored_engines_that_take_one_call_at_a_time(tmp_path: Path) -> None:
    path = with_state(tmp_path / "net.onnx")
    suanli.optimize(path, engines="onnxruntime")
    predictor = suanli.load("net-engines")
    assert not predictor.batches
    calls = [
        {"sound": np.zeros((1, length)), "state": np.ones((2, 1, 3)), "rate": rate}
        for length, rate in ((400, 16000), (500, 8000))
    ]
    answers = predictor.predict(calls)
    assert [p.values["outputs"]["state_after"]["first"][0] for p in answers] == [1, 2]
    assert answers[0].values["outputs"]["share"] == {"shape": [1, 1], "dtype": "float32", "first": [0.5]}


SIDES = st.sampled_from(["n", "length", "", -1, 2, 3])


@given(
    shapes=st.lists(st.lists(SIDES, max_size=3), min_size=1, max_size=3),
    types=st.lists(st.sampled_from(TYPES), min_size=3, max_size=3),
)
@settings(max_examples=6, deadline=None)
def test_any_signature(tmp_path_factory: pytest.TempPathFactory, shapes: list[list[object]], types: list[int]) -> None:
    """Inputs of any type and shape, each given out again, are taken, and one example goes through unchanged."""
    folder = tmp_path_factory.mktemp("any")
    ends = [(f"in{i}", types[i], tuple(shape)) for i, shape in enumerate(shapes)]
    path = graph_file(
        folder / "net.onnx",
        ends,
        [(f"out{i}", *end[1:]) for i, end in enumerate(ends)],
        [helper.make_node("Identity", [f"in{i}"], [f"out{i}"]) for i in range(len(ends))],
    )
    graph, chosen = read(path)
    inputs = chosen.examples.batch(0, 1)
    outputs = check(graph, chosen) if graph.task.name == "tensors" else run(graph.model, inputs)
    for one, other in zip(inputs.values(), outputs.values(), strict=True):
        np.testing.assert_array_equal(one, other)
    for name, array in graph.preprocess.encode({name: array[0] for name, array in inputs.items()}).arrays.items():
        np.testing.assert_array_equal(array, inputs[name][0])


def test_int8_of_an_opset_without_scales_per_channel(tmp_path: Path) -> None:
    small(tmp_path / "net.onnx", opset=11)
    graph, chosen = read(tmp_path / "net.onnx")
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph.model.SerializeToString())
    calibration = [chosen.examples.batch(start, start + 8) for start in range(0, 64, 8)]
    onnxruntime.quantize(EngineInputs(model=None, onnx=path, calibration=calibration, batches=True), tmp_path)
    rows = chosen.examples.batch(40, 64)
    exact, rounded = (run(model, rows)["probabilities"] for model in (graph.model, onnx.load(tmp_path / "model.onnx")))
    assert 0 < np.abs(exact - rounded).mean() < 0.05


# --- what is refused ---


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.arange(4)}, "no array 'mask', only 'ids'.*Give ids int64"),
        ({"ids": np.arange(4), "mask": np.ones((4, 4), bool)}, "neither one example nor a batch"),
        ({"ids": np.arange(4) / 2, "mask": np.ones(4, bool)}, r"ids is float64 \(4,\), and int64 \(\?,\) is needed"),
        ({"ids": np.full(4, 99), "mask": np.ones(4, bool)}, "doesn't accept the examples .*99"),
        ({"ids": np.arange(4), "mask": np.ones(3, bool)}, "doesn't accept the examples"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    two_by_two(tmp_path / "net.onnx")
    np.savez(tmp_path / "one.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "net.onnx", tmp_path / "one.npz")


def test_inputs_that_nobody_could_guess(tmp_path: Path) -> None:
    path = graph_file(
        tmp_path / "net.onnx",
        [("x", FLOAT, ("n", "length"))],
        [("y", FLOAT, None)],
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        constants={"weights": np.ones((777, 2), np.float32)},
    )
    with pytest.raises(DataError, match=r"x float32 \(n, length\).*with --data"):
        read(path)
    np.save(tmp_path / "x.npy", np.ones((3, 777), np.float32))
    graph, chosen = read(path, tmp_path / "x.npy")
    check(graph, chosen)


def test_options_for_pictures_where_there_are_none(tmp_path: Path) -> None:
    two_by_two(tmp_path / "net.onnx")
    with pytest.raises(UsageError, match="are for images.*ids int64"):
        read(tmp_path / "net.onnx", size=(8, 8))
    with pytest.raises(DataError, match="is labelled data, but the outputs of .* are not classes"):
        read(detector(tmp_path / "map.onnx"), "digits")


def test_what_is_no_tensor_of_numbers(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    text = graph_file(
        tmp_path / "text.onnx", [("x", TensorProto.STRING, ("n",))], [("y", TensorProto.STRING, ("n",))], nodes
    )
    with pytest.raises(DataError, match="x of .* is STRING.*float32"):
        read(text)
    model = onnx.load(text)
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(helper.make_tensor_sequence_value_info(value.name, FLOAT, None))
    text.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="is a sequence, not a tensor"):
        read(text)
    shapeless = graph_file(tmp_path / "net.onnx", [("x", FLOAT, None)], [("y", FLOAT, None)], nodes)
    with pytest.raises(DataError, match="which shape its input x has"):
        read(shapeless)


def test_operators_of_another_program(tmp_path: Path) -> None:
    path = graph_file(
        tmp_path / "net.onnx",
        [("x", FLOAT, ("n", 2))],
        [("y", FLOAT, ("n", 2))],
        [helper.make_node("Magic", ["x"], ["y"], domain="my.company")],
    )
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"my\.company\.Magic"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x08" * 100, None])
def test_a_file_that_is_not_a_complete_graph(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    small(path)
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    with pytest.raises(DamagedFile, match="Export it again"):
        suanli.optimize(path)
    assert not Path("net-engines").exists()


def test_a_newer_opset(tmp_path: Path) -> None:
    small(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    model.opset_import[0].version = 999
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises((DataError, DamagedFile), match="opset"):
        read(tmp_path / "net.onnx")


def test_weights_in_another_file_that_is_gone(tmp_path: Path) -> None:
    small(tmp_path / "complete.onnx")
    onnx.save(
        onnx.load(tmp_path / "complete.onnx"), tmp_path / "net.onnx", save_as_external_data=True, location="net.data",
        size_threshold=0,
    )  # fmt: skip
    assert len(read(tmp_path / "net.onnx")[0].task.classes) == 10
    (tmp_path / "net.data").unlink()
    with pytest.raises(DamagedFile, match="must lie beside it"):
        read(tmp_path / "net.onnx")


def test_options_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    small(tmp_path / "net.onnx")
    for options, message in (
        ({"mean": [0.5, 0.5, 0.5]}, "3 numbers; there are 1"),
        ({"std": [0.0]}, "above 0"),
        ({"size": "nine"}, "no size"),
        ({"size": "0"}, "no size"),
        ({"size": "16"}, "Leave --size out"),
        ({"weights": "w.safetensors"}, "--weights can't be used with an ONNX file"),
    ):
        with pytest.raises(UsageError, match=message):
            suanli.optimize(tmp_path / "net.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--mean can't be used with a trained model"):
        suanli.optimize(trained, mean=[0.5])
    with pytest.raises(DataError, match="nothing at"):
        suanli.optimize("nowhere.onnx")


def test_data_of_other_classes(tmp_path: Path, picture_folder: Callable[..., Path]) -> None:
    small(tmp_path / "net.onnx")
    with pytest.raises(DataError, match="10 classes, the data 2"):
        suanli.optimize(tmp_path / "net.onnx", data=picture_folder())


def test_no_data_and_an_unknown_operation(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    small(path)
    assert suanli.optimize(path, engines="onnxruntime,openvino").search.chosen.precision == "float32"
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchThing"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DamagedFile, match="NoSuchThing"):
        suanli.optimize(path)


# --- a function ---

NETWORK = """
from torch import nn
def build(classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], classes))
"""


@pytest.mark.long
def test_a_function_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    (tmp_path / "linear.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    digits = load_digits()
    inputs = (digits.images / 16).reshape(-1, 64)
    fitted = LogisticRegression(max_iter=300).fit(inputs, digits.target)
    save_file(
        {
            "1.weight": torch.tensor(fitted.coef_).float().contiguous(),
            "1.bias": torch.tensor(fitted.intercept_).float(),
        },
        tmp_path / "w.safetensors",
    )
    result = suanli.optimize(
        "linear:build", data="digits", weights=tmp_path / "w.safetensors", mean=[0.0], std=[1.0], engines="onnxruntime"
    )
    assert result.search.candidates[0].score > 0.9
    assert result.path == Path("build-model/engines")
    card = json.loads(Path("build-model/model.json").read_text())
    assert card["preprocess"]["settings"]["mean"] == [0.0]
    assert suanli.load("build-model").predict((digits.images[3] * 15.9).astype(np.uint8))[0].label == "3"
    again = suanli.optimize("linear:build", data="digits", engines="onnxruntime", time_budget=10)
    assert again.path == result.path  # its own folder is replaced
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty directory"):
        suanli.optimize("linear:build", data="digits", out="taken")


def test_a_function_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "linear.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="--data"):
        suanli.optimize("linear:build")
    with pytest.raises(UsageError, match="nothing_here"):
        suanli.optimize("linear:nothing_here", data="digits")
    save_file({"1.weight": torch.zeros(10, 64)}, tmp_path / "half.safetensors")
    with pytest.raises(DataError):
        suanli.optimize("linear:build", data="digits", weights=tmp_path / "half.safetensors")
    assert not Path("build-model").exists()
