"""ONNX Runtime on the CPU: float32, and int8 after calibration (QDQ, weights per channel).

Source of the settings: "Quantize ONNX models" in ONNX Runtime's documentation.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from suanli.types import Device, Engine, Loaded, Material, Placement

FILE = "model.onnx"
QUANTIZED = ("Conv", "MatMul", "Gemm")
FLOAT_KINDS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedMatMul", "FusedGemm", "NhwcFusedConv")
INT8_KINDS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat")


def why_not(device: Device, precision: str) -> str | None:  # noqa: ARG001
    return None if device.type == "cpu" else "written for the CPU so far"


def build(material: Material, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert material.onnx is not None
    if precision == "float32":
        shutil.copyfile(material.onnx, folder / FILE)
    else:
        quantize(material, folder).unlink()


def quantize(material: Material, folder: Path) -> Path:
    """Writes the int8 graph, and returns the one it was made from: float32, norms folded into convolutions."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    assert material.calibration is not None
    logging.disable(logging.WARNING)
    prepared = folder / "prepared.onnx"
    quant_pre_process(material.onnx, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        folder / FILE,
        _Rows(material.calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=[*QUANTIZED, "MaxPool", "Add"],
        nodes_to_exclude=list(material.kept),
    )
    return prepared


class _Rows:
    """Calibration rows, some at a time, as the quantizer reads them."""

    BATCH = 8

    def __init__(self, rows: np.ndarray) -> None:
        self._parts = iter(np.split(rows, range(self.BATCH, len(rows), self.BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self._parts, None)
        return None if part is None else {"rows": np.ascontiguousarray(part)}


def load(folder: Path, precision: str, placement: Placement) -> Loaded:  # noqa: ARG001
    session = _session(folder, options(placement.threads))

    def answer(rows: np.ndarray) -> np.ndarray:
        return session.run(None, {"rows": rows})[0]  # type: ignore[no-any-return]

    def computes_in(rows: np.ndarray) -> str:  # noqa: ARG001
        """Of the graph after the runtime's own changes: what it fused is what it runs."""
        import tempfile

        import onnx

        with tempfile.TemporaryDirectory() as place:
            settings = options(placement.threads)
            settings.optimized_model_filepath = str(Path(place) / FILE)
            _session(folder, settings)
            kinds = Counter(node.op_type for node in onnx.load(Path(place) / FILE).graph.node)
        in_int8 = sum(kinds[kind] for kind in INT8_KINDS)
        return "int8" if in_int8 > sum(kinds[kind] for kind in FLOAT_KINDS) else "float32"

    return Loaded(answer=answer, computes_in=computes_in)


def _session(folder: Path, settings: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(folder / FILE, settings, providers=["CPUExecutionProvider"])


def options(threads: int) -> Any:
    import onnxruntime

    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = threads
    found.log_severity_level = 4
    return found


ENGINE = Engine(
    name="onnxruntime",
    precisions=("int8", "float32"),
    packages=("onnxruntime",),
    builds_with=("onnx", "onnxscript"),
    why_not=why_not,
    build=build,
    load=load,
    needs="onnx",
    order=20,
    kinds=QUANTIZED,
)
