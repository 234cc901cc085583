"""Stochastic gradient descent with Nesterov momentum.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch

from suanli.core.types import Optimizer
from suanli.training.optimizers import _groups


class SGD(_groups.Uncompiled, torch.optim.SGD):
    """torch's, without its wrappers for torch.compile."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


@_groups.check_arguments
def build(
    named_parameters: Iterable[_groups.Named],
    *,
    head: str,
    lr: float,
    weight_decay: float = 0.0,
    backbone_lr_scale: float = 1.0,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    named = _groups.trainable_parameters(named_parameters, head=head, backbone_lr_scale=backbone_lr_scale)
    groups = _groups.split_by_decay(
        named, head=head, lr=lr, weight_decay=weight_decay, backbone_lr_scale=backbone_lr_scale
    )
    return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


OPTIMIZER = Optimizer(usual_lr=0.1, name="sgd", build=build, source="Sutskever et al., ICML 2013")
