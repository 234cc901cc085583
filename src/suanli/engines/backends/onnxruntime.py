"""ONNX Runtime: on the CPU in float32, and int8 after calibration (QDQ, weights per channel); on an NVIDIA GPU in
float32 and tfloat32.

The package onnxruntime-gpu has both. Where CUDA can't be used it would compute on the CPU and only log that; here it is
an error. The parts for GPUs have not been run on one.
Sources: "Quantize ONNX models", "CUDA Execution Provider" and "Performance tuning: profiling tools" in ONNX Runtime's
documentation.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suanli.core.errors import MachineError, pip_install
from suanli.core.schema import Arrays, pick
from suanli.core.types import Device, Engine, EngineInputs, Json, LoadedEngine, Placement
from suanli.engines.graphs import find_float_nodes, find_names
from suanli.machine.device import instruction_sets

FILE = "model.onnx"
VNNI = {"avx512_vnni", "avx_vnni"}  # instruction sets that add products of int8 in 32 bits
CUDA = "CUDAExecutionProvider"
CHANNELS_OPSET = 13
QUANTIZED = ("Conv", "MatMul", "Gemm")
FLOAT_KINDS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedMatMul", "FusedGemm", "NhwcFusedConv")
INT8_KINDS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat")


def package() -> str:
    """The distribution that is installed: the one for NVIDIA GPUs has another name, and computes on CPUs, too."""
    try:
        importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        return "onnxruntime"
    return "onnxruntime-gpu"


def why_not(device: Device, precision: str) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return "written for the CPU and NVIDIA GPUs so far"
    if precision == "int8":
        return None if device.type == "cpu" else "its int8 is written for the CPU so far"
    if precision not in device.fast_dtypes:
        return f"{device.name} has no {precision} of its own"
    if device.type == "cuda":
        missing = f"not installed: onnxruntime-gpu ({pip_install('onnxruntime-gpu')})"
        try:
            import onnxruntime
        except ImportError:
            return missing
        return None if CUDA in onnxruntime.get_available_providers() else missing
    return None


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert inputs.onnx is not None
    if precision == "int8":
        sets = instruction_sets()
        quantize(inputs, folder, reduce_range="avx2" in sets and not sets & VNNI).unlink()
    else:
        shutil.copyfile(inputs.onnx, folder / FILE)


def quantize(
    inputs: EngineInputs,
    folder: Path,
    *,
    activations: str = "QUInt8",
    kinds: Sequence[str] = (*QUANTIZED, "MaxPool", "Add"),
    reduce_range: bool = False,
    **extra: object,
) -> Path:
    """Write the int8 graph, and return the path of the float32 graph that it was made from, with norms folded into
    convolutions. `kinds` of nodes are quantized. `reduce_range` gives weights seven bits: processors without VNNI add
    products in pairs, in 16 bits (ONNX Runtime, "Quantize ONNX models"). `extra` are other options of the quantizer."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    assert inputs.onnx is not None
    assert inputs.calibration is not None
    logging.disable(logging.WARNING)
    folded = folder / "folded.onnx"
    quant_pre_process(_raise_opset(inputs.onnx, folded), folded, skip_symbolic_shape=True)
    quantize_static(
        folded,
        folder / FILE,
        _CalibrationData(iter(inputs.calibration), find_names(folded)[0]),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType[activations],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
        op_types_to_quantize=list(kinds),
        nodes_to_exclude=[*inputs.kept, *find_float_nodes(inputs.onnx)],
        extra_options=extra,
    )
    return folded


def _raise_opset(path: Path, into: Path) -> Path:
    """A graph of an opset that has scales per channel: the same, or a converted one in the file `into`."""
    import onnx

    model = onnx.load(path)
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), CHANNELS_OPSET)
    if opset >= CHANNELS_OPSET:
        return path
    onnx.save(onnx.version_converter.convert_version(model, CHANNELS_OPSET), into)
    return into


