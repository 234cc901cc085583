"""Engines for NVIDIA GPUs, as far as they can be tested without one: sizes, graphs, switches, and what they refuse."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import suanli
from suanli.core import registry
from suanli.core.errors import MachineError
from suanli.core.schema import Column
from suanli.core.types import Device, EngineInputs, Placement, Recipe
from suanli.engines.acceptance import DRIFT
from suanli.engines.backends import _tensorrt_graph, cuda_graphs, eager, tensorrt
from suanli.engines.backends import onnxruntime as onnx_engine
from suanli.engines.inference_module import InferenceModule, write_onnx
from suanli.machine import device
from suanli.models.model_folder import SavedModel, load_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CPU = device.detect("cpu")
H100 = Device(
    name="NVIDIA H100",
    torch_name="cuda:1",
    memory_bytes=80 << 30,
    fast_dtypes=("float32", "bfloat16", "float16", "tfloat32", "float8_e4m3fn"),
)
PASCAL = Device(name="NVIDIA GTX 1080", torch_name="cuda:0", memory_bytes=8 << 30, fast_dtypes=("float32",))
MAC = Device(name="Apple M4", torch_name="mps", memory_bytes=None, fast_dtypes=("float32", "float16"))
HERE = Placement(device=CPU, threads=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, its graph, training pictures and pictures to answer."""
    folder = tmp_path_factory.mktemp("gpu_engines")
    run = suanli.train(
        "digits", epochs=2, speedups="none", threads=1, out=folder / "run", cache_dir=folder / "cache", seed=1
    )
    splits = suanli.prepare("digits", settings={}, cache_dir=folder / "cache").splits
    for name, split in (("calibration", splits["train"]), ("rows", splits["val"])):
        np.save(folder / f"{name}.npy", split.inputs["image"][split.index[:100]])
    write_onnx(load_model(run.model_path), folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def rows(place: Path) -> np.ndarray:
    rows: np.ndarray = np.load(place / "rows.npy")
    return rows


@pytest.fixture(scope="module")
def saved(place: Path) -> SavedModel:
    return load_model(place / "run" / "model")


def material(place: Path, **changes: Any) -> EngineInputs:
    return EngineInputs(
        **{
            "model": place / "run" / "model",
            "onnx": place / "model.onnx",
            "calibration": [{"image": part} for part in np.array_split(np.load(place / "calibration.npy"), 10)],
            **changes,
        }
    )


def answers(model: Any, inputs: np.ndarray) -> np.ndarray:
    """Of an ONNX graph, by ONNX Runtime on the CPU."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), onnx_engine.options(1), providers=["CPUExecutionProvider"]
    )
    probabilities: np.ndarray = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return probabilities


def compute(module: nn.Module, inputs: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        (probabilities,) = module(torch.from_numpy(inputs))
    return np.asarray(probabilities)


def drift(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).sum(1).mean() / 2)


# --- CUDA graphs ---


@given(st.integers(1, 1000))
def test_parts_cover_a_batch_with_the_smallest_sizes_that_hold_them(count: int) -> None:
    parts = cuda_graphs.split_batch(count)
    assert [index for start, stop, _ in parts for index in range(start, stop)] == list(range(count))
    for start, stop, size in parts:
        assert size in cuda_graphs.SIZES
        assert stop - start <= size
        assert not any(stop - start <= smaller < size for smaller in cuda_graphs.SIZES)
    assert all(stop - start == cuda_graphs.SIZES[-1] for start, stop, _ in parts[:-1])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        return rows.float() * torch.tensor([1.0, 2.0, 3.0]), numbers + 1


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.integers(0, 1 << 32))
def test_padding_and_splitting_change_no_answer(counts: list[int], seed: int) -> None:
    """One after the other, so that rows of an earlier batch are still there when the next is filled up."""
    random = np.random.default_rng(seed)
    schema = {
        "one": Column(shape=(3,), dtype="uint8", role="features"),
        "two": Column(shape=(), dtype="int32", role=""),
    }
    recorded = cuda_graphs.CapturedModel(Scaled(), schema, ("scaled", "next"), "float32", torch.device("cpu"))
    for count in counts:
        rows = random.integers(0, 256, (count, 3), np.uint8)
        numbers = random.integers(0, 1000, count, np.int32)
        answers = recorded({"two": numbers, "one": rows})
        np.testing.assert_array_equal(answers["scaled"], rows * np.array([1, 2, 3], np.float32))
        np.testing.assert_array_equal(answers["next"], numbers + 1)
    assert set(recorded.graphs) == {size for count in counts for *_, size in cuda_graphs.split_batch(count)}


def test_answers_in_bfloat16_with_weights_cast_once(saved: SavedModel, rows: np.ndarray, place: Path) -> None:
    model = cuda_graphs.prepare_model(saved, "bfloat16", torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    loaded = cuda_graphs.load(place / "run" / "model", "bfloat16", HERE)
    expected = compute(InferenceModule(saved), rows)
    probabilities = loaded.answer({"image": rows})["probabilities"]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)  # the softmax is in float32
    assert 0 < drift(probabilities, expected) <= DRIFT["bfloat16"]
    np.testing.assert_allclose(loaded.answer({"image": rows[:3]})["probabilities"], probabilities[:3], atol=1e-2)
    assert loaded.find_precision({"image": rows[:1]}) == "bfloat16"
    assert {parameter.dtype for parameter in saved.module.parameters()} == {torch.float32}  # it got a copy


def test_float32_answers_as_the_model_does(saved: SavedModel, rows: np.ndarray, place: Path) -> None:
    loaded = cuda_graphs.load(place / "run" / "model", "float32", HERE)
    expected = compute(InferenceModule(saved), rows)
    np.testing.assert_allclose(loaded.answer({"any name": rows})["probabilities"], expected, atol=1e-5)
    assert loaded.find_precision({"image": rows[:1]}) == "float32"


class Mixed(nn.Module):
    """Has a float32 tensor that isn't a weight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs) @ torch.eye(10)


def test_a_network_that_mixes_dtypes_gets_autocast(saved: SavedModel, rows: np.ndarray) -> None:
    mixed = SavedModel(
        module=Mixed(saved.module).eval(),
        preprocess=saved.preprocess,
        task=saved.task,
        recipe=saved.recipe,
        card={},
    )
    model = cuda_graphs.prepare_model(mixed, "bfloat16", torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    probabilities = compute(model, rows)
    assert probabilities.dtype == np.float32
    assert drift(probabilities, compute(InferenceModule(saved), rows)) <= DRIFT["bfloat16"]
    assert eager.network_precision(model, lambda: model(torch.from_numpy(rows))) == "bfloat16"


def test_an_error_of_the_network_is_not_hidden(saved: SavedModel) -> None:
    class Broken(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no use for {inputs.dtype}")

    broken = SavedModel(
        module=Broken(),
        preprocess=saved.preprocess,
        task=saved.task,
        recipe=saved.recipe,
        card={},
    )
    with pytest.raises(RuntimeError, match="no use for"):
        cuda_graphs.prepare_model(broken, "bfloat16", torch.device("cpu"))


@pytest.mark.parametrize("precision", cuda_graphs.ENGINE.precisions)
def test_cuda_graphs_need_an_nvidia_gpu(precision: str) -> None:
    assert cuda_graphs.why_not(CPU, precision) == "needs an NVIDIA GPU"
    assert cuda_graphs.why_not(MAC, precision) == "needs an NVIDIA GPU"
    assert cuda_graphs.why_not(H100, precision) is None
    assert (cuda_graphs.why_not(PASCAL, precision) is None) == (precision == "float32")


# --- PyTorch's switches ---


def switches() -> tuple[str, ...]:
    backends = torch.backends
    return tuple(
        place.fp32_precision
        for place in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize(
    ("precision", "switch"), [("float32", "ieee"), ("tfloat32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee")]
)
def test_float32_is_exact_on_a_gpu_unless_tf32_is_requested(precision: str, switch: str) -> None:
    before = switches()
    with eager.tf32_switch(precision, "cuda"):
        assert switches() == (switch,) * 3
    assert switches() == before
    with eager.tf32_switch(precision, "cpu"):
        assert switches() == before


@pytest.mark.parametrize("layer", [nn.Linear(1, 1), nn.Conv2d(1, 1, 1)], ids=["linear", "conv"])
def test_the_precision_of_a_layer_follows_the_switch(layer: nn.Module) -> None:
    with eager.tf32_switch("tfloat32", "cuda"):
        assert eager.layer_precision(layer, torch.float32, "cuda") == "tfloat32"
        assert eager.layer_precision(layer, torch.float16, "cuda") == "float16"
        assert eager.layer_precision(layer, torch.float32, "cpu") == "float32"
    with eager.tf32_switch("float32", "cuda"):
        assert eager.layer_precision(layer, torch.float32, "cuda") == "float32"


def test_eager_has_tfloat32_on_gpus_only() -> None:
    assert eager.why_not(H100, "tfloat32") is None
    assert eager.why_not(CPU, "tfloat32") == f"{CPU.name} has no tfloat32 of its own"


# --- the graphs for TensorRT ---


def given_types(model: Any) -> set[str]:
    """Of the operations that read an input of the graph."""
    names = {value.name for value in model.graph.input}
    return {node.op_type for node in model.graph.node if names.intersection(node.input)}


@pytest.mark.parametrize("precision", tensorrt.ENGINE.precisions)
def test_a_graph_is_valid_and_answers_as_the_model_does(
    precision: str, place: Path, rows: np.ndarray, tmp_path: Path
) -> None:
    original = onnx.load(place / "model.onnx")
    assert "Reshape" in given_types(original)  # else the cast needn't be moved any longer
    model = _tensorrt_graph.prepare_graph(material(place), precision, tmp_path)
    onnx.checker.check_model(model, full_check=True)
    assert given_types(model) == {"Cast"}
    assert model.graph.node[0].op_type == "Cast"
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    expected = answers(original, rows)
    for batch in (1, 3, 64):
        probabilities = answers(model, rows[:batch])
        assert probabilities.dtype == np.float32
        assert drift(probabilities, expected[:batch]) <= DRIFT[precision]
    if precision in ("float32", "tfloat32"):
        np.testing.assert_allclose(probabilities, expected[:64], atol=1e-6)


def heavy(model: Any) -> list[Any]:
    nodes = [node for node in model.graph.node if node.op_type in onnx_engine.QUANTIZED]
    assert nodes
    return nodes


def test_float16_reaches_every_product_and_leaves_the_softmax(place: Path, tmp_path: Path) -> None:
    model = _tensorrt_graph.prepare_graph(material(place), "float16", tmp_path)
    assert not any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in model.graph.initializer)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert {types[node.output[0]] for node in heavy(model)} == {onnx.TensorProto.FLOAT16}
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert types[softmax.input[0]] == onnx.TensorProto.FLOAT


def test_int8_is_signed_symmetric_and_on_inputs_only(place: Path, tmp_path: Path) -> None:
    model = _tensorrt_graph.prepare_graph(material(place), "int8", tmp_path)
    made_by = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    steps = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in steps:
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    weights = set()
    for node in heavy(model):
        for name in node.input[:2]:
            step = made_by[name]
            assert step.op_type == "DequantizeLinear"
            assert made_by[step.input[0]].op_type == "QuantizeLinear"
        assert all(name in constants for name in node.input[2:])  # biases
        weights.add(made_by[node.input[1]].input[1])
        assert not any(u.op_type == "QuantizeLinear" for u in model.graph.node if node.output[0] in u.input)
    assert any(constants[name].size > 1 for name in weights)  # a scale for each channel


def test_int8_leaves_kept_layers_alone(place: Path, tmp_path: Path) -> None:
    first = heavy(onnx.load(place / "model.onnx"))[0]
    model = _tensorrt_graph.prepare_graph(material(place, kept=(first.name,)), "int8", tmp_path)
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in heavy(model):
        assert (made_by[node.input[0]] == "DequantizeLinear") == (node.name != first.name)


def test_a_graph_of_token_ids_keeps_its_input(tmp_path: Path) -> None:
    kind = registry.load("preprocess", "text")
    words = tuple(f"w{number}" for number in range(50))
    preprocess = kind(vocabulary=words, length=12)
    torch.manual_seed(0)
    network = registry.load("models", "text_cnn").build(classes=3, **preprocess.model_args)
    model = SavedModel(
        module=network.eval(),
        preprocess=preprocess,
        task=registry.load("tasks", "classification").of(("a", "b", "c"), {}),
        recipe=Recipe(model="text_cnn"),
        card={},
    )
    write_onnx(model, tmp_path / "model.onnx")
    ids = np.random.default_rng(0).integers(0, 52, (16, 12), np.int32)
    expected = answers(onnx.load(tmp_path / "model.onnx"), ids)
    graph = _tensorrt_graph.prepare_graph(
        EngineInputs(model=None, onnx=tmp_path / "model.onnx", calibration=None), "float16", tmp_path
    )
    onnx.checker.check_model(graph, full_check=True)
    assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32
    assert drift(answers(graph, ids), expected) <= DRIFT["float16"]


def graph_of(nodes: list[Any], constants: dict[str, np.ndarray], *, of: int, to: tuple[int, ...] = (2, 3)) -> Any:
    """A graph from "rows" (batch, 2, 3) of type `of` to float32 "probabilities" (batch, *to)."""
    helper = onnx.helper
    return helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("rows", of, ["batch", 2, 3])],
            [helper.make_tensor_value_info("probabilities", 1, ["batch", *to])],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


MOVES = {
    "Reshape": (["flat"], {}),
    "Transpose": ([], {"perm": [0, 2, 1]}),
    "Identity": ([], {}),
    "Unsqueeze": (["axis"], {}),
    "Flatten": ([], {}),
}
CONSTANTS = {"flat": np.array([-1, 6]), "axis": np.array([1]), "one": np.array(1.5, np.float32)}


@given(
    st.lists(st.sampled_from(["Reshape", "Identity", "Unsqueeze", "Flatten"]), max_size=4),
    st.booleans(),
    st.sampled_from(["FLOAT", "INT64", "both"]),
    st.integers(1, 5),
)
def test_moving_the_cast_changes_no_answer(moves: list[str], transposed: bool, cast: str, batch: int) -> None:
    helper, types = onnx.helper, onnx.TensorProto
    nodes, last = [], "rows"
    for number, kind in enumerate([*["Transpose"] * transposed, *moves]):
        more, attributes = MOVES[kind]
        nodes.append(helper.make_node(kind, [last, *more], [f"moved{number}"], **attributes))
        last = f"moved{number}"
    if cast in ("FLOAT", "both"):
        nodes.append(helper.make_node("Cast", [last], ["floating"], to=types.FLOAT))
    if cast in ("INT64", "both"):
        nodes += [
            helper.make_node("Cast", [last], ["integer"], to=types.INT64),
            helper.make_node("Cast", ["integer"], ["again"], to=types.FLOAT),
        ]
    ends = {"FLOAT": ["floating", "one"], "INT64": ["again", "one"], "both": ["floating", "again"]}
    nodes += [
        helper.make_node("Mul", ends[cast], ["product"]),
        helper.make_node("Reshape", ["product", "flat"], ["probabilities"]),
    ]
    model = graph_of(nodes, CONSTANTS, of=types.UINT8, to=(6,))
    rows = np.random.default_rng(batch).integers(0, 256, (batch, 2, 3), np.uint8)
    expected = answers(model, rows)
    _tensorrt_graph.cast_inputs_first(model)
    onnx.checker.check_model(model, full_check=True)
    assert given_types(model) == {"Cast"}
    readers = [node for node in model.graph.node if "rows" in node.input]
    assert [node.attribute[0].i for node in readers] == [types.FLOAT]
    np.testing.assert_array_equal(answers(model, rows), expected)


def test_computing_with_uint8_is_refused() -> None:
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Add", ["rows", "two"], ["sum"], name="brighter"),
        helper.make_node("Cast", ["sum"], ["probabilities"], to=types.FLOAT),
    ]
    model = graph_of(nodes, {"two": np.array(2, np.uint8)}, of=types.UINT8)
    with pytest.raises(MachineError, match="Add 'brighter' uses uint8"):
        _tensorrt_graph.cast_inputs_first(model)


def test_float16_keeps_float32_inputs_and_outputs() -> None:
    """And an output that another operation reads, too."""
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Mul", ["rows", "factor"], ["probabilities"]),
        helper.make_node("Mul", ["probabilities", "factor"], ["twice"]),
    ]
    model = graph_of(nodes, {"factor": np.array([0.5, 1e9, -1e9], np.float32)}, of=types.FLOAT)
    model.graph.output.append(helper.make_tensor_value_info("twice", types.FLOAT, ["batch", 2, 3]))
    _tensorrt_graph.convert_to_float16(model)
    onnx.checker.check_model(model, full_check=True)
    (factor,) = model.graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(factor), np.array([0.5, 65504, -65504], np.float16))
    output = answers(model, np.ones((4, 2, 3), np.float32))
    assert output.dtype == np.float32
    np.testing.assert_array_equal(output[0, 0], [0.5, 65504, -65504])


