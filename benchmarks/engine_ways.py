"""The engines that `bench_engines.py` compares: each backend as its documentation describes it, and suanli's own.

Run as a module it is the process of one way: it answers the requests that the benchmark sends. It imports only what
its way needs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import suanli
from suanli.core.types import Json
from suanli.engines import sandbox
from suanli.machine import timing
from suanli.models.model_folder import load_model

if TYPE_CHECKING:
    from torch import nn

CALIBRATION = 300  # rows
BATCHES = (1, 64)
PIECES = (1, 8, 32)  # of 64 rows, for the queue
TOLERANCE = 0.005  # of accuracy

Answer = Callable[[np.ndarray], np.ndarray]
LoadedWay = tuple[Answer, str]  # and a remark


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a network, in a process of its own."""

    backend: str
    precision: str
    threads: int | None = None  # None: the backend chooses
    batches: tuple[int, ...] = BATCHES

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}" + (f", threads {self.threads}" if self.threads else "")

    @property
    def family(self) -> str:
        return self.backend.removesuffix(" queue")


def load_module(case: Path) -> nn.Module:
    from engine_nets import FromRows

    saved = load_model(case / "model", trust_code=True)
    about = saved.card["preprocess"]["settings"]
    return FromRows(saved.module, about["mean"], about["std"]).eval()


def load_eager(case: Path, way: Way) -> LoadedWay:
    import torch

    assert way.threads is not None
    torch.set_num_threads(way.threads)
    model = load_module(case).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def answer(rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(rows)).numpy()

    return answer, ""


def load_compiled(case: Path, way: Way) -> LoadedWay:
    """Source: "torch.compile" in PyTorch's documentation; `freezing` in torch._inductor.config."""
    import torch
    import torch._inductor.config

    assert way.threads is not None
    torch.set_num_threads(way.threads)
    torch._inductor.config.freezing = True
    module = load_module(case).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = torch.compile(module, dynamic=False)

    def answer(rows: np.ndarray) -> np.ndarray:
        lower = torch.autocast("cpu", torch.bfloat16, enabled=way.precision == "bfloat16")
        with torch.inference_mode(), lower:
            return model(torch.from_numpy(rows)).numpy()

    return answer, ""


def load_onnxruntime(case: Path, way: Way) -> LoadedWay:
    """Source: "Graph Optimizations" in ONNX Runtime's documentation. It chooses its number of threads itself."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    file = "onnxruntime-int8.onnx" if way.precision == "int8" else "plain.onnx"
    session = ort.InferenceSession(case / file, options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(None, {"rows": rows})[0], ""


def import_openvino() -> Any:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would report this import to a server
    import openvino

    return openvino


def compile_openvino(case: Path, way: Way, batch: int, hint: str) -> Any:
    """For one size of a batch. Sources: "Changing Input Shapes", "High-level Performance Hints" and "Precision Control"
    in OpenVINO's documentation."""
    core = import_openvino().Core()
    floating = {"float32": "f32", "bfloat16": "bf16"}
    file = "plain.onnx" if way.precision in floating else f"openvino-{way.precision}.xml"
    model = core.read_model(case / file)
    model.reshape([batch, *list(model.inputs[0].partial_shape)[1:]])
    settings = {"PERFORMANCE_HINT": hint}
    if way.precision in floating:
        settings["INFERENCE_PRECISION_HINT"] = floating[way.precision]
    return core.compile_model(model, "CPU", settings)


def load_openvino(case: Path, way: Way) -> LoadedWay:
    models = {batch: compile_openvino(case, way, batch, "LATENCY") for batch in way.batches}
    return lambda rows: models[len(rows)](rows)[0], ""


def load_openvino_queue(case: Path, way: Way) -> LoadedWay:
    """Source: "OpenVINO Runtime Python API", AsyncInferQueue. The best of several piece sizes is used."""
    rows = np.load(case / "rows.npy", mmap_mode="r", allow_pickle=False)[: BATCHES[-1]].copy()
    tried = {piece: make_queue(compile_openvino(case, way, piece, "THROUGHPUT"), piece) for piece in PIECES}
    took = timing.time_interleaved({piece: lambda work=work: work(rows) for piece, work in tried.items()}, rounds=5)
    best = min(took, key=lambda piece: statistics.median(took[piece]))
    return tried[best], f"pieces of {best}"


def make_queue(model: Any, piece: int) -> Answer:
    queue = import_openvino().AsyncInferQueue(model)
    classes = model.outputs[0].partial_shape[1].get_length()
    answers = np.empty((0, classes), np.float32)

    def keep(request: Any, start: int) -> None:
        answers[start : start + piece] = request.get_output_tensor(0).data

    queue.set_callback(keep)

    def answer(rows: np.ndarray) -> np.ndarray:
        nonlocal answers
        answers = np.empty((len(rows), classes), np.float32)
        for start in range(0, len(rows), piece):
            queue.start_async({0: rows[start : start + piece]}, start, share_inputs=True)
        queue.wait_all()
        return answers

    return answer


