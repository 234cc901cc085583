"""Predictions for many inputs from a module: the only way in which suanli runs a network for its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from suanli.compute.step_runner import call, force_eager
from suanli.core.schema import Tensors
from suanli.core.task import Task
from suanli.core.types import Preprocess, Step

Views = Callable[[Tensors], list[Tensors]]


def infer(
    step: Step, preprocess: Preprocess, task: Task, batches: Iterable[Tensors], *, views: Views | None = None
) -> dict[str, np.ndarray]:
    """Predictions (N, …) by `task.outputs` of batches of cached inputs (B, …) on the device; empty for no batches.

    With `views`, the mean of the predictions over the views of each input. The module is in evaluation mode
    meanwhile.
    """
    was_training = step.model.training
    step.model.eval()
    parts: dict[str, list[torch.Tensor]] = {}
    try:
        with torch.inference_mode(), force_eager(step):
            for inputs in batches:
                tensors = preprocess.to_model(inputs)
                seen = views(tensors) if views else [tensors]
                predictions = [task.predict(call(step, step.model, network_inputs(view))) for view in seen]
                for name in predictions[0]:
                    mean = predictions[0][name] if len(seen) == 1 else sum(p[name] for p in predictions) / len(seen)
                    parts.setdefault(name, []).append(mean.cpu())  # type: ignore[union-attr]
    finally:
        step.model.train(was_training)
    return {name: torch.cat(tensors).numpy() for name, tensors in parts.items()}


def network_inputs(tensors: Tensors) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What a network is called with: one tensor as it is, several as positional arguments."""
    values = tuple(tensors.values())
    return values[0] if len(values) == 1 else values
