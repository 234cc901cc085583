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
        self._decay = decay
        current = model.state_dict()  # the tensors themselves: training changes their values in place
        floats = [name for name, tensor in current.items() if tensor.is_floating_point()]
        self._averages = [dtensor.local_part(self.tensors[name]) for name in floats]
        self._current = [dtensor.local_part(current[name]) for name in floats]
        self._integers = [(self.tensors[n], t) for n, t in current.items() if not t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after step `step` (from 0)."""
        # Early averages forget faster, or the random start would linger.
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._current, 1 - decay)
        for average, current in self._integers:
            average.copy_(current)
