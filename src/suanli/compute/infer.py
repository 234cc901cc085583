"""Probabilities of many inputs from a module: the only way in which suanli runs a network for its answers."""

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

    With `views`, the mean of the probabilities over the views of each input. The module is in evaluation mode
    meanwhile.
    """
    was_training = step.model.training
    step.model.eval()
    probabilities = []
    try:
        with torch.inference_mode(), force_eager(step):
            for rows in batches:
                inputs = preprocess.to_model(rows)
                seen = views(inputs) if views else [inputs]
                total = sum(task.probabilities(call(step, step.model, view)) for view in seen)
                probabilities.append((total / len(seen)).float().cpu())  # type: ignore[union-attr]
    finally:
        step.model.train(was_training)
    return torch.cat(probabilities).numpy() if probabilities else np.zeros((0, 0), np.float32)
