"""Changes to the ends of ONNX graphs: names, pixels in front, a softmax behind, an axis that counts examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

KEEP_PROBABILITIES = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Clip")  # what may follow them


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of branches and loops among them."""
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from nodes_of(inner)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def rename_values(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Gives values of the graph, its inputs and outputs among them, other names. Names are unique in a graph and in its
    branches."""
    graph = model.graph
    for node in graph.node:
        _rename_in_node(node, names)
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)


def _rename_in_node(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for inner in _subgraphs(node):
        for value in (*inner.output, *inner.value_info):  # a branch may give a value of the graph around it
            value.name = names.get(value.name, value.name)
        for inner_node in inner.node:
            _rename_in_node(inner_node, names)


def last_operation(model: onnx.ModelProto, output: str) -> str | None:
    """The kind of the node that computes an output, before others that keep its values; None: there is none."""
    nodes = {name: node for node in model.graph.node for name in node.output}
    last = nodes.get(output)
    while last is not None and last.op_type in KEEP_PROBABILITIES:
        last = nodes.get(last.input[0])
    return None if last is None else last.op_type


def append_softmax(model: onnx.ModelProto) -> None:
    """Computes the output "probabilities" by a softmax of what it was."""
    import onnx

    for node in model.graph.node:
        _rename_in_node(node, {"probabilities": "logits"})
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))


def prepend_pixels(
    model: onnx.ModelProto,
    name: str,
    picture: tuple[int, int, int],
    *,
    channels_first: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    """Puts the input "image", uint8 (B, height, width, channels) of the sizes `picture`, its cast, normalising and
    transposing in front of the input `name`."""
    import onnx

    graph, helper = model.graph, onnx.helper
    source = next(value for value in graph.input if value.name == name)
    channels = picture[2]
    spread, centre = np.asarray(std or [1.0] * channels), np.asarray(mean or [0.0] * channels)
    constants = {
        "suanli_scale": (1 / (255 * spread)).astype(np.float32),
        "suanli_shift": (-centre / spread).astype(np.float32),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(value, constant) for constant, value in constants.items())
    order = [0, 3, 1, 2] if channels_first else [0, 1, 2, 3]
    nodes = [
        helper.make_node("Cast", ["image"], ["suanli_float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["suanli_float", "suanli_scale"], ["suanli_scaled"]),
        helper.make_node("Add", ["suanli_scaled", "suanli_shift"], ["suanli_normal"]),
        helper.make_node("Transpose", ["suanli_normal"], ["suanli_placed"], perm=order),
        helper.make_node("Cast", ["suanli_placed"], [name], to=source.type.tensor_type.elem_type),
    ]
    _insert(graph, nodes)
    first = source.type.tensor_type.shape.dim[0]
    shape = [first.dim_param or first.dim_value, *picture]
    _replace_inputs(graph, {name: helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, shape)})


def add_example_axis(model: onnx.ModelProto, inputs: Sequence[str]) -> None:
    """Puts an axis of length 1 in front of these inputs and of every output."""
    graph = model.graph
    outputs = [value.name for value in graph.output]
    new_inputs = {value.name: _with_axis(value) for value in graph.input if value.name in inputs}
    new_outputs = [_with_axis(value) for value in graph.output]
    rename_values(model, {name: f"{name}_inner" for name in (*inputs, *outputs)})
    make = _axis_node_maker(model)
    _insert(graph, [make("Squeeze", name, f"{name}_inner") for name in inputs])
    graph.node.extend(make("Unsqueeze", f"{name}_inner", name) for name in outputs)
    _replace_inputs(graph, {f"{name}_inner": value for name, value in new_inputs.items()})
    del graph.output[:]
    graph.output.extend(new_outputs)


def _with_axis(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    import onnx

    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = [1, *(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)]
    return onnx.helper.make_tensor_value_info(value.name, tensor.elem_type, shape)


def _axis_node_maker(model: onnx.ModelProto) -> Callable[[str, str, str], onnx.NodeProto]:
    """Makes a Squeeze or Unsqueeze of the first axis, which since opset 13 is an input of it."""
    import onnx

    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is None:
        model.opset_import.append(onnx.helper.make_opsetid("", opset := 13))
    if opset < 13:
        return lambda kind, source, target: onnx.helper.make_node(kind, [source], [target], axes=[0])
    axis = onnx.numpy_helper.from_array(np.array([0], np.int64), "suanli_axis")
    model.graph.initializer.append(axis)
    return lambda kind, source, target: onnx.helper.make_node(kind, [source, axis.name], [target])


def _insert(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)


def _replace_inputs(graph: onnx.GraphProto, by_name: Mapping[str, onnx.ValueInfoProto]) -> None:
    inputs = [by_name.get(value.name, value) for value in graph.input]
    copies = []
    for value in inputs:
        copy = type(value)()
        copy.CopyFrom(value)  # those of the graph end with the list
        copies.append(copy)
    del graph.input[:]
    graph.input.extend(copies)
