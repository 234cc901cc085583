"""Which layers' answers suffer most from int8, measured one layer at a time.

The graph is quantized once; then, for each layer, all others get their float inputs and weights back, and the answers
are compared with those of the float graph. The search returns the layers that hurt most to float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.schema import Arrays
from suanli.core.task import Task
from suanli.core.types import EngineInputs, Placement
from suanli.engines.backends import onnxruntime as engine
from suanli.engines.examples import CALIBRATION_BATCH, SeparateExamples
from suanli.engines.graphs import find_float_nodes

if TYPE_CHECKING:
    import onnx

INPUTS = 32  # of calibration, for which answers are compared


def rank_layers(inputs: EngineInputs, task: Task, placement: Placement) -> list[tuple[str, float]]:
    """Names of the graph's layers, each with the mean drift, as the task measures it, from the answers of the float
    graph to those of the same graph with only this layer in int8; the largest drift first."""
    import onnx

    assert inputs.calibration is not None
    assert inputs.onnx is not None
    batches = inputs.calibration[: INPUTS // CALIBRATION_BATCH if inputs.batches else INPUTS]
    with tempfile.TemporaryDirectory() as folder:
        original = onnx.load(engine.quantize(inputs, Path(folder)))
        quantized = onnx.load(Path(folder) / engine.FILE)
    kept = find_float_nodes(inputs.onnx)
    layers = [n.name for n in original.graph.node if n.op_type in engine.QUANTIZED and n.name not in kept]
    reference = _answers(original, batches, placement)
    drifts = []
    for layer in layers:
        answers = _answers(_keep_one(quantized, original, layer), batches, placement)
        pairs = zip(reference.blocks(), answers.blocks(), strict=True)
        drifts.append((layer, float(np.concatenate([task.drift(*pair) for pair in pairs]).mean())))
    return sorted(drifts, key=lambda pair: -pair[1])


def _keep_one(quantized: onnx.ModelProto, original: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """The quantized graph with only this layer quantized."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    graph = model.graph
    floats = {tensor.name: tensor for tensor in original.graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    copied: set[str] = set()
    outputs = {output for node in graph.node if node.name == layer for output in node.output}

    def find_float(name: str) -> str:
        """The float value behind a dequantized one."""
        node = producers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return name
        before = producers.get(node.input[0])
        if before is not None:  # what this layer puts out is quantized, too
            return name if before.input[0] in outputs else find_float(before.input[0])
        weight = node.input[0].removesuffix("_quantized")
        if weight not in floats:
            return name
        copy = f"{weight}_float"  # the weight's own name may be that of the dequantized one now
        if copy not in copied:
            tensor = graph.initializer.add()
            tensor.CopyFrom(floats[weight])
            tensor.name = copy
            copied.add(copy)
        return copy

    for node in graph.node:
        if node.name != layer and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            for position, name in enumerate(node.input):
                node.input[position] = find_float(name)
    for output in graph.output:
        source = find_float(output.name)
        if source != output.name:
            graph.node.append(onnx.helper.make_node("Identity", [source], [f"{output.name}_float"]))
            output.name = f"{output.name}_float"
    return model


def _answers(model: onnx.ModelProto, batches: Sequence[Arrays], placement: Placement) -> SeparateExamples:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), engine.options(placement.threads), providers=["CPUExecutionProvider"]
    )
    answer = engine.answers_of(session)
    return SeparateExamples(calls=[answer(arrays) for arrays in batches])
