"""What the search for engines refuses, for tasks of any kind: with labels by their metric, without by the answers."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from short_timing import time_shortly
from suanli.core.schema import Arrays, Column
from suanli.core.task import Task
from suanli.engines.candidates import Candidate, SearchResult
from suanli.engines.examples import Examples, SeparateExamples, StackedExamples
from suanli.engines.search import EngineSearch
from suanli.engines.subject import Origin, Subject
from suanli.machine import device
from suanli.models.model_folder import build_task
from suanli.tasks.regression import Regression
from suanli.tasks.tensors import Tensors
from suanli.verbs._engine_table import engine_table

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FEATURES = 6
PRICES = Regression(mean=300_000.0, spread=50_000.0)
CLASSES = build_task("classification", ("ant", "bee", "cat"), {})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    time_shortly(monkeypatch)


@pytest.fixture
def engine(engine_folder: Callable[[str, str], str]) -> Callable[..., str]:
    """Registers ONNX Runtime with something wrong: `change(name, array)` is what becomes of each output. It claims
    bfloat16, whose rounding would explain a difference of 2 %."""

    def register(name: str, change: str, *, precision: str = "bfloat16") -> str:
        return engine_folder(
            name,
            f"""
from dataclasses import replace
import numpy as np
from suanli.core.types import LoadedEngine
from suanli.engines.backends import onnxruntime as real
random = np.random.default_rng(0)
def change(name, a):
    {change}
def load(folder, precision, placement):
    loaded = real.load(folder, precision, placement)
    answer = lambda arrays: {{name: change(name, a) for name, a in loaded.answer(arrays).items()}}
    return LoadedEngine(answer=answer, find_precision=lambda arrays: precision)
