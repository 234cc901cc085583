"""TensorRT on an NVIDIA GPU: float32, tfloat32, float16, and int8 after calibration.

Networks are strongly typed (always in TensorRT 11, by a flag in 10): each layer computes in the types that the ONNX
graph has. So the graph is prepared (`_tensorrt_graph.py`), which is tested without TensorRT.

    float32   as it is, with TF32 switched off in the builder
    tfloat32  as it is, with TF32 on
    float16   weights and casts in float16; the softmax that makes the probabilities stays in float32
    int8      Q/DQ around products and convolutions: signed and symmetric, as TensorRT has no zero points; biases stay
              floating point, and so do the outputs of a layer, up to the next one's Q/DQ

In all of them the cast of uint8 inputs comes first: TensorRT allows nothing but a cast for uint8 at a network's input.
A plan is for one type of GPU and one version of TensorRT. The kernel times that the builder measures are not stored.

Not run on a GPU, nor with TensorRT: what calls it is written after NVIDIA's documentation of versions 10 and 11
("Python API", "Strongly Typed Networks", "Migrating from TensorRT 10.x to 11.x", "Working with Dynamic Shapes",
"Explicit Quantization", "Engine Inspector"). Where the inspector names kernels, TF32 is recognised by their names, as
they are in published outputs (NVIDIA/TensorRT issues 3583, 4020 and 4397 on GitHub).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.core.errors import MachineError, pip_install
from suanli.core.schema import Arrays, pick
from suanli.core.types import Device, Engine, EngineInputs, Json, LoadedEngine, Placement
from suanli.engines.backends import onnxruntime as onnx_engine
from suanli.engines.backends._tensorrt_graph import OTHER_ENGINES, prepare_graph

if TYPE_CHECKING:
    import torch

FILE = "model.plan"
VERSIONS = (10, 11)
LEAST, USUAL, MOST = 1, 16, 64  # examples: the fewest of a plan, those that it is tuned for, the most


def why_not(device: Device, precision: str) -> str | None:
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    # PyTorch has no dtype for products of int8. All GPUs with units for float16 but the first have some for int8.
    if ("float16" if precision == "int8" else precision) not in device.fast_dtypes:
        return f"{device.name} has no {precision} of its own"
    try:
        version = importlib.metadata.version("tensorrt")
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: tensorrt ({pip_install('tensorrt')})"
    if reason := why_not_version(version):
        return reason
    if precision == "int8" and importlib.util.find_spec("onnxruntime") is None:
        return f"not installed: {onnx_engine.package()}, which calibrates"
    return None


def why_not_version(version: str) -> str | None:
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) not in VERSIONS:
        return f"written for TensorRT {VERSIONS[0]} and {VERSIONS[1]}, not {version}"
    return None


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:
    import tensorrt as trt  # type: ignore[import-not-found]
    import torch

    with tempfile.TemporaryDirectory() as work:
        graph = prepare_graph(inputs, precision, Path(work))
    with torch.cuda.device(placement.device.torch_name):
        logger = _logger(trt)
        builder = trt.Builder(logger)
        strong = trt.__version__.startswith("10.")
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strong else 0
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(graph.SerializeToString()):
            raise MachineError(_parser_errors(parser), fix=OTHER_ENGINES)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # `find_precision` reads it
        if precision == "float32":
            config.clear_flag(trt.BuilderFlag.TF32)
        else:  # what int8 leaves to floating point may be in TF32, too
            config.set_flag(trt.BuilderFlag.TF32)
        sources = [network.get_input(number) for number in range(network.num_inputs)]
        _refuse_free_sides({source.name: tuple(source.shape) for source in sources}, batches=inputs.batches)
        if inputs.batches:
            profile = builder.create_optimization_profile()
            for source in sources:
                profile.set_shape(source.name, *((size, *tuple(source.shape)[1:]) for size in (LEAST, USUAL, MOST)))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise MachineError(f"TensorRT builds no plan ({logger.last or 'it gives no reason'}).", fix=OTHER_ENGINES)
    (folder / FILE).write_bytes(memoryview(plan))


def _refuse_free_sides(shapes: Mapping[str, tuple[int, ...]], *, batches: bool) -> None:
    for name, shape in shapes.items():
        if -1 in shape[1 if batches else 0 :]:
            raise MachineError(f"Plans are for constant shapes; {name} is {shape}.", fix=OTHER_ENGINES)


def _parser_errors(parser: Any) -> str:
    """What the parser can't take, with the names of the nodes."""
    errors = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        node = f"{error.node_operator()} {error.node_name()!r}" if error.node_name() else "the graph"
        errors.append(f"{node}: {error.desc().strip()}")
    return f"TensorRT can't take {'; '.join(errors) or 'the graph'}."