def load_suanli(case: Path, way: Way) -> LoadedWay:
    """suanli's own: the predictor of an optimised run. `precision` is the name of its folder: the goal, or "int8"."""
    predictor = suanli.load(case / way.precision, trust_code=True)
    (name,) = predictor.preprocess.inputs

    def answer(rows: np.ndarray) -> np.ndarray:
        return predictor.answer({name: rows})["probabilities"]

    return answer, f"{predictor.engine} {predictor.precision}"


LOADERS = {
    "eager": load_eager,
    "torch.compile": load_compiled,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "openvino queue": load_openvino_queue,
    "suanli": load_suanli,
}


# --- building files --------------------------------------------------------------------------


def export(case: Path) -> None:
    """Source: "Export a PyTorch model to ONNX" in PyTorch's documentation."""
    import torch

    model = load_module(case)
    rows = torch.from_numpy(np.load(case / "calibration.npy", allow_pickle=False)[:2])
    with torch.no_grad():
        torch.onnx.export(
            model,
            (rows,),
            case / "plain.onnx",
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            input_names=["rows"],
            output_names=["probabilities"],
            external_data=False,
        )


def quantize_for_onnxruntime(case: Path) -> None:
    """Source: "Quantize ONNX models" in ONNX Runtime's documentation: preprocessing, then static QDQ with weights per
    channel; unsigned activations are what x86 processors multiply with."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(np.load(case / "calibration.npy", allow_pickle=False))

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self._rows, None)
            return None if row is None else {"rows": row[None]}

    # Symbolic shape inference, meant for transformers, fails on what PyTorch's exporter writes for a maximum.
    quant_pre_process(case / "plain.onnx", case / "prepared.onnx", skip_symbolic_shape=True)
    quantize_static(
        case / "prepared.onnx",
        case / "onnxruntime-int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


def quantize_for_openvino(case: Path, transformer: bool, control: int | None = None) -> None:
    """Sources: "Basic Quantization Flow" and "Quantizing with Accuracy Control" in OpenVINO's documentation. With
    `control`, accuracy is controlled on that many validation rows, one at a time as there."""
    package = import_openvino()
    import nncf

    calibration = nncf.Dataset([row[None] for row in np.load(case / "calibration.npy", allow_pickle=False)])
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    model = package.Core().read_model(case / "plain.onnx")
    if control is None:
        quantized = nncf.quantize(model, calibration, subset_size=CALIBRATION, model_type=kind)
        package.save_model(quantized, case / "openvino-int8.xml", compress_to_fp16=False)
        return
    rows = np.load(case / "rows.npy", allow_pickle=False)[:control]
    targets = np.load(case / "targets.npy", allow_pickle=False)[:control]

    def accuracy(candidate: Any, items: Any) -> tuple[float, list[float]]:
        right = [float(candidate(row)[0].argmax() == target) for row, target in items]
        return statistics.mean(right), right

    examples = [(row[None], target) for row, target in zip(rows, targets, strict=True)]
    quantized = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=calibration,
        validation_dataset=nncf.Dataset(examples, lambda item: item[0]),
        validation_fn=accuracy,
        max_drop=TOLERANCE,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=CALIBRATION,
        model_type=kind,
    )
    package.save_model(quantized, case / "openvino-controlled.xml", compress_to_fp16=False)


# --- the process of one way -----------------------------------------------------------------------


class Requests:
    """What a process does on request: each method answers one kind."""

    def __init__(self) -> None:
        self._work: Answer | None = None

    def build(self, what: str, case: str, **more: object) -> dict[str, object]:
        makers = {"onnx": export, "onnxruntime": quantize_for_onnxruntime, "openvino": quantize_for_openvino}
        makers[what](Path(case), **more)  # type: ignore[operator]
        return {}

    def load(self, case: str, way: dict[str, Json]) -> dict[str, object]:
        """Loads, and calls once with each batch size, for whatever is compiled at the first call."""
        requested = Way(**(way | {"batches": tuple(way["batches"])}))
        self._work, remark = LOADERS[requested.backend](Path(case), requested)
        self._rows = np.load(Path(case) / "rows.npy", mmap_mode="r", allow_pickle=False)
        for batch in requested.batches:
            self._work(self._rows[:batch].copy())
        return {"remark": remark}

    def answer(self, count: int, batch: int, out: str) -> dict[str, object]:
        assert self._work is not None
        parts = range(0, count, batch)
        answers = [np.array(self._work(self._rows[start : start + batch].copy())) for start in parts]
        np.save(out, np.concatenate(answers).astype(np.float32), allow_pickle=False)
        return {}

    def time(self, batch: int, for_s: float, least: int) -> dict[str, object]:
        """Seconds of each call, after two that don't count, or one that is long."""
        assert self._work is not None
        rows = self._rows[:batch].copy()
        if timing.seconds(lambda: self._work(rows)) < for_s:
            self._work(rows)
        took: list[float] = []
        started = time.perf_counter()
        while len(took) < least or time.perf_counter() - started < for_s:
            took.append(timing.seconds(lambda: self._work(rows)))
        return {"seconds": took}


if __name__ == "__main__":
    sandbox.serve(Requests())