ENGINE = replace(real.ENGINE, name={name!r}, precisions=({precision!r},), load=load, why_not=lambda *a: None)
""",
        )

    return register


def write_graph(path: Path, task: Task, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A linear model from "x" (B, 6) to the task's output. Returns what it computes."""
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    (name,) = task.outputs
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["raw"], name="product")]
    if task is PRICES:
        nodes += [
            helper.make_node("Mul", ["raw", "spread"], ["scaled"]),
            helper.make_node("Add", ["scaled", "mean"], ["placed"]),
            helper.make_node("Squeeze", ["placed", "axis"], [name]),
        ]
    else:
        nodes += [helper.make_node("Softmax", ["raw"], [name], axis=1)]
    constants = {
        "weights": weights.astype(np.float32),
        "spread": np.float32(PRICES.spread),
        "mean": np.float32(PRICES.mean),
        "axis": np.array([1]),
    }
    sides = ["batch"] if task is PRICES else ["batch", 3]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", single, ["batch", FEATURES])],
        [helper.make_tensor_value_info(name, single, sides)],
        [onnx.numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return lambda x: (x @ weights)[:, 0] * PRICES.spread + PRICES.mean


def search(
    folder: Path,
    task: Task,
    examples: Examples,
    engines: str,
    *,
    origin: Origin,
    tolerance: float | None = None,
    **of: Any,
) -> tuple[SearchResult, dict[str, Candidate]]:
    (folder / "work").mkdir()
    subject = Subject(
        model=None,
        graph=folder / "graph.onnx",
        task=task,
        examples=examples,
        origin=origin,
        count=len(examples),
        calibration=examples.first(8),
        **of,
    )
    result = EngineSearch(
        subject,
        device.detect("cpu"),
        folder / "work",
        goal="latency",
        tolerance=tolerance,
        budget_s=300,
        engines=engines.split(","),
    ).search()
    return result, {c.engine: c for c in result.candidates[1:]}


def linear_examples(random: np.random.Generator, count: int) -> StackedExamples:
    return StackedExamples(arrays={"x": random.standard_normal((count, FEATURES)).astype(np.float32)})


def table_of(result: SearchResult, task: Task) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(engine_table(result, task.metric, Path("engines")))
    return console.export_text()


def test_a_metric_where_lower_is_better(engine: Callable[..., str], tmp_path: Path) -> None:
    """Prices of about 300,000: what counts is by how much of the error the error grows, not the size of the numbers."""
    random = np.random.default_rng(0)
    compute = write_graph(tmp_path / "graph.onnx", PRICES, random.normal(0, 0.4, (FEATURES, 1)))
    examples = linear_examples(random, 400)
    targets = {"value": (compute(examples.arrays["x"]) + random.normal(0, 2_000, 400)).astype(np.float32)}
    engine("rounds", "return a + random.normal(0, 0.03, a.shape).astype(a.dtype)", precision="float32")
    engine("shifts", "return a + 700")  # 1.4 % of the spread, which rounding to bfloat16 might explain
    engine("blurs", "return a + 20 * np.sign(a - 300_000)")
    engine("improves", "return a - np.float32(0.0)")
    engine("fails", "return 2 * a", precision="float32")
    names = "rounds,shifts,blurs,improves,fails"
    result, of = search(tmp_path, PRICES, examples, names, origin="labelled", targets=targets)
    assert of["rounds"].state == "accepted", of["rounds"]
    assert of["improves"].state == "accepted", of["improves"]
    assert of["blurs"].state == "accepted", of["blurs"]
    assert of["shifts"].state == "refused"
    assert of["shifts"].reason.startswith("mean_absolute_error +")
    assert of["fails"].state == "refused"
    assert "rounding doesn't explain" in of["fails"].reason
    reference = result.candidates[0]
    assert reference.score is not None
    assert 1_400 < reference.score < 1_800  # 2,000 times the square root of 2 / pi
    assert result.tolerance == pytest.approx(0.01 * reference.score)
    assert of["shifts"].difference is not None
    assert of["shifts"].difference.high < -result.tolerance
    text = table_of(result, PRICES)
    assert "mean_absolute_error" in text
    assert "400 validation examples" in text


def test_a_measured_loss_over_the_tolerance_is_not_chosen() -> None:
    """Also where lower scores are better, and without labels."""
    from suanli.core.types import Difference
    from suanli.engines.candidates import Estimate, choose, compute_speed, mark_best

    def candidate(name: str, seconds: float, **of: Any) -> Candidate:
        speed = compute_speed(1, 1, [seconds], [None])
        return Candidate(engine=name, precision="float32", state="accepted", speeds=(speed,), size_bytes=1, **of)

    worse, better = (Difference(median=m, low=m - 1, high=m + 1) for m in (-0.3, 0.2))
    candidates = [
        candidate("reference", 4.0, score=10.0, difference=Difference(median=0.0, low=0.0, high=0.0)),
        candidate("worse", 1.0, score=10.3, difference=worse),
        candidate("better", 2.0, score=9.8, difference=better),
    ]
    assert choose(candidates, "latency", 0.1, None).engine == "better"
    assert choose(candidates, "latency", 0.5, None).engine == "worse"
    assert [c.best for c in mark_best(candidates)] == [False, True, True]
    few = Estimate(name="same answer", value=0.97, low=0.9, high=1.0)
    candidates = [candidate("reference", 4.0), candidate("other", 1.0, agreement=few)]
    assert choose(candidates, "latency", 0.01, None).engine == "reference"
    assert choose(candidates, "latency", 0.05, None).engine == "other"


def test_without_labels_answers_are_compared(engine: Callable[..., str], tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    write_graph(tmp_path / "graph.onnx", CLASSES, random.normal(0, 1, (FEATURES, 3)))
    engine("same", "return a")
    engine("near", "return (a + 0.004) / 1.012")
    engine("swaps", "return np.where(np.modf(a[:, :1] * 997)[0] < 0.02, a[:, [1, 2, 0]], a)")  # one in fifty
    examples = linear_examples(random, 1500)
    result, of = search(tmp_path, CLASSES, examples, "same,near,swaps", origin="unlabelled")
    assert not result.labelled
    assert result.origin == "unlabelled"
    for name in ("same", "near"):
        assert of[name].state == "accepted", of[name]
        assert of[name].score is None
        (drift,) = of[name].drifts
        assert (drift.name, drift.value) == ("probabilities", of[name].drift)
        assert drift.low <= drift.value <= drift.high
    same, swaps = of["same"].agreement, of["swaps"].agreement
    assert same is not None
    assert (same.value, same.high) == (1, 1)
    assert 0.995 < same.low < 1
    assert of["swaps"].state == "refused"
    assert swaps is not None
    assert swaps.low < swaps.value < swaps.high < 0.995
    assert of["swaps"].reason.startswith(f"the same answer for {swaps.value:.2%} of the examples (")
    text = table_of(result, CLASSES)
    assert "the same answer for 100.00% of the examples" in text
    assert "1,500 examples without labels" in text
    assert "differs by" in text


def test_groups_are_drawn_together(engine: Callable[..., str], tmp_path: Path) -> None:
    """Answers that differ in whole groups are fewer independent ones."""
    random = np.random.default_rng(2)
    write_graph(tmp_path / "graph.onnx", CLASSES, random.normal(0, 1, (FEATURES, 3)))
    engine("blurs", "return np.where(np.abs(a).max(1, keepdims=True) > 0.8, (a + 0.01) / 1.03, a)")
    one = linear_examples(random, 20).arrays["x"]
    examples = StackedExamples(arrays={"x": np.repeat(one, 20, axis=0)})
    (tmp_path / "together").mkdir()
    shutil.copyfile(tmp_path / "graph.onnx", tmp_path / "together" / "graph.onnx")
    of = {"alone": None, "together": np.repeat(np.arange(20), 20)}
    widths = []
    for name, groups in of.items():
        folder = tmp_path if name == "alone" else tmp_path / name
        _, candidates = search(folder, CLASSES, examples, "blurs", origin="unlabelled", groups=groups)
        (drift,) = candidates["blurs"].drifts
        widths.append(drift.high - drift.low)
    assert widths[1] > 2 * widths[0]


def test_made_up_inputs_say_nothing_about_lower_precision(engine: Callable[..., str], tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    write_graph(tmp_path / "graph.onnx", CLASSES, random.normal(0, 1, (FEATURES, 3)))
    engine("same", "return a")
    engine("other", "return a + 0.002", precision="float32")
    result, of = search(tmp_path, CLASSES, linear_examples(random, 64), "same,other", origin="made up")
    assert of["same"].state == "impossible"
    assert "random inputs" in of["same"].reason
    assert of["other"].state == "refused"
    assert not result.candidates[0].drifts
    assert "random inputs" in table_of(result, CLASSES)


def test_rounding_may_swap_two_entries_of_a_list(engine: Callable[..., str], tmp_path: Path) -> None:
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "sides"], ["boxes"])],
        "boxes",
        [helper.make_tensor_value_info("x", single, ["batch", FEATURES])],
        [helper.make_tensor_value_info("boxes", single, ["batch", 2, 3])],
        [onnx.numpy_helper.from_array(np.array([-1, 2, 3]), "sides")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "graph.onnx")
    examples = linear_examples(np.random.default_rng(5), 1500)
    first = np.sort(examples.arrays["x"][:, 0])
    engine("swaps", f"return np.where(a[:, :1, :1] >= {first[-1]}, a[:, ::-1], a)", precision="float32")  # in one
    engine("repeats", "return np.repeat(a[:1], len(a), 0)", precision="float32")
    engine("flips", f"return np.where(a[:, :1, :1] >= {first[-30]}, a[:, ::-1], a)", precision="float32")
    for role, swaps in (("boxes", "accepted"), ("value", "refused")):
        folder = tmp_path / role
        folder.mkdir()
        shutil.copyfile(tmp_path / "graph.onnx", folder / "graph.onnx")
        task = Tensors(columns={"boxes": Column(shape=(2, 3), dtype="float32", role=role)}, spreads={"boxes": 1.0})
        _, of = search(folder, task, examples, "swaps,repeats,flips", origin="unlabelled")
        assert of["swaps"].state == swaps, of["swaps"]
        assert of["flips"].state == "refused"
        assert of["repeats"].reason.startswith("answers at batch 1 and 64 differ by")