def _logger(trt: Any) -> Any:
    """Remembers the last error: the calls themselves only say that they failed."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last = msg.strip()

    return Logger()


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:  # noqa: ARG001
    plan = _Plan((folder / FILE).read_bytes(), placement.device.torch_name)
    return LoadedEngine(answer=plan.answer, find_precision=plan.find_precision)


class _Plan:
    """A plan that is ready to run, with all objects that must live as long."""

    def __init__(self, content: bytes, device_name: str) -> None:
        import tensorrt as trt
        import torch

        self._device = torch.device(device_name)
        self._logger = _logger(trt)
        with torch.cuda.device(self._device):
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(content)
            self._context: Any = None if self._engine is None else self._engine.create_execution_context()
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._context is None:
            raise MachineError(
                f"TensorRT {trt.__version__} can't load the plan ({self._logger.last or 'it gives no reason'}).",
                fix="Plans are for one GPU and one version of TensorRT: make it again with suanli optimize.",
            )
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        self._batches = all(shape[:1] == (-1,) for shape in shapes.values())
        self._buffers = {}  # memory that every call uses
        for name, shape in shapes.items():
            dtype = getattr(torch, DTYPES[self._engine.get_tensor_dtype(name).name])
            full = (MOST, *shape[1:]) if self._batches else shape
            self._buffers[name] = torch.zeros(full, dtype=dtype, device=self._device)
            self._context.set_tensor_address(name, self._buffers[name].data_ptr())
        torch.cuda.synchronize(self._device)  # the zeros were written in another stream

    def answer(self, arrays: Arrays) -> Arrays:
        import torch

        inputs = pick(arrays, self._inputs)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if not self._batches:
                return self._compute(inputs)
            parts = [
                self._compute({name: array[start : start + MOST] for name, array in inputs.items()})
                for start in range(0, len(inputs[self._inputs[0]]), MOST)
            ]
            return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _compute(self, inputs: Arrays) -> dict[str, np.ndarray]:
        import torch

        for name, array in inputs.items():
            if not self._context.set_input_shape(name, array.shape):
                raise RuntimeError(f"TensorRT refuses the shape {array.shape} of {name} ({self._logger.last})")
            self._part(name, len(array) if self._batches else None).copy_(torch.from_numpy(array))
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"TensorRT failed ({self._logger.last})")
        count = len(inputs[self._inputs[0]]) if self._batches else None
        return {name: self._part(name, count).cpu().numpy() for name in self._outputs}

    def _part(self, name: str, count: int | None) -> torch.Tensor:
        """Of a buffer, what so many examples need; None: all."""
        return self._buffers[name] if count is None else self._buffers[name][:count]

    def find_precision(self, arrays: Arrays) -> str:
        import tensorrt as trt

        self.answer(arrays)  # so that shapes, and thus formats, are fixed
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        layers = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return plan_precision(json.loads(layers, strict=False))


DTYPES = {"UINT8": "uint8", "INT32": "int32", "INT64": "int64", "FLOAT": "float32", "HALF": "float16"}

# --- what ran ---

HEAVY = re.compile(r"conv(?!ert)|gemm|matrix_?multiply|matmul|fprop|mha", re.IGNORECASE)
TF32 = re.compile(r"tf32|s1688", re.IGNORECASE)  # in the names of kernels
TYPES = (  # the first that matches the description of the layer's input
    (re.compile(r"\bint8", re.IGNORECASE), "int8"),
    (re.compile(r"bf16|bfloat16", re.IGNORECASE), "bfloat16"),
    (re.compile(r"fp16|float16|half", re.IGNORECASE), "float16"),
    (re.compile(r"fp8|float8", re.IGNORECASE), "float8"),
    (re.compile(r"fp32|float", re.IGNORECASE), "float32"),
)
UNKNOWN = "a precision that isn't known"


def plan_precision(inspection: Mapping[str, Json]) -> str:
    """The precision of most products and convolutions, by the engine inspector's detailed information."""
    layers = [layer for layer in inspection.get("Layers", ()) if isinstance(layer, dict)]
    precisions = Counter(layer_precision(layer) for layer in layers if _is_heavy(layer))
    return precisions.most_common(1)[0][0] if precisions else UNKNOWN


def _is_heavy(layer: Mapping[str, Json]) -> bool:
    kinds = " ".join(str(layer.get(key, "")) for key in ("LayerType", "ParameterType", "TacticName"))
    return HEAVY.search(kinds) is not None


def layer_precision(layer: Mapping[str, Json]) -> str:
    """By the type of the layer's first input, in which it multiplies, and for TF32 by the name of its kernel."""
    inputs = layer.get("Inputs") or [{}]
    # One field in TensorRT 10, two in 11.
    description = " ".join(str(inputs[0].get(key, "")) for key in ("Format/Datatype", "DataType", "Datatype", "Format"))
    precision = next((name for pattern, name in TYPES if pattern.search(description)), UNKNOWN)
    if precision == "float32" and TF32.search(str(layer.get("TacticName", ""))):
        return "tfloat32"
    return precision


ENGINE = Engine(
    name="tensorrt",
    precisions=("int8", "float16", "tfloat32", "float32"),
    packages=("tensorrt", "torch"),
    build_packages=("onnx", "onnxscript"),
    why_not=why_not,
    build=build,
    load=load,
    needs="onnx",
    order=15,
    portable=False,
    quantized_ops=onnx_engine.QUANTIZED,
)
