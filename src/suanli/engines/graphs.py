"""What an ONNX graph says about itself. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

FLOAT_NODES = "suanli_float_nodes"  # metadata of a graph: names of the nodes behind the network, as JSON


def find_names(path: Path) -> tuple[list[str], list[str]]:
    """The names of its inputs and of its outputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}  # which old files list among the inputs
    return [one.name for one in graph.input if one.name not in weights], [one.name for one in graph.output]


def find_float_nodes(path: Path) -> list[str]:
    """The nodes behind the network, which must stay in floating point, such as those that suppress overlapping boxes;
    none for graphs that suanli didn't write."""
    import onnx

    properties = onnx.load(path, load_external_data=False).metadata_props
    return next((json.loads(one.value) for one in properties if one.key == FLOAT_NODES), [])