def write_counter(path: Path) -> None:
    """A graph that answers one example at a time: from "x" (1, n, 2) to the rows whose first number is above 0, as many
    as there are, and to the mean of all numbers."""
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    constants = {"zero": np.float32(0), "first": np.array(0), "flat": np.array([-1]), "front": np.array([0])}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "first"], ["column"], axis=2),
            helper.make_node("Greater", ["column", "zero"], ["above"]),
            helper.make_node("Reshape", ["above", "flat"], ["mask"]),
            helper.make_node("Compress", ["x", "mask"], ["chosen"], axis=1),
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
        ],
        "counter",
        [helper.make_tensor_value_info("x", single, [1, "n", 2])],
        [
            helper.make_tensor_value_info("chosen", single, [1, "m", 2]),
            helper.make_tensor_value_info("mean", single, [1]),
        ],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


@pytest.mark.parametrize("lengths", [[6] * 40, [1, 9, 2, 8, 7] * 8], ids=["of one length", "of many"])
def test_answers_of_any_shape_to_single_calls(lengths: list[int], engine: Callable[..., str], tmp_path: Path) -> None:
    write_counter(tmp_path / "graph.onnx")
    columns = {
        "chosen": Column(shape=(None, 2), dtype="float32", role="value"),
        "mean": Column(shape=(), dtype="float32", role="value"),
    }
    task = Tensors(columns=columns, spreads={"chosen": 1.0, "mean": 0.2})
    random = np.random.default_rng(4)
    calls: list[Arrays] = [{"x": random.standard_normal((1, n, 2)).astype(np.float32)} for n in lengths]
    examples: Examples = SeparateExamples(calls=calls)
    if len(set(lengths)) == 1:
        examples = StackedExamples(arrays={"x": np.concatenate([call["x"] for call in calls])}, batches=False)
    engine("exact", "return a", precision="float32")
    engine("drops", "return a[:, :-1] if a.ndim == 3 and a.shape[1] > 3 else a")
    engine("blurs", "return a * np.float32(1.01) if name == 'mean' else a")
    engine("forgets", "return a[:, :0] if a.ndim == 3 else a", precision="float32")
    names = "exact,drops,blurs,forgets"
    result, of = search(tmp_path, task, examples, names, origin="unlabelled")
    assert of["exact"].state == "accepted", of["exact"]
    assert {speed.batch for speed in of["exact"].speeds} == {1}
    assert [drift.name for drift in of["blurs"].drifts] == ["chosen", "mean"]
    assert of["blurs"].drifts[0].value == 0
    assert of["blurs"].drifts[1].value == pytest.approx(of["blurs"].drift)
    assert of["blurs"].agreement is None
    assert of["forgets"].state == "refused"
    found = [int((call["x"][0, :, 0] > 0).sum()) for call in calls]
    assert of["drops"].drift == pytest.approx(np.mean([count > 3 for count in found]))
    assert math.isfinite(result.chosen.cost("latency"))
    assert "chosen: differs by 0 on average" in table_of(result, task)
