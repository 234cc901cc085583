"""The ONNX graph that TensorRT gets: its types say what is computed in which precision."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.core.errors import MachineError
from suanli.core.types import EngineInputs
from suanli.engines.backends import onnxruntime as onnx_engine

if TYPE_CHECKING:
    import onnx

OTHER_ENGINES = "Other engines may take it: cuda_graphs, onnxruntime and eager."
SHAPED = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")  # move numbers, whatever their type


def prepare_graph(inputs: EngineInputs, precision: str, folder: Path) -> onnx.ModelProto:
    """The graph for an engine of this precision. `folder` is for temporary files."""
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


def cast_inputs_first(model: onnx.ModelProto) -> None:
    """Changes the graph so that its uint8 inputs go into nothing but a cast to float32; the answers stay the same.

    Raises MachineError for a graph that does something else with uint8 than moving and casting it.
    """
    from onnx import TensorProto

    for source in model.graph.input:
        if source.type.tensor_type.elem_type == TensorProto.UINT8 and not _is_only_cast(model.graph, source.name):
            _cast_first(model.graph, source.name)


def _is_only_cast(graph: onnx.GraphProto, name: str) -> bool:
    from onnx import TensorProto

    castable = (TensorProto.FLOAT, TensorProto.FLOAT16)
    users = [node for node in graph.node if name in node.input]
    return all(node.op_type == "Cast" and _attribute(node, "to") in castable for node in users)


def _cast_first(graph: onnx.GraphProto, name: str) -> None:
    from onnx import TensorProto, helper

    first = f"{name}_as_float32"
    unsigned = {name}  # values that were uint8, and are float32 now
    same: dict[str, str] = {}  # the output of a cast that is left out, to its input, which is float32 now
    nodes = []
    for node in graph.node:  # in the order in which they are computed
        from_unsigned = unsigned.intersection(node.input)
        if from_unsigned and node.op_type == "Cast" and _attribute(node, "to") == TensorProto.FLOAT:
            same[node.output[0]] = first if node.input[0] == name else node.input[0]
            continue
        if from_unsigned and node.op_type in SHAPED:
            unsigned.add(node.output[0])
        elif from_unsigned and node.op_type not in ("Cast", "Shape", "Size"):
            raise MachineError(f"{node.op_type} {node.name!r} uses uint8, which TensorRT can't do.", fix=OTHER_ENGINES)
        for position, value in enumerate(node.input):
            node.input[position] = first if value == name else same.get(value, value)
        nodes.append(node)
    if name in same or any(output.name in unsigned | same.keys() for output in graph.output):
        raise MachineError("The graph answers with its own input.", fix=OTHER_ENGINES)
    del graph.node[:]
    graph.node.append(helper.make_node("Cast", [name], [first], name=first, to=TensorProto.FLOAT))
    graph.node.extend(nodes)
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
    casts = [
        helper.make_node("Cast", [source.name], [f"{source.name}_half"], name=f"{source.name}_half", to=half)
        for source in graph.input
        if source.type.tensor_type.elem_type == single
    ]
    for cast in casts:
        _rename_inputs(graph.node, cast.input[0], cast.output[0])
    for output in graph.output:
        if output.type.tensor_type.elem_type == single:
            _cast_output(graph, output.name)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def _cast_output(graph: onnx.GraphProto, name: str) -> None:
    """Puts a cast to float32 before the softmax that computes this output, or after another node that does."""
    from onnx import TensorProto, helper

    position, producer = next((i, node) for i, node in enumerate(graph.node) if name in node.output)
    if producer.op_type == "Softmax":
        source, target = producer.input[0], f"{name}_logits"
        producer.input[0] = target
    else:
        position, source, target = position + 1, f"{name}_half", name
        producer.output[list(producer.output).index(name)] = source
        _rename_inputs(graph.node, name, source)
    graph.node.insert(position, helper.make_node("Cast", [source], [target], name=f"{name}_cast", to=TensorProto.FLOAT))


def _halve(tensor: onnx.TensorProto) -> None:
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    largest = np.finfo(np.float16).max
    with np.errstate(over="ignore"):
        halves = np.where(np.isfinite(values), values.clip(-largest, largest), values).astype(np.float16)
    tensor.CopyFrom(numpy_helper.from_array(halves, tensor.name))


def _rename_inputs(nodes: Iterable[onnx.NodeProto], name: str, new: str) -> None:
    for node in nodes:
        node.input[:] = [new if value == name else value for value in node.input]


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
