"""A trained model as one module from cached rows to probabilities, which is what every engine computes.

The second half of preprocessing and the task's probabilities are in the same graph as the network, so that inputs
can't be normalised in another way than in training.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from suanli.core.errors import MachineError, first_line
from suanli.core.types import Preprocess
from suanli.models.model_folder import SavedModel

MAX_BATCH = 4096  # of an exported graph


class InferenceModule(nn.Module):
    """Cached rows (B, *row_shape) to probabilities (B, K) float32."""

    def __init__(self, saved: SavedModel) -> None:
        super().__init__()
        self.network, self.preprocess, self._task = saved.module, saved.preprocess, saved.task
        self.eval()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._task.probabilities(self.network(self.preprocess.to_model(rows)))


def example_rows(preprocess: Preprocess, batch: int) -> torch.Tensor:
    """Rows of zeros (batch, *row_shape)."""
    return torch.from_numpy(np.zeros((batch, *preprocess.row_shape), preprocess.row_dtype))


def write_onnx(saved: SavedModel, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model as one ONNX file of float32 operations that takes any batch size.

    Input "rows" (B, *row_shape), output "probabilities" (B, K). Raises MachineError for a network that can't be
    exported, with the exporter's reason, or only with a fixed batch size, or that one file can't hold.
    """
    module = InferenceModule(saved)
    rows = example_rows(saved.preprocess, 3)  # a batch of one would be taken for a constant
    with torch.inference_mode():
        module(rows)  # constants that the first call caches must not be created while exporting
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (rows,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
                input_names=["rows"],
                output_names=["probabilities"],
                verbose=False,
            )
            assert program is not None
            graph = program.model.graph
            for node in graph.all_nodes():
                node.metadata_props.clear()  # names source files of this machine
            program.model.metadata_props.update(metadata or {})
            program.save(str(path))
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise _export_error(innermost_cause(error)) from error
    finally:
        logger.setLevel(level)
    shape = graph.outputs[0].shape
    if shape is None or isinstance(shape[0], int):
        path.unlink()
        raise _export_error("it fixes the batch size; a network must take x.shape[0], not len(x)")
    if path.with_name(f"{path.name}.data").exists():  # where the exporter puts what one file can't hold
        raise _export_error("it is larger than one file may be, about 2 GB")


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
