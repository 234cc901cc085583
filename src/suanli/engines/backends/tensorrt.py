"""TensorRT on an NVIDIA GPU: float32, tfloat32, float16, and int8 after calibration.

Networks are strongly typed (always so in TensorRT 11, by a flag in 10): each layer computes in the types that the ONNX
graph has, so the graph is what is prepared here, and that part is tested without TensorRT.

    float32   as it is, with the builder's leave for TF32 taken back
    tfloat32  as it is, with that leave
    float16   weights and casts in float16; the softmax that makes the probabilities stays in float32
    int8      Q/DQ around products and convolutions: signed and symmetric, as TensorRT has no zero points; biases stay
              floating, and so does what comes out of a layer, up to the next one's Q/DQ

In all of them the cast of uint8 rows comes first: TensorRT takes uint8 at a network's input for nothing but a cast.
A plan is for one type of GPU and one version of TensorRT. Times of kernels that were measured while it was built are
not kept.

Not run on a GPU, and not with TensorRT: what calls it is written after NVIDIA's documentation of versions 10 and 11
("Python API", "Strongly Typed Networks", "Migrating from TensorRT 10.x to 11.x", "Working with Dynamic Shapes",
"Explicit Quantization", "Engine Inspector"). Where the inspector names kernels, TF32 is known by their names, as they
are in outputs that people have published (NVIDIA/TensorRT issues 3583, 4020 and 4397 on GitHub).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.core.errors import MachineError, pip_install
from suanli.core.types import Device, Engine, EngineInputs, Json, LoadedEngine, Placement
from suanli.engines.backends import onnxruntime as onnx_engine

if TYPE_CHECKING:
    import onnx

FILE = "model.plan"
VERSIONS = (10, 11)
LEAST, USUAL, MOST = 1, 16, 64  # rows: what the plan takes, and what it is tuned for
OTHER_ENGINES = "Other engines may take it: cuda_graphs, onnxruntime and eager."


def why_not(device: Device, precision: str) -> str | None:
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    # There is no dtype of PyTorch for products of int8; GPUs with units for float16 have some for int8, but the first.
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


# --- the graph that TensorRT is given ---


def prepare_graph(inputs: EngineInputs, precision: str, folder: Path) -> onnx.ModelProto:
    """The graph whose types say what is computed in which precision. `folder` is for files on the way."""
    import onnx

    assert inputs.onnx is not None
    model = onnx.load(quantize_graph(inputs, folder) if precision == "int8" else inputs.onnx)
    cast_inputs_first(model)
    if precision == "float16":
        convert_to_float16(model)
    return model


def quantize_graph(inputs: EngineInputs, folder: Path) -> Path:
    """An int8 graph with signed, symmetric Q/DQ on the inputs of products and convolutions only."""
    onnx_engine.quantize(
        inputs,
        folder,
        activations="QInt8",
        kinds=onnx_engine.QUANTIZED,
        ActivationSymmetric=True,
        WeightSymmetric=True,
        AddQDQPairToWeight=True,  # TensorRT quantizes the weights itself, by these scales
        QuantizeBias=False,  # it has no int32 for them
        OpTypesToExcludeOutputQuantization=list(onnx_engine.QUANTIZED),
    )
    return folder / onnx_engine.FILE


SHAPED = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")  # move numbers, whatever their type


def cast_inputs_first(model: onnx.ModelProto) -> None:
    """Changes the graph so that its uint8 inputs go into nothing but a cast to float32; the answers stay the same.

    Raises MachineError for a graph that does something else with uint8 than moving and casting it.
    """
    from onnx import TensorProto, helper

    castable = (TensorProto.FLOAT, TensorProto.FLOAT16)
    graph = model.graph
    for given in [given for given in graph.input if given.type.tensor_type.elem_type == TensorProto.UINT8]:
        users = [node for node in graph.node if given.name in node.input]
        if all(node.op_type == "Cast" and _attribute(node, "to") in castable for node in users):
            continue
        first = f"{given.name}_as_float32"
        unsigned = {given.name}  # that were uint8, and are float32 now
        same: dict[str, str] = {}  # what a cast made, to what it is now: its input
        kept = []
        for node in graph.node:  # in the order in which they are computed
            from_unsigned = unsigned.intersection(node.input)
            if from_unsigned and node.op_type == "Cast" and _attribute(node, "to") == TensorProto.FLOAT:
                same[node.output[0]] = first if node.input[0] == given.name else node.input[0]
                continue
            if from_unsigned and node.op_type in SHAPED:
                unsigned.add(node.output[0])
            elif from_unsigned and node.op_type not in ("Cast", "Shape", "Size"):
                raise MachineError(
                    f"{node.op_type} {node.name!r} uses uint8, which TensorRT can't do.", fix=OTHER_ENGINES
                )
            for position, name in enumerate(node.input):
                node.input[position] = first if name == given.name else same.get(name, name)
            kept.append(node)
        if given.name in same or any(output.name in unsigned | same.keys() for output in graph.output):
            raise MachineError("The graph answers with its own input.", fix=OTHER_ENGINES)
        del graph.node[:]
        graph.node.append(helper.make_node("Cast", [given.name], [first], name=first, to=TensorProto.FLOAT))
        graph.node.extend(kept)
        del graph.value_info[:]  # some types are others now


def convert_to_float16(model: onnx.ModelProto) -> None:
    """Changes a float32 graph so that it computes in float16. Its inputs and outputs keep their types; numbers beyond
    float16's range become its largest. Raises MachineError for graphs with branches or loops."""
    from onnx import AttributeProto, TensorProto, helper

    graph = model.graph
    single, half = TensorProto.FLOAT, TensorProto.FLOAT16
    sizes = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}  # must be float32
    for tensor in graph.initializer:
        if tensor.data_type == single and tensor.name not in sizes:
            _halve(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                raise MachineError(f"{node.op_type} {node.name!r} has a graph of its own.", fix=OTHER_ENGINES)
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == single:
                if not sizes.intersection(node.output):
                    _halve(attribute.t)
            elif attribute.name in ("to", "dtype") and attribute.i == single:
                attribute.i = half
    before = [
        helper.make_node("Cast", [given.name], [f"{given.name}_half"], name=f"{given.name}_half", to=half)
        for given in graph.input
        if given.type.tensor_type.elem_type == single
    ]
    for made in before:
        _rename_inputs(graph.node, made.input[0], made.output[0])
    for output in graph.output:
        if output.type.tensor_type.elem_type == single:
            _give_float32(graph, output.name)
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def _give_float32(graph: onnx.GraphProto, name: str) -> None:
    """Puts a cast before the softmax that makes this output, or after what else makes it."""
    from onnx import TensorProto, helper

    place, maker = next((i, node) for i, node in enumerate(graph.node) if name in node.output)
    if maker.op_type == "Softmax":
        source, target = maker.input[0], f"{name}_logits"
        maker.input[0] = target
    else:
        place, source, target = place + 1, f"{name}_half", name
        maker.output[list(maker.output).index(name)] = source
        _rename_inputs(graph.node, name, source)
    graph.node.insert(place, helper.make_node("Cast", [source], [target], name=f"{name}_cast", to=TensorProto.FLOAT))


def _halve(tensor: onnx.TensorProto) -> None:
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    largest = np.finfo(np.float16).max
    with np.errstate(over="ignore"):
        halves = np.where(np.isfinite(values), values.clip(-largest, largest), values).astype(np.float16)
    tensor.CopyFrom(numpy_helper.from_array(halves, tensor.name))


def _rename_inputs(nodes: Any, name: str, new: str) -> None:
    for node in nodes:
        for position, given in enumerate(node.input):
            if given == name:
                node.input[position] = new


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), None)


