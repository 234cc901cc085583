"""Adam with weight decay that doesn't depend on the scale of the gradients.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch

from suanli.core.types import Optimizer
from suanli.training.optimizers import _groups


class AdamW(_groups.Uncompiled, torch.optim.AdamW):
    """torch's, without its wrappers for torch.compile."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


@_groups.check_arguments
def build(
    named_parameters: Iterable[_groups.Named],
    *,
    head: _groups.Head,
    lr: float,
    weight_decay: float = 0.0,
    backbone_lr_scale: float = 1.0,
    layer_lr_decay: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    trained = _groups.trained_parameters(
        named_parameters, head=head, backbone_lr_scale=backbone_lr_scale, layer_lr_decay=layer_lr_decay
    )
    groups = _groups.split_by_decay(trained, lr=lr, weight_decay=weight_decay)
    return AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)


OPTIMIZER = Optimizer(usual_lr=1e-3, name="adamw", build=build, source="arXiv:1711.05101")
