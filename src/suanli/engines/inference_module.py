"""A trained model from cached rows to probabilities: what an engine has to compute, preprocessing included.

The second half of preprocessing and the task's probabilities lie in the same graph as the network, so that an
engine can't be fed inputs that were normalised otherwise.
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

MAX_BATCH = 4096  # batch that an exported graph takes


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
    """The model as one ONNX file of float32 operations with any batch size.

    Input "rows" (B, *row_shape), output "probabilities" (B, K). Raises MachineError for a network that can't be
    exported, with the exporter's reason, whose batch size it fixes, or that one file can't hold.
    """
    whole = InferenceModule(saved)
    rows = example_rows(saved.preprocess, 3)  # a batch of one would be taken for a constant
    with torch.inference_mode():
        whole(rows)  # constants that are made at the first call and kept must not be made by the exporter
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                whole,
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
                node.metadata_props.clear()  # where in whose source code it came from is nobody's business
            program.model.metadata_props.update(metadata or {})
            program.save(str(path))
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise _not_onnx(innermost_cause(error)) from error
    finally:
        noisy.setLevel(level)
    shape = graph.outputs[0].shape
    if shape is None or isinstance(shape[0], int):
        path.unlink()
        raise _not_onnx("it fixes the batch size; a network must take x.shape[0], not len(x)")
    if path.with_name(f"{path.name}.data").exists():  # where the exporter puts what one file can't hold
        raise _not_onnx("it is larger than one file may be, about 2 GB")


def _not_onnx(why: str) -> MachineError:
    return MachineError(
        f"This network can't be written as ONNX ({why}).", fix="What needs no ONNX still works: PyTorch's own engines."
    )


def innermost_cause(error: BaseException) -> str:
    """The line of an exporter's message that names what it can't do: the innermost cause's first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error, 300)
