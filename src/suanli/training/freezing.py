"""Trains a part of a network's layers.

Gradual unfreezing: at first only the head learns; then one layer after the other joins it, from the head down. So the
head fits the features that the weights brought before any gradient changes them. Layers that are frozen get no
gradients, and the backward pass ends above them.

Batch norms of frozen layers normalise by their running statistics, which stay. In training mode they would normalise by
each batch: the layers would give other features than those that the head was fitted to and that validation sees, and
the statistics of the first data would be lost although nothing else has changed. With `fixed_norms` this holds for all
layers: the statistics of a few small batches are worse than those of the large data that the weights learned from.

Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", arXiv:1801.06146.
"""

from __future__ import annotations

import torch
from torch import nn

from suanli.core.types import Recipe
from suanli.models.layers import Head, head_distances, module_distances
from suanli.parallel.sync_batchnorm import Norm


class Freezing:
    """The layers of a network that an optimizer trains."""

    def __init__(self, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, head: Head) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = list(model.named_parameters())
        distances = head_distances(named, head)
        self.layers = max(distances.values(), default=0)  # below the head
        self.trained = self.layers  # of them, now
        # Where the backbone isn't trained at any step, nor are its batch norms.
        self._norms_stay = recipe.fixed_norms or recipe.backbone_lr_scale == 0 or recipe.lora_rank > 0
        self._model, self._parameters = model, [(p, distances[name]) for name, p in named if id(p) in held]
        self._norms = [(m, distance) for m, distance in module_distances(model, head) if isinstance(m, Norm)]
        self._may_freeze = self._norms_stay or recipe.unfreeze_epochs > 0

    def train(self, layers: int) -> bool:
        """Only so many layers next to the head learn from now on. Gives whether that has changed which parameters do.
        To be called before each step, since validation puts the whole network into training mode."""
        if not self._may_freeze:
            return False
        changed, self.trained = layers != self.trained, layers
        if changed:
            self._model.train()
            for parameter, distance in self._parameters:
                parameter.requires_grad_(distance <= layers)
        for norm, distance in self._norms:
            if distance > (0 if self._norms_stay else layers):
                norm.training = False
        return changed
