"""From a recipe, prepared data, a device and a plan to a loop that is ready for its first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from suanli import building, planning
from suanli.cache import Prepared
from suanli.console import say
from suanli.data import Feed, mix
from suanli.loop import Loop
from suanli.plugins import load
from suanli.saved import weights_of
from suanli.types import Device, Plan, Recipe, Step

INITIALIZE_EXAMPLES = 2000  # training inputs that a data-dependent initialisation sees


def build_loop(recipe: Recipe, prepared: Prepared, device: Device, plan: Plan, *, fresh: bool = True) -> Loop:
    """Raises UsageError for a name or argument in the recipe that does not exist or fit. Not `fresh`:
    a checkpoint will replace every weight, so none is loaded or initialised from data."""
    torch.manual_seed(mix(recipe.seed, 0))
    module = building.build(recipe, prepared.preprocess, len(prepared.classes))
    head = building.head_of(module, building.resolve(recipe.model))
    if fresh and recipe.weights is not None:
        file, card = weights_of(Path(recipe.weights).expanduser())
        other_classes = card is not None and tuple(card["classes"]) != prepared.classes
        say(str(building.load_weights(module, file, head, new_head=other_classes)))
    train, val = (Feed(prepared.splits[s], device) for s in ("train", "val"))
    module.to(device.torch_name)
    initialize = getattr(module, "initialize", None)
    if fresh and recipe.weights is None and callable(initialize):
        spread = torch.from_numpy(np.random.default_rng(recipe.seed).permutation(len(train))[:INITIALIZE_EXAMPLES])
        initialize(prepared.preprocess.to_model(train.rows(spread)))
    step = planning.apply(plan, Step(model=module), device)
    optimizer = load("optimizers", recipe.optimizer).build(
        list(module.named_parameters()),
        head=head,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        backbone_lr_scale=recipe.backbone_lr_scale,
        fused=step.fused_optimizer,
        **recipe.optimizer_args,
    )
    return Loop(
        recipe=recipe,
        step=step,
        optimizer=optimizer,
        task=load("tasks", recipe.task)(),
        preprocess=prepared.preprocess,
        train=train,
        val=val,
        device=device,
        classes=len(prepared.classes),
    )