# --- TensorRT ---


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:
    import tensorrt as trt  # type: ignore[import-not-found]
    import torch

    with tempfile.TemporaryDirectory() as place:
        graph = prepare_graph(inputs, precision, Path(place))
    with torch.cuda.device(placement.device.torch_name):
        logger = _logger(trt)
        builder = trt.Builder(logger)
        strong = trt.__version__.startswith("10.")
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strong else 0
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(graph.SerializeToString()):
            raise MachineError(_complaint(parser), fix=OTHER_ENGINES)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # `find_precision` reads it
        if precision == "float32":
            config.clear_flag(trt.BuilderFlag.TF32)
        else:  # what int8 leaves to floating point may be in TF32, too
            config.set_flag(trt.BuilderFlag.TF32)
        profile = builder.create_optimization_profile()
        given = network.get_input(0)
        row = tuple(given.shape)[1:]
        profile.set_shape(given.name, (LEAST, *row), (USUAL, *row), (MOST, *row))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise MachineError(f"TensorRT builds no plan ({logger.last or 'it says no reason'}).", fix=OTHER_ENGINES)
    (folder / FILE).write_bytes(memoryview(plan))


def _complaint(parser: Any) -> str:
    """What the parser can't take, by the node that it names."""
    said = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        node = f"{error.node_operator()} {error.node_name()!r}" if error.node_name() else "the graph"
        said.append(f"{node}: {error.desc().strip()}")
    return f"TensorRT can't take {'; '.join(said) or 'the graph'}."