@dataclass(frozen=True)
class _CalibrationData:
    """As the quantizer reads it."""

    batches: Iterator[Arrays]
    names: Sequence[str]

    def get_next(self) -> Arrays | None:
        arrays = next(self.batches, None)
        return None if arrays is None else pick(arrays, self.names)


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    session = _session(folder, options(placement.threads), precision, placement.device)

    def find_precision(arrays: Arrays) -> str:
        if placement.device.type == "cpu":
            return _graph_precision(folder, placement)
        return _profile_precision(folder, precision, placement, arrays)

    return LoadedEngine(answer=answers_of(session), find_precision=find_precision)


def answers_of(session: Any) -> Callable[[Arrays], Arrays]:
    """From arrays by the names of the graph's inputs to its outputs by theirs."""
    inputs, outputs = ([value.name for value in ends] for ends in (session.get_inputs(), session.get_outputs()))
    return lambda arrays: dict(zip(outputs, session.run(outputs, pick(arrays, inputs)), strict=True))


def _graph_precision(folder: Path, placement: Placement) -> str:
    """On the CPU: by the graph after the runtime's own optimizations, which is what it runs."""
    import onnx

    with tempfile.TemporaryDirectory() as work:
        settings = options(placement.threads)
        settings.optimized_model_filepath = str(Path(work) / FILE)
        _session(folder, settings, "float32", placement.device)
        kinds = Counter(node.op_type for node in onnx.load(Path(work) / FILE).graph.node)
    in_int8 = sum(kinds[kind] for kind in INT8_KINDS)
    return "int8" if in_int8 > sum(kinds[kind] for kind in FLOAT_KINDS) else "float32"


def _profile_precision(folder: Path, precision: str, placement: Placement, arrays: Arrays) -> str:
    """On a GPU: by the runtime's profile, which says where products and convolutions ran, and its switch for TF32."""
    with tempfile.TemporaryDirectory() as work:
        settings = options(placement.threads)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(work) / "profile")
        session = _session(folder, settings, precision, placement.device)
        answers_of(session)(arrays)
        providers_used = count_by_provider(json.loads(Path(session.end_profiling()).read_text()))
    most = providers_used.most_common(1)
    if most and most[0][0] != CUDA:
        return f"float32 by {most[0][0]}"
    return "tfloat32" if session.get_provider_options()[CUDA].get("use_tf32") == "1" else "float32"


def count_by_provider(events: Iterable[Json]) -> Counter[str]:
    """How many products and convolutions each provider ran, by the events of the runtime's profile."""
    return Counter(
        event["args"]["provider"]
        for event in events
        if event.get("args", {}).get("op_name") in FLOAT_KINDS and "provider" in event["args"]
    )


def providers(precision: str, device: Device) -> list[tuple[str, dict[str, str]]]:
    """What a session shall run on, with its settings. By default, TF32 is on."""
    if device.type == "cpu":
        return [("CPUExecutionProvider", {})]
    number = device.torch_name.partition(":")[2] or "0"
    return [(CUDA, {"device_id": number, "use_tf32": "1" if precision == "tfloat32" else "0"})]


def _session(folder: Path, settings: Any, precision: str, device: Device) -> Any:
    """Raises MachineError where it would not run on the device."""
    import onnxruntime

    requested = providers(precision, device)
    if device.type == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN from where PyTorch's packages have them
    session = onnxruntime.InferenceSession(folder / FILE, settings, providers=requested, enable_fallback=0)
    session.disable_fallback()
    if session.get_providers()[0] != requested[0][0]:
        raise MachineError(
            f"ONNX Runtime can't use {device.name}: it would run on {session.get_providers()[0]}.",
            fix="Install the onnxruntime-gpu that fits this CUDA and cuDNN, or use another engine.",
        )
    return session


def options(threads: int) -> Any:
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session_options.log_severity_level = 4
    return session_options


ENGINE = Engine(
    name="onnxruntime",
    precisions=("int8", "tfloat32", "float32"),
    packages=(package(),),
    build_packages=("onnx", "onnxscript"),
    why_not=why_not,
    build=build,
    load=load,
    needs="onnx",
    order=20,
    quantized_ops=QUANTIZED,
)
