"""A trained model from cached rows to probabilities: what an engine has to compute, preprocessing included.

The second half of preprocessing and the task's probabilities lie in the same graph as the network, so that an
engine can't be fed inputs that were normalised otherwise.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from suanli.errors import MachineError
from suanli.saved import SavedModel
from suanli.types import Preprocess

LARGEST = 4096  # batch that an exported graph takes


class Whole(nn.Module):
    """Cached rows (B, *row_shape) to probabilities (B, K) float32."""

    def __init__(self, saved: SavedModel) -> None:
        super().__init__()
        self.network, self.preprocess, self._task = saved.module, saved.preprocess, saved.task
        self.eval()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._task.probabilities(self.network(self.preprocess.to_model(rows)))


def example(preprocess: Preprocess, batch: int) -> torch.Tensor:
    """Rows of zeros (batch, *row_shape)."""
    return torch.from_numpy(np.zeros((batch, *preprocess.row_shape), preprocess.row_dtype))


def write_onnx(saved: SavedModel, path: Path) -> None:
    """The model as one ONNX file of float32 operations with any batch size.

    Input "rows" (B, *row_shape), output "probabilities" (B, K); names of classes and the first half of preprocessing
    are in its metadata, as JSON. Raises MachineError for a network that can't be exported, with the exporter's reason.
    """
    whole = Whole(saved)
    rows = example(saved.preprocess, 3)  # a batch of one would be taken for a constant
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
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=LARGEST)},),
                input_names=["rows"],
                output_names=["probabilities"],
                verbose=False,
            )
            assert program is not None
            about = {"kind": saved.preprocess.kind, "settings": saved.preprocess.settings()}
            program.model.metadata_props.update(
                {"classes": json.dumps(saved.classes, ensure_ascii=False), "preprocess": json.dumps(about)}
            )
            program.save(str(path))
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise MachineError(
            f"This network can't be written as ONNX ({reason(error)}).",
            fix="Engines that need no ONNX still work: eager and inductor.",
        ) from error
    finally:
        noisy.setLevel(level)


def reason(error: BaseException) -> str:
    """The line of an exporter's message that names what it can't do: the innermost cause's first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
