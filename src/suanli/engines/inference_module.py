"""A trained model as one module from cached inputs to predictions, which is what every engine computes.

The second half of preprocessing and the task's predictions are in the same graph as the network, so that inputs can't
be normalised in another way than in training.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from suanli.core.errors import MachineError, first_line
from suanli.core.schema import Arrays, Column, pick, zeros
from suanli.core.task import Task
from suanli.core.types import Preprocess
from suanli.engines.graphs import FLOAT_NODES
from suanli.models.model_folder import SavedModel
from suanli.tasks.tensors import Tensors

if TYPE_CHECKING:
    import onnx_ir

MAX_BATCH = 4096  # of an exported graph
EXAMPLES = 3  # in the batch that is traced: one would be taken for a constant
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of a node, by the exporter: the modules that it is in


class InferenceModule(nn.Module):
    """Cached inputs (B, …), in the order of `Preprocess.inputs`, to predictions (B, …), in that of `Task.outputs`."""

    def __init__(self, saved: SavedModel) -> None:
        super().__init__()
        self.network, self.preprocess = saved.module, saved.preprocess
        self.predict = _Prediction(saved.task)
        self.eval()

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.predict.names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = self.preprocess.to_model(dict(zip(self.preprocess.inputs, tensors, strict=True)))
        answers: tuple[torch.Tensor, ...] = self.predict(self.network(*inputs.values()))
        return answers


class _Prediction(nn.Module):
    """A module of its own, so that an exported graph says which nodes are behind the network."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.names = task, tuple(task.outputs)

    def forward(self, outputs: Any) -> tuple[torch.Tensor, ...]:
        predictions = self.task.predict(outputs)
        return tuple(predictions[name] for name in self.names)


class _RawNetwork(nn.Module):
    """A network that gives what it returns by these names; none: all that it returns, numbered."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = _pytree.tree_leaves(self.network(*inputs))
        names = self.names or [f"output_{place}" for place in range(len(tensors))]
        return {name: tensor.float() for name, tensor in zip(names, tensors, strict=False)}


def without_predictions(saved: SavedModel) -> SavedModel:
    """The model whose answers are what its network returns, as `Task.raw_names` calls it: logits, for a classifier."""
    network = _RawNetwork(saved.module, saved.task.raw_names).eval()
    inputs = zip(saved.preprocess.inputs, example_tensors(saved.preprocess, EXAMPLES), strict=True)
    with torch.inference_mode():
        raw = network(*saved.preprocess.to_model(dict(inputs)).values())
    columns = {
        name: Column(shape=tuple(tensor.shape[1:]), dtype="float32", role="features") for name, tensor in raw.items()
    }
    return replace(saved, module=network, task=Tensors(classes=saved.task.classes, columns=columns))


def example_tensors(preprocess: Preprocess, batch: int) -> tuple[torch.Tensor, ...]:
    """Inputs of zeros (batch, …)."""
    return tuple(torch.from_numpy(array) for array in zeros(preprocess.inputs, batch).values())


def free_batch(preprocess: Preprocess) -> tuple[tuple[dict[int, Any], ...]]:
    """For torch.export: the first axis of every input is a batch of any size."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return (tuple({0: batch} for _ in preprocess.inputs),)


def to_tensors(arrays: Arrays, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in pick(arrays, tuple(names)).values())


def to_arrays(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    """On the CPU; floating-point numbers in float32."""
    plain = (tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)
    return {name: tensor.cpu().numpy() for name, tensor in zip(names, plain, strict=True)}


def write_onnx(saved: SavedModel, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model as one ONNX file of float32 operations that takes any batch size.

    Its inputs are those of `Preprocess.inputs`, its outputs those of `Task.outputs`, with a batch in front. Raises
    MachineError for a network that can't be exported, with the exporter's reason, or only with a fixed batch size, or
    that one file can't hold.
    """
    module = InferenceModule(saved)
    tensors = example_tensors(saved.preprocess, EXAMPLES)
    with torch.inference_mode():
        module(*tensors)  # constants that the first call caches must not be created while exporting
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tensors,
                dynamo=True,
                dynamic_shapes=free_batch(saved.preprocess),
                input_names=list(saved.preprocess.inputs),
                output_names=list(module.outputs),
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update(_clear_nodes(program.model.graph) | dict(metadata or {}))
            program.save(str(path))
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise _export_error(innermost_cause(error)) from error
    finally:
        logger.setLevel(level)
    if any(value.shape is None or isinstance(value.shape[0], int) for value in program.model.graph.outputs):
        path.unlink()
        raise _export_error("it fixes the batch size; a network must take x.shape[0], not len(x)")
    if path.with_name(f"{path.name}.data").exists():  # where the exporter puts what one file can't hold
        raise _export_error("it is larger than one file may be, about 2 GB")


def _clear_nodes(graph: onnx_ir.Graph) -> dict[str, str]:
    """Clears what names source files of this machine, and returns the metadata that says which nodes are behind the
    network, where some are."""
    behind = []
    for node in graph.all_nodes():
        if node.metadata_props.get(SCOPES, "").startswith("['', 'predict'"):
            behind.append(node.name)
        node.metadata_props.clear()
    return {FLOAT_NODES: json.dumps(behind)} if behind else {}


def _export_error(reason: str) -> MachineError:
    return MachineError(
        f"This network can't be written as ONNX ({reason}).",
        fix="What needs no ONNX still works: PyTorch's own engines.",
    )


def innermost_cause(error: BaseException) -> str:
    """The first line of the innermost cause: in an exporter's error, it names what can't be exported."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error, 300)
