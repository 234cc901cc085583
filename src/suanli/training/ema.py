"""An exponential moving average of a network's weights: where a recipe has one, it is what is validated and kept.

Source: B. Polyak, A. Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, in the form with
exponential weights that deep learning uses.
"""

from __future__ import annotations

import torch
from torch import nn

from suanli.parallel import dtensor


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the network's state, by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class WeightAverage:
    """`tensors` are the averages by name. Integers, such as the counters of batch norms, are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.tensors = copy_weights(model)
        self._model, self._decay = model, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after step `step` (from 0)."""
        # Early averages forget faster, or the random start would linger.
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, values = [], []
        # Asked for at each step: a plan that changes the memory layout gives the network other tensors.
        for name, value in self._model.state_dict().items():
            if value.is_floating_point():
                averages.append(dtensor.local_part(self.tensors[name]))
                values.append(dtensor.local_part(value))
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)
