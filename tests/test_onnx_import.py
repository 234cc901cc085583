"""Networks that weren't trained here: ONNX files of any framework, and functions that build a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import suanli
from served import digits_run
from suanli.core.errors import DamagedFile, DataError, UsageError
from suanli.engines import onnx_import, timing
from suanli.models.model_folder import load_model

pytestmark = [  # torch's exporter uses what torch itself is about to give up
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "TURN_S", 0.02)


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


def answers(graph: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["rows"]
    assert [value.name for value in session.get_outputs()] == ["probabilities"]
    return np.asarray(session.run(None, {"rows": rows})[0])


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
    np.testing.assert_allclose(there.probabilities(row), here.probabilities(row), atol=1e-5)
    assert suanli.load("net-engines").predict(row[0])[0].label in [str(i) for i in range(10)]
    again = suanli.optimize(
        path, data="digits", mean=mean, std=std, engines="onnxruntime", cache_dir=trained.parent / "cache"
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
    imported = onnx_import.read(exported.path)
    saved = load_model(trained / "model")
    assert imported.preprocess == saved.preprocess
    assert imported.classes == saved.classes
    rows = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    expected = suanli.load(trained, engine="reference").probabilities(rows)
    np.testing.assert_allclose(answers(imported.graph, rows), expected, atol=1e-5)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("number", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_channels_last_of_another_framework(tmp_path: Path, softmax: bool, number: int, opset: int) -> None:
    weights = small(tmp_path / "net.onnx", softmax=softmax, number=number, opset=opset)
    imported = onnx_import.read(tmp_path / "net.onnx", mean=[0.25], std=[0.5])
    assert imported.count == 10
    assert imported.classes is None
    assert imported.preprocess.row_shape == (8, 8, 1)
    rows = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    logits = ((rows.reshape(3, 64) / 255 - 0.25) / 0.5) @ weights
    expected = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = answers(imported.graph, rows)
    np.testing.assert_allclose(
        probabilities, expected / expected.sum(1, keepdims=True), atol=2e-2 if number == 10 else 1e-4
    )


def test_an_open_size_has_to_be_given(tmp_path: Path) -> None:
    small(tmp_path / "net.onnx", shape=("n", "h", "w", 1))
    with pytest.raises(UsageError, match="--size"):
        onnx_import.read(tmp_path / "net.onnx")
    assert onnx_import.read(tmp_path / "net.onnx", size=(4, 16)).preprocess.row_shape == (4, 16, 1)


# --- what is refused ---


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"more_inputs": ("mask",)}, r"2 inputs \(pixels, mask\)"),
        ({"shape": (1, 8, 8, 1)}, "batches of 1 only"),
        ({"shape": ("n", 64)}, r"takes FLOAT \(\?, 64\)"),
        ({"shape": ("n", 8, 8, 7)}, r"takes FLOAT \(\?, 8, 8, 7\)"),
        ({"out": ("n", 10, 1)}, r"gives \(\?, 10, 1\)"),
        ({"out": ("n", 1)}, "not one number for each"),
        ({"out": ("n", "k")}, "not one number for each"),
    ],
)
def test_a_graph_of_another_form_is_refused(tmp_path: Path, graph: dict[str, object], message: str) -> None:
    small(tmp_path / "net.onnx", **graph)  # type: ignore[arg-type]
    with pytest.raises((DataError, DamagedFile), match=message):
        onnx_import.read(tmp_path / "net.onnx")


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
        onnx_import.read(tmp_path / "net.onnx")


def test_weights_in_another_file_that_is_gone(tmp_path: Path) -> None:
    small(tmp_path / "complete.onnx")
    onnx.save(
        onnx.load(tmp_path / "complete.onnx"), tmp_path / "net.onnx", save_as_external_data=True, location="net.data",
        size_threshold=0,
    )  # fmt: skip
    assert onnx_import.read(tmp_path / "net.onnx").count == 10
    (tmp_path / "net.data").unlink()
    with pytest.raises(DamagedFile, match="must lie beside it"):
        onnx_import.read(tmp_path / "net.onnx")


def test_options_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    small(tmp_path / "net.onnx")
    for options, message in (
        ({"mean": [0.5, 0.5, 0.5]}, "3 numbers; there are 1"),
        ({"std": [0.0]}, "above 0"),
        ({"size": "nine"}, "no size"),
        ({"size": "0"}, "no size"),
        ({"size": "16"}, "Leave --size out"),
        ({"weights": "w.safetensors"}, "--weights doesn't go"),
    ):
        with pytest.raises(UsageError, match=message):
            suanli.optimize(tmp_path / "net.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--mean doesn't go"):
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
