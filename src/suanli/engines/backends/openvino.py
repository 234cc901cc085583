"""OpenVINO on the CPU: float32, bfloat16 where the processor has it, and int8 by its own quantizer (NNCF).

The package openvino reports its own import to a server unless openvino_telemetry can't be imported; so it can't.
Sources: "Precision Control" and "Runtime Model" in OpenVINO's documentation; `nncf.quantize` in NNCF's.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from suanli.core.types import Engine, EngineInputs, LoadedEngine, Placement
from suanli.engines.backends import _cpu

FILE = "model.xml"
HINTS = {"float32": "f32", "bfloat16": "bf16"}
PIECES = (8, 32)  # inputs that one core may take of a batch
HEAVY = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert inputs.onnx is not None
    openvino = _openvino()
    model = openvino.Core().read_model(inputs.onnx)
    if precision == "int8":
        import nncf

        assert inputs.calibration is not None
        logging.getLogger("nncf").setLevel(logging.ERROR)
        rows = [row[None] for row in inputs.calibration]
        # A node of the graph may have become several here, whose names begin with its own.
        kept = nncf.IgnoredScope(patterns=[f"{re.escape(name)}(/.*)?" for name in inputs.kept], validate=False)
        model = nncf.quantize(model, nncf.Dataset(rows), subset_size=len(rows), ignored_scope=kept)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    settings = {"INFERENCE_NUM_THREADS": placement.threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision in HINTS:  # what int8 leaves to floating point may be in the processor's best
        settings["INFERENCE_PRECISION_HINT"] = HINTS[precision]
    openvino = _openvino()
    core = openvino.Core()
    many = core.compile_model(folder / FILE, "CPU", settings)
    queues: dict[int, Any] = {}

    def fixed(batch: int, hint: str) -> Any:
        """Compiled for one batch size: constant shapes are up to a fifth faster for a small network."""
        model = core.read_model(folder / FILE)
        model.reshape([batch, *list(model.input(0).partial_shape)[1:]])
        return core.compile_model(model, "CPU", settings | {"PERFORMANCE_HINT": hint})

    one = fixed(1, "LATENCY")

    def whole(rows: np.ndarray) -> np.ndarray:
        run = one if len(rows) == 1 else many
        return np.array(run(rows)[0])  # the next call writes into the same memory

    def in_pieces(rows: np.ndarray, piece: int) -> np.ndarray:
        """A piece on each core at once, instead of all cores on one call."""
        if piece not in queues:
            queues[piece] = openvino.AsyncInferQueue(fixed(piece, "THROUGHPUT"))
        queue, end = queues[piece], len(rows) // piece * piece
        found = np.empty((len(rows), many.output(0).partial_shape[1].get_length()), np.float32)

        def take(request: Any, start: int) -> None:
            found[start : start + piece] = request.get_output_tensor().data

        queue.set_callback(take)
        for start in range(0, end, piece):
            queue.start_async({0: rows[start : start + piece]}, start, share_inputs=True)
        if end < len(rows):
            found[end:] = whole(rows[end:])
        queue.wait_all()
        return found

    best: dict[int, int] = {}  # of so many choices: the piece; 0: the batch is not cut up

    def fastest(rows: np.ndarray, choices: list[int]) -> int:
        """Which piece it is depends on the network and the caches: the first large batch finds out."""
        took = {}
        for piece in [0, *choices]:
            for _ in range(2):  # the first compiles and warms up
                before = time.perf_counter()
                in_pieces(rows, piece) if piece else whole(rows)
                took[piece] = time.perf_counter() - before
        return min(took, key=lambda piece: took[piece])

    def answer(rows: np.ndarray) -> np.ndarray:
        choices = [piece for piece in PIECES if 1 < placement.threads <= len(rows) // piece]
        if not choices:
            return whole(rows)
        if len(choices) not in best:
            best[len(choices)] = fastest(rows, choices)
        piece = best[len(choices)]
        return in_pieces(rows, piece) if piece else whole(rows)

    def find_precision(rows: np.ndarray) -> str:  # noqa: ARG001
        found: Counter[str] = Counter()
        for operation in many.get_runtime_model().get_ordered_ops():
            about = operation.get_rt_info()
            if about["layerType"].value in HEAVY:
                found[about["runtimePrecision"].value] += 1
        most = found.most_common(1)
        return _cpu.NAMES.get(most[0][0], most[0][0]) if most else precision

    return LoadedEngine(answer=answer, find_precision=find_precision)


def _openvino() -> Any:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


ENGINE = Engine(
    name="openvino",
    precisions=("int8", "bfloat16", "float32"),
    packages=("openvino",),
    build_packages=("nncf", "onnx", "onnxscript"),
    why_not=_cpu.why_not,
    build=build,
    load=load,
    needs="onnx",
    order=10,
    quantized_ops=("Conv", "MatMul", "Gemm"),
)
