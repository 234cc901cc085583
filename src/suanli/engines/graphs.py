"""What an ONNX graph says about itself. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Attention", "RNN", "GRU", "LSTM", "If", "Loop", "Scan")
FLOAT_NODES = "suanli_float_nodes"  # metadata of a graph: names of the nodes behind the network, as JSON


def find_names(path: Path) -> tuple[list[str], list[str]]:
    """The names of its inputs and of its outputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}  # which old files list among the inputs
    return [one.name for one in graph.input if one.name not in weights], [one.name for one in graph.output]


def find_float_nodes(path: Path) -> list[str]:
    """Names of the nodes that must stay in floating point: those behind the network, such as what suppresses
    overlapping boxes, where suanli wrote the graph; and what follows the last product or convolution on the way to an
    output, such as what makes boxes of distances, where rounding moves answers and saves nothing."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    behind = next((set(json.loads(one.value)) for one in model.metadata_props if one.key == FLOAT_NODES), set())
    needed: set[str] = set()  # values that a product or convolution depends on
    floats = []
    for node in reversed(model.graph.node):  # which are sorted
        if node.name not in behind and (_is_heavy(node) or needed.intersection(node.output)):
            needed.update(_inputs(node))
        elif node.name:
            floats.append(node.name)
    return floats[::-1]


def _is_heavy(node: onnx.NodeProto) -> bool:
    """Whether it is a product or convolution, or something of unknown content."""
    return node.op_type in HEAVY or node.domain not in ("", "ai.onnx")


def _inputs(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, also in graphs of its own."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _inputs(inner)