def test_float16_keeps_infinity() -> None:
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("Add", ["rows", "mask"], ["probabilities"])]
    model = graph_of(nodes, {"mask": np.array([0, -np.inf, 0], np.float32)}, of=types.FLOAT)
    _tensorrt_graph.convert_to_float16(model)
    assert np.isneginf(answers(model, np.ones((1, 2, 3), np.float32))[..., 1]).all()


# --- what TensorRT says of its layers ---


def layer(kind: str, tactic: str = "", **tensor: str) -> dict[str, Any]:
    return {"Name": "n", "LayerType": kind, "Inputs": [{"Name": "x", **tensor}], "TacticName": tactic}


TENSORRT_10 = "Format/Datatype"
XMMA = "sm80_xmma_gemm_f32f32_{}_f32_nn_n_tilesize64x128x16_stage4_warpsize2x2x1_tensor16x8x8"


@pytest.mark.parametrize(
    ("described", "precision"),
    [
        (layer("CaskConvolution", **{TENSORRT_10: "Thirty-two wide channel vectorized row major Int8 format"}), "int8"),
        (layer("CaskConvolution", **{TENSORRT_10: "Channel major FP16 format where channel % 8 == 0"}), "float16"),
        (layer("gemm", "ampere_h16816gemm_256x128_ldg8_nn_v1", **{TENSORRT_10: "Half"}), "float16"),
        (layer("gemm", **{TENSORRT_10: "BFloat16"}), "bfloat16"),
        (layer("CaskGemmConvolution", XMMA.format("tf32f32"), **{TENSORRT_10: "Row major linear FP32"}), "tfloat32"),
        (layer("CaskGemmConvolution", XMMA.format("f32f32"), **{TENSORRT_10: "Row major linear FP32"}), "float32"),
        (layer("gemm", "ampere_s1688gemm_64x64_nn", **{TENSORRT_10: "Float"}), "tfloat32"),
        (layer("gemm", "sm80_xmma_gemm_f16f16_f16f32_f32", DataType="Half", Format="kLINEAR"), "float16"),
        (layer("gemm", DataType="Float", Format="Row major linear FP32 format (kLINEAR)"), "float32"),
        (layer("CaskConvolution", **{TENSORRT_10: "N/A due to dynamic shapes"}), tensorrt.UNKNOWN),
    ],
)
def test_a_layers_precision_is_that_of_what_it_multiplies(described: dict[str, Any], precision: str) -> None:
    assert tensorrt.plan_precision({"Layers": [described]}) == precision


