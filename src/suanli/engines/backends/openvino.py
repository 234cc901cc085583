"""OpenVINO on the CPU: float32, bfloat16 where the processor has it, and int8 by its own quantizer (NNCF).

The package openvino reports its own import to a server unless openvino_telemetry can't be imported, so here it can't.
Sources: "Precision Control" and "Runtime Model" in OpenVINO's documentation; `nncf.quantize` in NNCF's.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from suanli.core.schema import Arrays, pick
from suanli.core.types import Engine, EngineInputs, LoadedEngine, Placement
from suanli.engines.backends import _cpu
from suanli.engines.graphs import find_float_nodes, find_names

FILE = "model.xml"
PIECES_FILE = "pieces.json"
# What int8 leaves to floating point is in float32: rounded to bfloat16, an answer would depend on the batch around it.
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
PIECES = (8, 32)  # inputs of a batch that one core may get
SINGLE = "suanli_single"  # in the model's information: the first axis doesn't count examples
HEAVY = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert inputs.onnx is not None
    openvino = import_openvino()
    model = openvino_core().read_model(inputs.onnx)
    ends = find_names(inputs.onnx)
    for ports, names in zip((model.inputs, model.outputs), ends, strict=True):
        for port, name in zip(ports, names, strict=True):
            port.tensor.set_names({name})  # else an output may have the names of inner values, too
    if precision == "int8":
        import nncf

        assert inputs.calibration is not None
        logging.getLogger("nncf").setLevel(logging.ERROR)
        examples = list(_split(inputs.calibration, ends[0], batches=inputs.batches))
        # A node of the graph may have become several here, whose names begin with its own.
        floats = (*inputs.kept, *find_float_nodes(inputs.onnx))
        kept = nncf.IgnoredScope(patterns=[f"{re.escape(name)}(/.*)?" for name in floats], validate=False)
        model = nncf.quantize(model, nncf.Dataset(examples), subset_size=len(examples), ignored_scope=kept)
    if not inputs.batches:
        model.set_rt_info("yes", [SINGLE])
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def _split(calibration: Sequence[Arrays], names: Sequence[str], *, batches: bool) -> Iterator[dict[str, np.ndarray]]:
    """One example after the other."""
    for arrays in calibration:
        inputs = pick(arrays, names)
        if not batches:
            yield inputs
            continue
        for start in range(len(next(iter(inputs.values())))):
            yield {name: array[start : start + 1] for name, array in inputs.items()}


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    model = _CompiledModel(folder, precision, placement)
    return LoadedEngine(answer=model.answer, find_precision=model.find_precision)


class _CompiledModel:
    """A model compiled for any shapes; where calls may hold several examples, for one input, too, and, when it is
    needed, for pieces of large batches."""

    def __init__(self, folder: Path, precision: str, placement: Placement) -> None:
        self._path, self._precision, self._threads = folder / FILE, precision, placement.threads
        self._settings = {
            "INFERENCE_NUM_THREADS": self._threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[precision],
        }
        self._openvino = import_openvino()
        self._core = openvino_core()
        model = self._core.read_model(self._path)
        self._inputs, self._outputs = ([port.any_name for port in ports] for ports in (model.inputs, model.outputs))
        self._any_shape = self._core.compile_model(model, "CPU", self._settings)
        self._batches = not model.has_rt_info([SINGLE])
        self._one_input = self._compile_for(1, "LATENCY") if self._batches else None
        self._queues: dict[int, Any] = {}  # by size of a piece
        self._pieces = _Pieces(folder, placement)

    def answer(self, arrays: Arrays) -> Arrays:
        inputs = pick(arrays, self._inputs)
        choices = [piece for piece in PIECES if self._batches and 1 < self._threads <= _count(inputs) // piece]
        if not choices:
            return self._compute(inputs)
        piece = self._pieces.find(len(choices))
        if piece is None:
            piece = self._find_fastest(inputs, choices)
            self._pieces.keep(len(choices), piece)
        return self._compute_in_pieces(inputs, piece)

    def find_precision(self, arrays: Arrays) -> str:  # noqa: ARG002
        precisions: Counter[str] = Counter()
        for operation in self._any_shape.get_runtime_model().get_ordered_ops():
            facts = operation.get_rt_info()
            if facts["layerType"].value in HEAVY:
                precisions[facts["runtimePrecision"].value] += 1
        most = precisions.most_common(1)
        return _cpu.NAMES.get(most[0][0], most[0][0]) if most else self._precision

    def _compile_for(self, batch: int, hint: str) -> Any:
        """For one batch size: constant shapes are up to a fifth faster for a small network."""
        model = self._core.read_model(self._path)
        model.reshape({port: [batch, *list(port.partial_shape)[1:]] for port in model.inputs})
        return self._core.compile_model(model, "CPU", self._settings | {"PERFORMANCE_HINT": hint})

    def _compute(self, inputs: Arrays) -> dict[str, np.ndarray]:
        run = self._one_input if self._one_input is not None and _count(inputs) == 1 else self._any_shape
        answers = run(inputs, share_inputs=True)  # copied, since the next call writes into the same memory
        return {name: np.array(answers[place]) for place, name in enumerate(self._outputs)}

    def _compute_in_pieces(self, inputs: Arrays, piece: int) -> dict[str, np.ndarray]:
        """A piece on each core at once, instead of all cores on one call; 0: in one piece."""
        if not piece:
            return self._compute(inputs)
        if piece not in self._queues:
            self._queues[piece] = self._openvino.AsyncInferQueue(self._compile_for(piece, "THROUGHPUT"))
        queue, count = self._queues[piece], _count(inputs)
        end = count // piece * piece
        answers: dict[int, list[np.ndarray]] = {}  # by the first example of a piece

        def copy(request: Any, start: int) -> None:
            answers[start] = [np.array(tensor.data) for tensor in request.output_tensors]

        queue.set_callback(copy)
        for start in range(0, end, piece):
            queue.start_async(_slice(inputs, start, start + piece), start, share_inputs=True)
        if end < count:
            answers[end] = list(self._compute(_slice(inputs, end, count)).values())
        queue.wait_all()
        parts = [answers[start] for start in sorted(answers)]
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(self._outputs)}

    def _find_fastest(self, inputs: Arrays, choices: list[int]) -> int:
        """The fastest size of a piece depends on the network and the caches."""
        seconds = {}
        for piece in [0, *choices]:
            for _ in range(2):  # the first compiles and warms up
                before = time.perf_counter()
                self._compute_in_pieces(inputs, piece)
                seconds[piece] = time.perf_counter() - before
        return min(seconds, key=lambda piece: seconds[piece])


class _Pieces:
    """The sizes of pieces that were fastest while the engine was timed, kept with it: kernels differ by the shape, and
    the last bits of answers with them, so a process that measured them anew could answer differently."""

    def __init__(self, folder: Path, placement: Placement) -> None:
        self._path, self._threads, self._tuning = folder / PIECES_FILE, placement.threads, placement.tuning
        # By number of threads, then by how many sizes there were to choose from; 0: the batch stays in one piece.
        self._sizes: dict[str, dict[str, int]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def find(self, choices: int) -> int | None:
        """The size with these threads, else with any number; None: it has to be measured."""
        own = self._sizes.get(str(self._threads), {})
        if self._tuning:
            return own.get(str(choices))
        return next((sizes[str(choices)] for sizes in (own, *self._sizes.values()) if str(choices) in sizes), 0)

    def keep(self, choices: int, piece: int) -> None:
        self._sizes.setdefault(str(self._threads), {})[str(choices)] = piece
        self._path.write_text(json.dumps(self._sizes))


def _count(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def _slice(inputs: Arrays, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: array[start:stop] for name, array in inputs.items()}


def import_openvino() -> Any:
    """The package, without the one by which it would report its own import to a server."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


@cache
def openvino_core() -> Any:
    """One for the process, which is never freed: it gives the thread that first compiles a model another stack for
    signals, and where it was freed by another thread, the next signal, such as Ctrl-C, would crash the process."""
    return import_openvino().Core()


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
