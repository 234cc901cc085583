"""The ONNX graph that TensorRT gets: its types say what is computed in which precision."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.core.errors import MachineError
from suanli.core.types import EngineInputs
from suanli.engines.backends import onnxruntime as onnx_engine
from suanli.engines.graphs import find_float_nodes

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
        convert_to_float16(model, find_float_nodes(inputs.onnx))
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


def convert_to_float16(model: onnx.ModelProto, kept: Collection[str] = ()) -> None:
    """Changes a float32 graph so that it computes in float16, but for the nodes of these names, which nothing else
    depends on: in float16, the area of a large box would be infinite. Its inputs and outputs keep their types; numbers
    beyond float16's range become its largest. Raises MachineError for graphs with branches or loops."""
    from onnx import AttributeProto, TensorProto

    graph = model.graph
    single, half = TensorProto.FLOAT, TensorProto.FLOAT16
    floats = _float_values(model)
    halves = [node for node in graph.node if node.name not in kept]
    singles = [node for node in graph.node if node.name in kept]
    sizes = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}  # must be float32
    _halve_weights(graph, halves, singles, sizes)
    for node in halves:
        for attribute in node.attribute:
            if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                raise MachineError(f"{node.op_type} {node.name!r} has a graph of its own.", fix=OTHER_ENGINES)
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == single:
                if not sizes.intersection(node.output):
                    _halve(attribute.t)
            elif attribute.name in ("to", "dtype") and attribute.i == single:
                attribute.i = half
    sources = [value.name for value in graph.input if value.type.tensor_type.elem_type == single]
    before = [_cast(name, f"{name}_half", half, halves) for name in sources]
    made = {name for node in halves for name in node.output if name in floats and name not in sizes}
    read = {name for node in singles for name in node.input}
    between = [_cast(name, f"{name}_single", single, singles) for name in sorted(made & read)]
    after = [_cast_output(output.name, [*halves, *between]) for output in graph.output if output.name in made]
    del graph.node[:]
    graph.node.extend([*before, *halves, *between, *singles, *after])
    del graph.value_info[:]


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of the values between nodes, and of the outputs, that are float32."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def _halve_weights(
    graph: onnx.GraphProto, halves: Sequence[onnx.NodeProto], singles: Sequence[onnx.NodeProto], sizes: set[str]
) -> None:
    """Those that `singles` need, too, get a float32 copy."""
    from onnx import TensorProto

    read = {name for node in halves for name in node.input}
    also = {name for node in singles for name in node.input}
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or tensor.name in sizes or tensor.name not in read:
            continue
        if tensor.name in also:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = f"{tensor.name}_single"
            _rename_inputs(singles, tensor.name, copy.name)
        _halve(tensor)


def _cast(name: str, new: str, to: int, nodes: Iterable[onnx.NodeProto]) -> onnx.NodeProto:
    """A cast of this value, which these nodes read instead."""
    from onnx import helper

    _rename_inputs(nodes, name, new)
    return helper.make_node("Cast", [name], [new], name=new, to=to)


def _cast_output(name: str, nodes: Sequence[onnx.NodeProto]) -> onnx.NodeProto:
    """A cast to float32 that gives this output, whose value has another name from now on."""
    from onnx import TensorProto, helper

    producer = next(node for node in nodes if name in node.output)
    inner = f"{name}_half"
    producer.output[list(producer.output).index(name)] = inner
    _rename_inputs(nodes, name, inner)
    return helper.make_node("Cast", [inner], [name], name=f"{name}_cast", to=TensorProto.FLOAT)


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