def test_most_layers_decide_and_only_the_heavy_ones() -> None:
    half, single = {TENSORRT_10: "Half"}, {TENSORRT_10: "Float"}
    light = [layer(kind, "sm50_xmma_pooling_fw", **single) for kind in ("CaskPooling", "Reformat", "kgen", "NoOp")]
    inspection = {"Layers": [*light, layer("gemm", **half), layer("gemm", **half), layer("CaskConvolution", **single)]}
    assert tensorrt.plan_precision(inspection) == "float16"
    assert tensorrt.plan_precision({"Layers": light}) == tensorrt.UNKNOWN
    assert tensorrt.plan_precision({"Layers": ["only names, without details"]}) == tensorrt.UNKNOWN


# --- where they can't be used ---


@pytest.mark.parametrize("precision", tensorrt.ENGINE.precisions)
def test_tensorrt_says_what_is_missing(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    installed: dict[str, str | None] = {"tensorrt": None}

    def version(package: str) -> str:
        if package not in installed:
            return real(package)
        if installed[package] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return str(installed[package])

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert tensorrt.why_not(CPU, precision) == "needs an NVIDIA GPU"
    assert "not installed: tensorrt" in str(tensorrt.why_not(H100, precision))
    for old in ("9.3.0", "12.0.1", "unknown"):
        installed["tensorrt"] = old
        assert tensorrt.why_not(H100, precision) == f"written for TensorRT 10 and 11, not {old}"
    for good in ("10.0.1", "10.16.1.11", "11.4.1"):
        installed["tensorrt"] = good
        assert tensorrt.why_not(H100, precision) is None
        assert (tensorrt.why_not(PASCAL, precision) is None) == (precision == "float32")
    assert not tensorrt.ENGINE.portable


def test_onnx_runtime_has_int8_on_the_cpu_and_tf32_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onnx_engine.why_not(CPU, "int8") is None
    assert onnx_engine.why_not(CPU, "float32") is None
    assert onnx_engine.why_not(CPU, "tfloat32") == f"{CPU.name} has no tfloat32 of its own"
    assert "CPU and NVIDIA" in str(onnx_engine.why_not(MAC, "float32"))
    if onnx_engine.CUDA not in onnxruntime.get_available_providers():
        assert "not installed: onnxruntime-gpu" in str(onnx_engine.why_not(H100, "float32"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnx_engine.CUDA, "CPUExecutionProvider"])
    assert onnx_engine.why_not(H100, "float32") is None
    assert onnx_engine.why_not(H100, "tfloat32") is None
    assert onnx_engine.why_not(PASCAL, "tfloat32") is not None
    assert onnx_engine.why_not(H100, "int8") is not None


def test_onnx_runtime_gets_the_gpu_and_the_tf32_switch() -> None:
    assert onnx_engine.providers("float32", H100) == [(onnx_engine.CUDA, {"device_id": "1", "use_tf32": "0"})]
    assert onnx_engine.providers("tfloat32", PASCAL) == [(onnx_engine.CUDA, {"device_id": "0", "use_tf32": "1"})]
    assert onnx_engine.providers("int8", CPU) == [("CPUExecutionProvider", {})]


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # what the runtime would leave it at
def test_onnx_runtime_does_not_fall_back_to_the_cpu(place: Path, tmp_path: Path) -> None:
    if onnx_engine.CUDA in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime can use CUDA")
    on_gpu = Placement(device=H100, threads=1)
    onnx_engine.build(material(place), "float32", tmp_path, on_gpu)
    with pytest.raises(MachineError, match="ONNX Runtime can't use NVIDIA H100"):
        onnx_engine.load(tmp_path, "float32", on_gpu)


def test_where_products_ran_is_read_from_the_runtimes_profile(place: Path, rows: np.ndarray, tmp_path: Path) -> None:
    settings = onnx_engine.options(1)
    settings.enable_profiling = True
    settings.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(place / "model.onnx", settings, providers=["CPUExecutionProvider"])
    session.run(None, {"image": rows[:2]})
    events = json.loads(Path(session.end_profiling()).read_text())
    places = onnx_engine.count_by_provider(events)
    assert set(places) == {"CPUExecutionProvider"}
    assert places.total() >= len(heavy(onnx.load(place / "model.onnx")))
