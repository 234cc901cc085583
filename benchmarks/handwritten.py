"""A training loop as a careful engineer writes it for one recipe, to compare with suanli's.

It has the same network, optimizer, schedule, augmentations, clipping and averaging of weights, on the same rows; no
clock, no progress, no checkpoint, no check of the loss, no way to resume. Rows are gathered by index from one uint8
tensor: a `DataLoader` would only make it slower.

Of the usual speed-ups (MEANS) it uses those that are requested; without any it is plain PyTorch: float32, contiguous
images (B, C, H, W), eager, a default optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from splits import inputs_of
from suanli.core import registry
from suanli.core.schema import Tensors, take
from suanli.core.types import Batch, Device, Recipe
from suanli.data.cache import PreparedData
from suanli.models import build
from suanli.training.augment import compose
from suanli.training.schedule import lr_factor

MEANS = ("channels_last", "bf16", "fused_optimizer")  # named as suanli's speedups


class Handwritten:
    """Trains `module` itself. `steps()` never ends; one `next` of it is one step. The batch size is that of
    suanli's order of examples, which divides an epoch evenly."""

    def __init__(
        self, recipe: Recipe, prepared: PreparedData, module: nn.Module, device: Device, means: Collection[str] = ()
    ) -> None:
        if unknown := set(means) - set(MEANS):
            raise ValueError(f"a person doesn't write {', '.join(unknown)} here; known: {', '.join(MEANS)}")
        split = prepared.splits["train"]
        self.recipe = recipe
        self.classes = len(prepared.task.classes)
        self.smoothing = recipe.task_args.get("label_smoothing", 0.0)
        self.device = torch.device(device.torch_name)
        self.rows = torch.from_numpy(inputs_of(split)).to(self.device)
        self.task, self.columns = prepared.task, split.targets
        self.steps_per_epoch = -(-len(split) // recipe.batch_size)
        self.steps_in_all = round(recipe.epochs * self.steps_per_epoch)
        self.batch_size = len(split) // self.steps_per_epoch
        (self.input,) = prepared.preprocess.inputs
        self.to_model = prepared.preprocess.to_model
        self.augment = compose(recipe.augment, prepared.preprocess.roles, prepared.task.targets)
        self.planes = prepared.kind == "image" and "channels_last" not in means  # as torchvision's ToTensor gives them
        self.autocast = "bf16" in means
        layout = torch.channels_last if "channels_last" in means else torch.contiguous_format
        self.module = module.to(self.device).to(memory_format=layout)
        self.optimizer = optimizer_of(recipe, self.module, fused="fused_optimizer" in means)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.generator = torch.Generator(self.device).manual_seed(recipe.seed)
        self.average = copy.deepcopy(self.module) if recipe.ema_decay is not None else None

    def steps(self) -> Iterator[torch.Tensor]:
        """The loss of each step, without waiting for it."""
        self.module.train()
        step = 0
        while True:
            order = torch.randperm(len(self.rows))
            for index in order[: self.steps_per_epoch * self.batch_size].split(self.batch_size):
                yield self._step(index.to(self.device), step)
                step += 1

    def _step(self, index: torch.Tensor, step: int) -> torch.Tensor:
        inputs, targets = self.inputs(index, step // self.steps_per_epoch)
        scale = lr_factor(self.recipe, step, self.steps_in_all, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self.autocast else nullcontext():
            outputs = self.module(inputs)
        loss = self.loss(outputs, targets)
        loss.backward()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self._average(step)
        return loss.detach()

    def loss(self, outputs: Any, targets: Tensors) -> torch.Tensor:
        """The mean over the batch. That of other tasks than classification is the task's own."""
        if "class" in targets:
            return F.cross_entropy(outputs.float(), targets["class"], label_smoothing=self.smoothing)
        sums, count = self.task.loss(outputs, targets), len(next(iter(targets.values())))
        counts = self.task.counts(targets) if self.task.has_counts else dict.fromkeys(sums, torch.tensor(count))
        return torch.stack([total / counts[name].clamp(min=1) for name, total in sums.items()]).sum()

    def inputs(self, index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, Tensors]:
        """Augmented model inputs and targets of the examples at `index`."""
        arrays: dict[str, np.ndarray] = {}
        for name, column in self.columns.items():
            arrays |= take(column, index.cpu().numpy(), name)
        batch = Batch(
            inputs=self.to_model({self.input: self.rows[index]}),
            targets={name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()},
            index=index,
            epoch=epoch,
            classes=self.classes,
        )
        batch = self.augment(batch, self.generator)
        inputs = batch.inputs[self.input]
        return inputs.contiguous() if self.planes else inputs, batch.targets

    @torch.no_grad()
    def _average(self, step: int) -> None:
        assert self.average is not None
        assert self.recipe.ema_decay is not None
        decay = min(self.recipe.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.module.parameters()), 1 - decay)


def optimizer_of(recipe: Recipe, module: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """The recipe's optimizer as an engineer builds it: with `fused` where its class has that."""
    optimizer = registry.load("optimizers", recipe.optimizer).build(
        list(module.named_parameters()),
        head=build.head_of(module, build.resolve(recipe.model)),
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        backbone_lr_scale=recipe.backbone_lr_scale,
        **recipe.optimizer_args,
    )
    if fused and "fused" in optimizer.defaults:
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer
