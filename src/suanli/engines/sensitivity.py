"""Which layers lose most when they compute in int8: measured, one layer at a time.

The graph is quantized as a whole, once; then, for each layer, every other one gets its float inputs and weights back,
and the answers are held against those of the float graph. Layers that hurt most come first, so that a rescue knows
what to return to higher precision.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from suanli.core.types import EngineInputs, Placement
from suanli.engines.backends import onnxruntime as engine

LOOKED_AT = 32  # rows


def rank_layers(inputs: EngineInputs, placement: Placement) -> list[tuple[str, float]]:
    """Names of the graph's layers, each with the mean total variation distance (0 to 1) between the answers of the
    float graph and of the same graph with this layer in int8; the worst first."""
    import onnx

    assert inputs.calibration is not None
    rows = np.ascontiguousarray(inputs.calibration[:LOOKED_AT])
    with tempfile.TemporaryDirectory() as place:
        whole = onnx.load(engine.quantize(inputs, Path(place)))
        quantized = onnx.load(Path(place) / engine.FILE)
    layers = [node.name for node in whole.graph.node if node.op_type in engine.QUANTIZED]
    reference = _answers(whole, rows, placement)
    found = [(name, _apart(_answers(_with_one(quantized, whole, name), rows, placement), reference)) for name in layers]
    return sorted(found, key=lambda pair: -pair[1])


def _with_one(quantized: Any, whole: Any, layer: str) -> Any:
    """The quantized graph with nothing but this layer quantized."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    graph = model.graph
    floats = {tensor.name: tensor for tensor in whole.graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    there: set[str] = set()
    own = {output for node in graph.node if node.name == layer for output in node.output}

    def undone(name: str) -> str:
        """The float value behind a dequantized one."""
        node = made_by.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return name
        before = made_by.get(node.input[0])
        if before is not None:  # what this layer gives is rounded, too
            return name if before.input[0] in own else undone(before.input[0])
        original = node.input[0].removesuffix("_quantized")
        if original not in floats:
            return name
        mine = f"{original}_float"  # the original's name may be that of the dequantized one now
        if mine not in there:
            tensor = graph.initializer.add()
            tensor.CopyFrom(floats[original])
            tensor.name = mine
            there.add(mine)
        return mine

    for node in graph.node:
        if node.name != layer and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            for position, name in enumerate(node.input):
                node.input[position] = undone(name)
    for output in graph.output:
        source = undone(output.name)
        if source != output.name:
            graph.node.append(onnx.helper.make_node("Identity", [source], [f"{output.name}_float"]))
            output.name = f"{output.name}_float"
    return model


def _answers(model: Any, rows: np.ndarray, placement: Placement) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), engine.options(placement.threads), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {session.get_inputs()[0].name: rows})[0])


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).sum(1).mean() / 2)
