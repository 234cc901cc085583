"""Embeddings: of each input the numbers that the network's head is given. Inputs that are alike have similar ones.

They come from the network itself, in float32 PyTorch: an engine's graph gives answers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from suanli.compute.infer import network_inputs
from suanli.core.errors import UsageError
from suanli.core.types import Device, EncodedInput
from suanli.engines.predictor import group_by_shape, stack
from suanli.models import build
from suanli.models.backbone import HeadInputs
from suanli.models.model_folder import SavedModel


class Embedder:
    """A saved model that gives embeddings."""

    def __init__(self, saved: SavedModel, device: Device) -> None:
        """Raises UsageError for a network without a head, and for inputs that are cut into windows."""
        if saved.preprocess.has_windows:
            raise UsageError("Inputs that are cut into tiles have no embedding of their own.", fix="Cut them first.")
        self.preprocess = saved.preprocess
        self._device = torch.device(device.torch_name)
        self._module = saved.module.to(self._device).eval()
        self._head = head_of(saved)

    def embed(self, encoded: Sequence[EncodedInput]) -> np.ndarray:
        """(N, F) float32 of N encoded inputs, at least one. Raises MachineError for a network that has none."""
        with HeadInputs(self._module, self._head) as seen, torch.inference_mode():
            for part in group_by_shape(encoded):
                arrays = {name: torch.from_numpy(array) for name, array in stack(part, self.preprocess).items()}
                on_device = {name: tensor.to(self._device) for name, tensor in arrays.items()}
                inputs = network_inputs(self.preprocess.to_model(on_device))
                self._module(*inputs) if isinstance(inputs, tuple) else self._module(inputs)
        return seen.vectors(len(encoded))


def head_of(saved: SavedModel) -> str:
    """The name of its head. Raises UsageError where there is none."""
    return build.head_of(saved.module, build.resolve(saved.recipe.model))
