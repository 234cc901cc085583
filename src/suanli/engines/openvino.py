"""OpenVINO on the CPU: float32, bfloat16 where the processor has it, and int8 by its own quantizer (NNCF).

The package openvino reports its own import to a server unless openvino_telemetry can't be imported; so it can't.
Sources: "Precision Control" and "Runtime Model" in OpenVINO's documentation; `nncf.quantize` in NNCF's.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from suanli.types import Device, Engine, Loaded, Material, Placement

FILE = "model.xml"
HINTS = {"float32": "f32", "bfloat16": "bf16"}
NAMES = {"f32": "float32", "bf16": "bfloat16", "i8": "int8", "u8": "int8"}
HEAVY = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


def why_not(device: Device, precision: str) -> str | None:
    if device.type != "cpu":
        return "written for the CPU so far"
    if precision == "bfloat16" and precision not in device.fast_dtypes:
        return f"{device.name} has no bfloat16 of its own"
    return None


def build(material: Material, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert material.onnx is not None
    openvino = _openvino()
    model = openvino.Core().read_model(material.onnx)
    if precision == "int8":
        import nncf

        assert material.calibration is not None
        logging.getLogger("nncf").setLevel(logging.ERROR)
        rows = [row[None] for row in material.calibration]
        # A node of the graph may have become several here, whose names begin with its own.
        kept = nncf.IgnoredScope(patterns=[f"{re.escape(name)}(/.*)?" for name in material.kept], validate=False)
        model = nncf.quantize(model, nncf.Dataset(rows), subset_size=len(rows), ignored_scope=kept)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def load(folder: Path, precision: str, placement: Placement) -> Loaded:
    settings = {"INFERENCE_NUM_THREADS": placement.threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision in HINTS:  # what int8 leaves to floating point may be in the processor's best
        settings["INFERENCE_PRECISION_HINT"] = HINTS[precision]
    core = _openvino().Core()
    many = core.compile_model(folder / FILE, "CPU", settings)
    alone = core.read_model(folder / FILE)  # its shapes are constants then: up to a fifth faster for a small network
    alone.reshape([1, *list(alone.input(0).partial_shape)[1:]])
    one = core.compile_model(alone, "CPU", settings)

    def answer(rows: np.ndarray) -> np.ndarray:
        run = one if len(rows) == 1 else many
        return np.array(run(rows)[0])  # the next call writes into the same memory

    def computes_in(rows: np.ndarray) -> str:  # noqa: ARG001
        found: Counter[str] = Counter()
        for operation in many.get_runtime_model().get_ordered_ops():
            about = operation.get_rt_info()
            if about["layerType"].value in HEAVY:
                found[about["runtimePrecision"].value] += 1
        most = found.most_common(1)
        return NAMES.get(most[0][0], most[0][0]) if most else precision

    return Loaded(answer=answer, computes_in=computes_in)


def _openvino() -> Any:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


ENGINE = Engine(
    name="openvino",
    precisions=("int8", "bfloat16", "float32"),
    packages=("openvino",),
    builds_with=("nncf", "onnx", "onnxscript"),
    why_not=why_not,
    build=build,
    load=load,
    needs="onnx",
    order=10,
    kinds=("Conv", "MatMul", "Gemm"),
)
