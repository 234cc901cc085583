"""Probabilities of many inputs from a module: the one way in which suanli asks a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from suanli.compute.step_runner import call, force_eager
from suanli.core.types import Preprocess, Step, Task

Views = Callable[[torch.Tensor], list[torch.Tensor]]


def infer(
    step: Step,
    preprocess: Preprocess,
    task: Task,
    batches: Iterable[torch.Tensor],
    *,
    views: Views | None = None,
) -> np.ndarray:
    """Probabilities (N, K) float32 of batches of cached rows (B, *row_shape) on the device.

    With `views`, the mean of the probabilities over the views of each input. The module is put
    into evaluation mode and back.
    """
    was_training = step.model.training
    step.model.eval()
    found = []
    try:
        with torch.inference_mode(), force_eager(step):
            for rows in batches:
                inputs = preprocess.to_model(rows)
                shown = views(inputs) if views else [inputs]
                total = sum(task.probabilities(call(step, step.model, view)) for view in shown)
                found.append((total / len(shown)).float().cpu())  # type: ignore[union-attr]
    finally:
        step.model.train(was_training)
    return torch.cat(found).numpy() if found else np.zeros((0, 0), np.float32)
