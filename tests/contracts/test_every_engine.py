"""What every engine promises: it says where it can't be used, and elsewhere answers as the model does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import suanli
from pair_model import saved_pair
from served import digits_run
from suanli.core import registry
from suanli.core.schema import Arrays, random_inputs
from suanli.core.task import Task
from suanli.core.types import Device, Engine, Placement
from suanli.engines.acceptance import DRIFT, LISTS, STEADY
from suanli.engines.differences import LIST_DRIFT, largest_difference, value_range
from suanli.engines.examples import SeparateExamples, StackedExamples, load_examples
from suanli.engines.inference_module import InferenceModule, to_arrays, to_tensors, write_onnx
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine.device import detect
from suanli.models.model_folder import load_model
from task_samples import SAMPLES

HERE = detect("cpu")
DEVICES = (
    HERE,
    Device(name="an old CPU", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32",)),
    Device(name="a GPU", torch_name="cuda:1", memory_bytes=80 << 30, fast_dtypes=("float32", "float16", "bfloat16")),
    Device(name="a Mac's GPU", torch_name="mps", memory_bytes=None, fast_dtypes=("float32", "float16")),
)
ENGINES: dict[str, Engine] = registry.load_all("engines")
PLACEMENT = asdict(Placement(device=HERE, threads=1, trust_code=True))
SLOW = ("aot_inductor", "inductor")  # they compile, as they do in test_optimize.py: here in `make long`


def marks(engine: Engine) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] if engine.name in SLOW else []


PAIRS = [
    pytest.param(engine, precision, id=f"{engine.name}-{precision}", marks=marks(engine))
    for engine in ENGINES.values()
    for precision in engine.precisions
]


@dataclass(frozen=True, kw_only=True)
class Subject:
    folder: Path  # with `model`, `model.onnx`, `calibration` and `examples`
    reference: Arrays  # the answers of the model itself
    task: Task


def prepare_subject(folder: Path, inputs: Arrays, calibration: Arrays) -> Subject:
    saved = load_model(folder / "model", trust_code=True)
    write_onnx(saved, folder / "model.onnx")
    StackedExamples(arrays=calibration).save(folder / "calibration")
    StackedExamples(arrays=inputs).save(folder / "examples")
    module = InferenceModule(saved)
    with torch.inference_mode():
        answers = to_arrays(module.outputs, module(*to_tensors(inputs, tuple(inputs))))
    return Subject(folder=folder, reference=answers, task=saved.task)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A trained classifier with one input and one output."""
    place, trained = tmp_path_factory.mktemp("engines"), digits_run(tmp_path_factory)
    shutil.copytree(trained / "model", place / "model")
    prepared = suanli.prepare("digits", settings={}, cache_dir=trained.parent / "cache")
    inputs = [
        {name: column[split.index[:count]] for name, column in split.inputs.items()}
        for split, count in ((prepared.splits["val"], 40), (prepared.splits["train"], 100))
    ]
    return prepare_subject(place, *inputs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with saved_pair(tmp_path_factory.mktemp("pair")) as folder:
        columns = load_model(folder / "model", trust_code=True).preprocess.inputs
        yield prepare_subject(folder, *(random_inputs(columns, count) for count in (40, 100)))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A trained detector."""
    place, sample = tmp_path_factory.mktemp("objects"), SAMPLES["detection"]
    (place / "data").mkdir()
    data = sample.write(place / "data")
    trained = suanli.train(data, settings=sample.settings, speedups="none", threads=1, out=place / "run")
    shutil.copytree(trained.model_path, place / "model")
    prepared = suanli.prepare(data, settings=sample.settings)
    inputs = [
        {name: column[split.index[:count]] for name, column in split.inputs.items()}
        for split, count in ((prepared.splits["train"], 40), (prepared.splits["train"], 100))
    ]
    return prepare_subject(place, *inputs)


@pytest.mark.parametrize("name", registry.names("engines"))
def test_has_the_name_of_its_file(name: str) -> None:
    engine = ENGINES[name]
    assert engine.name == name
    assert engine.precisions
    assert len(set(engine.precisions)) == len(engine.precisions)
    assert set(engine.precisions) <= STEADY.keys() & DRIFT.keys()


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_says_where_it_cannot_be_used(engine: Engine, precision: str, device: Device) -> None:
    reason = engine.why_not(device, precision)
    assert reason is None or (reason.strip() == reason and 0 < len(reason) < 300 and not reason.endswith("."))
    if precision not in ("float32", "int8") and precision not in device.fast_dtypes:
        assert reason is not None


@contextmanager
def loaded(engine: Engine, precision: str, inputs: dict[str, object], place: Path) -> Iterator[Sandbox]:
    """A sandbox with the engine, built in another."""
    folder = place / "engine"
    folder.mkdir()
    what = {"engine": engine.name, "precision": precision, "folder": str(folder), "placement": PLACEMENT}
    with Sandbox() as builder:
        builder.ask(200, "build", inputs=inputs, **what)
    assert any(folder.iterdir())
    with Sandbox() as sandbox:
        sandbox.ask(200, "load", **what)
        yield sandbox


@pytest.mark.parametrize("subject", ["digits", "pair", pytest.param("objects", marks=pytest.mark.long)])
@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_answers_as_the_model_does(
    engine: Engine, precision: str, subject: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In a sandbox: the same answers at every batch size, in the precision that it claims."""
    if reason := engine.why_not(HERE, precision):
        pytest.skip(reason)
    of: Subject = request.getfixturevalue(subject)
    examples, outputs = str(of.folder / "examples"), list(of.task.outputs)
    inputs = {
        "model": str(of.folder / "model"),
        "onnx": str(of.folder / "model.onnx"),
        "calibration": str(of.folder / "calibration"),
        "kept": [],
        "batches": True,
    }
    answers = {}
    with loaded(engine, precision, inputs, tmp_path) as sandbox:
        for batch in (1, 3, 40):
            out = tmp_path / str(batch)
            what = {"threads": 1, "examples": examples, "outputs": outputs, "count": 40}
            sandbox.ask(60, "answer", batch=batch, out=str(out), **what)
            (answers[batch],) = load_examples(out).blocks()
        assert sandbox.ask(60, "find_precision", threads=1, examples=examples)["precision"] == precision
        assert sandbox.ask(60, "memory", placement=PLACEMENT)["bytes"] > 10_000_000
    ranges = value_range(StackedExamples(arrays=of.reference), of.task.listed)
    for name, column in of.task.outputs.items():
        assert answers[40][name].shape == (40, *column.shape)
        assert answers[40][name].dtype == column.dtype
    for batch in (1, 3):
        assert largest_difference(answers[40], answers[batch], ranges) <= STEADY[precision]
        assert not of.task.listed or of.task.drift(answers[40], answers[batch]).mean() <= LIST_DRIFT
    allowed = DRIFT[precision] * (LISTS if of.task.listed and precision != "float32" else 1)
    assert of.task.drift(of.reference, answers[40]).mean() <= allowed


def make_stream(path: Path) -> Callable[[Arrays], Arrays]:
    """A graph without a batch: samples of any length, a state (1, 1, 4) and a rate without an axis become as many
    levels and the next state. Returns what it computes."""
    onnx = pytest.importorskip("onnx")
    helper, single, integer = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32) / 2
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["samples", "weight"], ["raw"], name="product"),
            helper.make_node("Add", ["raw", "state"], ["moved"]),
            helper.make_node("Tanh", ["moved"], ["levels"]),
            helper.make_node("ReduceMean", ["levels"], ["mean"], axes=[1], keepdims=1),
            helper.make_node("Cast", ["rate"], ["factor"], to=single),
            helper.make_node("Mul", ["mean", "factor"], ["next_state"]),
        ],
        "stream",
        [
            helper.make_tensor_value_info("samples", single, [1, "time", 6]),
            helper.make_tensor_value_info("state", single, [1, 1, 4]),
            helper.make_tensor_value_info("rate", integer, []),
        ],
        [
            helper.make_tensor_value_info("levels", single, [1, "time", 4]),
            helper.make_tensor_value_info("next_state", single, [1, 1, 4]),
        ],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)

    def compute(arrays: Arrays) -> Arrays:
        levels = np.tanh(arrays["samples"] @ weight + arrays["state"])
        return {"levels": levels, "next_state": levels.mean(1, keepdims=True) * arrays["rate"]}

    return compute


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("engine", [e for e in ENGINES.values() if e.needs == "onnx"], ids=lambda engine: engine.name)
def test_answers_single_calls_of_any_shape(engine: Engine, precision: str, tmp_path: Path) -> None:
    if reason := engine.why_not(HERE, precision):
        pytest.skip(reason)
    compute = make_stream(tmp_path / "stream.onnx")
    random = np.random.default_rng(1)
    calls = [
        {
            "samples": random.standard_normal((1, length, 6)).astype(np.float32),
            "state": random.standard_normal((1, 1, 4)).astype(np.float32),
            "rate": np.array(length % 3 + 1),
        }
        for length in (1, 64, 7, 1, 200)
    ]
    examples = SeparateExamples(calls=calls)
    examples.save(tmp_path / "examples")
    inputs = {
        "model": None,
        "onnx": str(tmp_path / "stream.onnx"),
        "calibration": str(tmp_path / "examples"),
        "kept": [],
        "batches": False,
    }
    with loaded(engine, precision, inputs, tmp_path) as sandbox:
        what = {"threads": 1, "examples": str(tmp_path / "examples")}
        outputs = ["next_state", "levels"]
        sandbox.ask(60, "answer", outputs=outputs, count=4, batch=1, out=str(tmp_path / "answers"), **what)
        assert sandbox.ask(60, "find_precision", **what)["precision"] == precision
        reply = sandbox.ask(60, "time", batch=1, for_s=0, warm_up=1, least=7, **what)
        assert len(reply["seconds"]) == 7
        with pytest.raises(SandboxError, match="each has its own shapes"):
            sandbox.ask(60, "answer", outputs=outputs, count=4, batch=2, out=str(tmp_path / "no"), **what)
    answers = load_examples(tmp_path / "answers")
    assert len(answers) == 4
    for number, call in enumerate(calls[:4]):
        answer = answers.batch(number, number + 1)
        assert list(answer) == outputs
        for name, expected in compute(call).items():
            assert answer[name].shape == expected.shape
            gaps = np.abs(answer[name] - expected)
            assert gaps.max() < 1e-5 if precision == "float32" else gaps.mean() < 0.15