def _logger(trt: Any) -> Any:
    """Keeps the last error: the calls themselves only say that they failed."""

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
    """A plan that is ready to run, with all that must live as long as it."""

    def __init__(self, content: bytes, device_name: str) -> None:
        import tensorrt as trt
        import torch

        self._where = torch.device(device_name)
        self._logger = _logger(trt)
        with torch.cuda.device(self._where):
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(content)
            self._context: Any = None if self._engine is None else self._engine.create_execution_context()
            self._stream = torch.cuda.Stream(self._where)  # type: ignore[no-untyped-call]
        if self._context is None:
            raise MachineError(
                f"TensorRT {trt.__version__} can't load the plan ({self._logger.last or 'it says no reason'}).",
                fix="Plans are for one GPU and one version of TensorRT: make it again with suanli optimize.",
            )
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        (self._source,) = (n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        (self._target,) = (n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        self._fixed = {}  # memory that every call uses
        for name in names:
            dtype = getattr(torch, DTYPES[self._engine.get_tensor_dtype(name).name])
            shape = (MOST, *tuple(self._engine.get_tensor_shape(name))[1:])
            self._fixed[name] = torch.zeros(shape, dtype=dtype, device=self._where)
            self._context.set_tensor_address(name, self._fixed[name].data_ptr())
        torch.cuda.synchronize(self._where)  # they were filled in another stream

    def answer(self, rows: np.ndarray) -> np.ndarray:
        import torch

        with torch.cuda.device(self._where), torch.cuda.stream(self._stream):
            return np.concatenate([self._part(rows[start : start + MOST]) for start in range(0, len(rows), MOST)])

    def _part(self, rows: np.ndarray) -> np.ndarray:
        import torch

        if not self._context.set_input_shape(self._source, rows.shape):
            raise RuntimeError(f"TensorRT refuses the shape {rows.shape} ({self._logger.last})")
        self._fixed[self._source][: len(rows)].copy_(torch.from_numpy(rows))
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"TensorRT failed ({self._logger.last})")
        return self._fixed[self._target][: len(rows)].cpu().numpy()

    def find_precision(self, rows: np.ndarray) -> str:
        import tensorrt as trt

        self.answer(rows)  # so that shapes, and with them formats, are known
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return plan_precision(json.loads(told, strict=False))


DTYPES = {"UINT8": "uint8", "INT32": "int32", "INT64": "int64", "FLOAT": "float32", "HALF": "float16"}

# --- what ran ---

HEAVY = re.compile(r"conv(?!ert)|gemm|matrix_?multiply|matmul|fprop|mha", re.IGNORECASE)
TF32 = re.compile(r"tf32|s1688", re.IGNORECASE)  # in the names of kernels
TYPES = (  # the first that matches the words for the layer's input
    (re.compile(r"\bint8", re.IGNORECASE), "int8"),
    (re.compile(r"bf16|bfloat16", re.IGNORECASE), "bfloat16"),
    (re.compile(r"fp16|float16|half", re.IGNORECASE), "float16"),
    (re.compile(r"fp8|float8", re.IGNORECASE), "float8"),
    (re.compile(r"fp32|float", re.IGNORECASE), "float32"),
)
UNKNOWN = "a precision that isn't known"


def plan_precision(told: Json) -> str:
    """The precision of most products and convolutions, by the engine inspector's detailed account as JSON."""
    layers = [layer for layer in told.get("Layers", ()) if isinstance(layer, dict)]
    found = Counter(precision_of(layer) for layer in layers if _is_heavy(layer))
    return found.most_common(1)[0][0] if found else UNKNOWN


def _is_heavy(layer: Json) -> bool:
    kinds = " ".join(str(layer.get(key, "")) for key in ("LayerType", "ParameterType", "TacticName"))
    return HEAVY.search(kinds) is not None


def precision_of(layer: Json) -> str:
    """By the type of the layer's first input, in which it multiplies, and for TF32 by its kernel's name."""
    inputs = layer.get("Inputs") or [{}]
    # One field in TensorRT 10, two in 11.
    words = " ".join(str(inputs[0].get(key, "")) for key in ("Format/Datatype", "DataType", "Datatype", "Format"))
    precision = next((name for pattern, name in TYPES if pattern.search(words)), UNKNOWN)
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
