"""Fits the head of a network to features of the frozen backbone, before any layer is trained.

Given weights have learned features that a linear head often separates at once. It takes one pass over the images
instead of many, gives a score in seconds, and a training of all layers that starts from it disturbs the features less
than one that starts from a random head: A. Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022 (arXiv:2202.10054).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from suanli.compute.infer import network_inputs
from suanli.core.console import duration, say, warn
from suanli.core.errors import MachineError
from suanli.core.schema import Stored, Tensors, take
from suanli.core.task import Task
from suanli.core.types import Device, Pretrained, Recipe
from suanli.data.cache import PreparedData
from suanli.data.loader import Feed
from suanli.models.backbone import backbone_of
from suanli.parallel.group import Group
from suanli.training import linear_head
from suanli.training.feature_ways import relative_error
from suanli.training.forecast import explain_out_of_memory
from suanli.training.frozen_features import Features, FrozenNetwork, compute_features, digest_network
from suanli.training.frozen_head import Figures, FrozenHead
from suanli.training.linear_head import Examples, LinearHead
from suanli.training.setup import Setup

MOST_IMAGES = 50_000  # whose features are computed: a head for them hardly changes with more
CHECKED_IMAGES = 4
TOLERANCE = 1e-3  # between what the network and the head alone return


def fit_head(
    recipe: Recipe,
    prepared: PreparedData,
    device: Device,
    cache: Path,
    *,
    given: Pretrained | None = None,
    started: float | None = None,
) -> FrozenHead | None:
    """Fits the head in this process alone, and says its score on validation, `started` being when the user's command
    began, and `given` the weights where they are found already. None, with the reason, for a network whose answers
    aren't its head's."""
    with explain_out_of_memory(device):
        setup = Setup(recipe, prepared, device, given=given)
    begun = time.perf_counter()
    name, module = setup.head, setup.module.eval()
    layer = module.get_submodule(name)
    backbone = backbone_of(module, name)
    if (reason := _why_not(module, name, backbone, _first_inputs(setup))) is not None or not isinstance(
        layer, nn.Linear
    ):
        warn(f"The head isn't fitted to frozen features first: {reason}.")
        return None
    frozen = FrozenNetwork(backbone=backbone, digest=digest_network(recipe, module, name), length=layer.in_features)
    chosen = _choose_images(len(prepared.splits["train"]), recipe.seed)
    try:
        features = compute_features(frozen, recipe, prepared, chosen, device=device, cache=cache)
    except MachineError as error:
        warn(f"The head isn't fitted to frozen features first: {error.message}")
        return None
    head, task, scores, wrong = _fit(setup, features, chosen, layer)
    tensors = {f"{name}.weight": head.weight.cpu()}
    if head.bias is not None:
        tensors[f"{name}.bias"] = head.bias.cpu()
    figures = Figures(
        seconds=time.perf_counter() - begun,
        images=len(chosen),
        views=features.views,
        features=frozen.length,
        images_per_s=features.images_per_s,
        way=features.way,
        tried=features.tried,
        penalty=head.penalty,
    )
    fitted = FrozenHead(tensors=tensors, scores=scores, wrong=wrong, task_settings=task.settings, figures=figures)
    say(describe(fitted, task, begun if started is None else started))
    return fitted


def fit_for_all(
    group: Group,
    recipe: Recipe,
    prepared: PreparedData,
    device: Device,
    cache: Path,
    *,
    given: Pretrained | None = None,
    started: float | None = None,
) -> FrozenHead | None:
    """A collective: as `fit_head`, by the first process."""
    head = fit_head(recipe, prepared, device, cache, given=given, started=started) if group.is_first else None
    values = group.broadcast(head and head.to_json())
    return None if values is None else FrozenHead.from_json(values)


def describe(head: FrozenHead, task: Task, started: float) -> str:
    figures, metric = head.figures, task.metric
    after = duration(time.perf_counter() - started)
    score = (
        f"validation {metric.name} {metric.format(head.scores[metric.name])}" if head.scores else "the head is fitted"
    )
    how = "from the cache"
    if figures.images_per_s is not None:
        how = f"{figures.images_per_s:,.0f} images/s, {figures.way}"
    return f"frozen features: {score} after {after} ({figures.features:,} features, {how})"


def _why_not(module: nn.Module, head: str, backbone: nn.Module, inputs: Any) -> str | None:
    """Why a linear head on features of this network isn't the network; None: it is."""
    layer = module.get_submodule(head)
    if not isinstance(layer, nn.Linear):
        return f"its layer {head!r} is no linear layer"
    calls = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.inference_mode():
        try:
            expected, features = module(*calls), backbone(*calls)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            return f"the network doesn't run without it ({error})"
        if not isinstance(features, torch.Tensor) or features.shape != (len(calls[0]), layer.in_features):
            return f"the network computes more after its layer {head!r} than a vector an image"
        answer = layer(features)
    if not isinstance(expected, torch.Tensor) or not relative_error(answer, expected) <= TOLERANCE:
        return f"the network changes what its layer {head!r} returns"
    return None


def _first_inputs(setup: Setup) -> Any:
    split = setup.prepared.splits["train"]
    feed = Feed(split, setup.device)
    count = min(CHECKED_IMAGES, len(split))
    return network_inputs(setup.prepared.preprocess.to_model(feed.inputs(torch.arange(count))))


def _choose_images(count: int, seed: int) -> np.ndarray:
    """Positions in the training split, in order."""
    if count <= MOST_IMAGES:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:MOST_IMAGES])


def _fit(
    setup: Setup, features: Features, chosen: np.ndarray, layer: nn.Linear
) -> tuple[LinearHead, Task, dict[str, float], int]:
    """The head, the calibrated task, its scores on validation, and how many of its answers are wrong."""
    task, splits, device = setup.task, setup.prepared.splits, torch.device(setup.device.torch_name)
    train = Examples(
        features=torch.from_numpy(features.train).to(device),
        targets=_targets(splits["train"].targets, np.tile(chosen, features.views), device),
    )
    val_targets = splits["val"].targets
    val = Examples(
        features=torch.from_numpy(features.val).to(device),
        targets=_targets(val_targets, np.arange(len(splits["val"])), device),
    )
    head = linear_head.fit(task, train, val, layer)
    if not len(splits["val"]):
        return head, task, {}, 0
    with torch.no_grad():
        predictions = {name: tensor.cpu().numpy() for name, tensor in task.predict(head(val.features)).items()}
    calibrated = task.calibrate(task.records(predictions, val_targets)) if task.needs_calibration else task
    # As in training: scores before a threshold is chosen on the same examples.
    records = task.records(predictions, val_targets)
    return head, calibrated, task.scores(records), int((task.errors(records) > 0).sum())


def _targets(columns: Mapping[str, Stored], positions: np.ndarray, device: torch.device) -> Tensors:
    """As a batch has them."""
    arrays: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        arrays |= take(column, positions, name)
    return {name: torch.from_numpy(np.asarray(array)).to(device) for name, array in arrays.items()}
