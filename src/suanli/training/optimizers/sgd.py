"""Stochastic gradient descent with Nesterov momentum.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch

from suanli.core.types import Optimizer
from suanli.training.optimizers import _groups


class SGD(_groups.Uncompiled, torch.optim.SGD):
    """torch's, without its wrappers for torch.compile."""

    _step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """The fused kernel wants the momentum of all parameters of a group or of none. Where layers are unfrozen one
        after the other, some begin later: at zero, which gives what torch gives at their first step."""
        for group in self.param_groups:
            if group["fused"] and group["momentum"]:
                for parameter in group["params"]:
                    if parameter.grad is not None and not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        loss: float | None = self._step(closure)
        return loss


@_groups.check_arguments
def build(
    named_parameters: Iterable[_groups.Named],
    *,
    head: _groups.Head,
    lr: float,
    weight_decay: float = 0.0,
    backbone_lr_scale: float = 1.0,
    layer_lr_decay: float = 1.0,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    trained = _groups.trained_parameters(
        named_parameters, head=head, backbone_lr_scale=backbone_lr_scale, layer_lr_decay=layer_lr_decay
    )
    groups = _groups.split_by_decay(trained, lr=lr, weight_decay=weight_decay)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


OPTIMIZER = Optimizer(usual_lr=0.1, name="sgd", build=build, source="Sutskever et al., ICML 2013")
