"""OpenVINO on the CPU: float32, bfloat16 where the processor has it, and int8 by its own quantizer (NNCF).

The package openvino reports its own import to a server unless openvino_telemetry can't be imported, so here it can't.
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
PIECES = (8, 32)  # inputs of a batch that one core may get
HEAVY = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert inputs.onnx is not None
    openvino = import_openvino()
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
    model = _CompiledModel(folder / FILE, precision, placement.threads)
    return LoadedEngine(answer=model.answer, find_precision=model.find_precision)


class _CompiledModel:
    """A model compiled for one input, for any batch, and, when it is needed, for pieces of large batches."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        self._path, self._precision, self._threads = path, precision, threads
        self._settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision in HINTS:  # what int8 leaves to floating point may be in the processor's best
            self._settings["INFERENCE_PRECISION_HINT"] = HINTS[precision]
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        self._any_batch = self._core.compile_model(path, "CPU", self._settings)
        self._one_input = self._compile_for(1, "LATENCY")
        self._queues: dict[int, Any] = {}  # by size of a piece
        self._best_piece: dict[int, int] = {}  # by the number of sizes to choose from; 0: the batch stays in one piece

    def answer(self, rows: np.ndarray) -> np.ndarray:
        choices = [piece for piece in PIECES if 1 < self._threads <= len(rows) // piece]
        if not choices:
            return self._compute(rows)
        if len(choices) not in self._best_piece:
            self._best_piece[len(choices)] = self._find_fastest(rows, choices)
        return self._compute_in_pieces(rows, self._best_piece[len(choices)])

    def find_precision(self, rows: np.ndarray) -> str:  # noqa: ARG002
        precisions: Counter[str] = Counter()
        for operation in self._any_batch.get_runtime_model().get_ordered_ops():
            facts = operation.get_rt_info()
            if facts["layerType"].value in HEAVY:
                precisions[facts["runtimePrecision"].value] += 1
        most = precisions.most_common(1)
        return _cpu.NAMES.get(most[0][0], most[0][0]) if most else self._precision

    def _compile_for(self, batch: int, hint: str) -> Any:
        """For one batch size: constant shapes are up to a fifth faster for a small network."""
        model = self._core.read_model(self._path)
        model.reshape([batch, *list(model.input(0).partial_shape)[1:]])
        return self._core.compile_model(model, "CPU", self._settings | {"PERFORMANCE_HINT": hint})

    def _compute(self, rows: np.ndarray) -> np.ndarray:
        run = self._one_input if len(rows) == 1 else self._any_batch
        return np.array(run(rows)[0])  # a copy, since the next call writes into the same memory

    def _compute_in_pieces(self, rows: np.ndarray, piece: int) -> np.ndarray:
        """A piece on each core at once, instead of all cores on one call; 0: in one piece."""
        if not piece:
            return self._compute(rows)
        if piece not in self._queues:
            self._queues[piece] = self._openvino.AsyncInferQueue(self._compile_for(piece, "THROUGHPUT"))
        queue, end = self._queues[piece], len(rows) // piece * piece
        answers = np.empty((len(rows), self._any_batch.output(0).partial_shape[1].get_length()), np.float32)

        def copy(request: Any, start: int) -> None:
            answers[start : start + piece] = request.get_output_tensor().data

        queue.set_callback(copy)
        for start in range(0, end, piece):
            queue.start_async({0: rows[start : start + piece]}, start, share_inputs=True)
        if end < len(rows):
            answers[end:] = self._compute(rows[end:])
        queue.wait_all()
        return answers

    def _find_fastest(self, rows: np.ndarray, choices: list[int]) -> int:
        """The fastest size of a piece depends on the network and the caches; it is measured on the first large
        batch."""
        seconds = {}
        for piece in [0, *choices]:
            for _ in range(2):  # the first compiles and warms up
                before = time.perf_counter()
                self._compute_in_pieces(rows, piece)
                seconds[piece] = time.perf_counter() - before
        return min(seconds, key=lambda piece: seconds[piece])


def import_openvino() -> Any:
    """The package, without the one by which it would report its own import to a server."""
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
