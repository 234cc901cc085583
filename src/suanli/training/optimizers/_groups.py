"""Sorts named parameters into the groups that the optimizers here need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeAlias

import torch
from torch import nn

from suanli.core.errors import UsageError, unknown
from suanli.models.layers import Head as Head
from suanli.models.layers import head_distances, in_head, is_embedding

Group: TypeAlias = dict[str, Any]
Named: TypeAlias = tuple[str, nn.Parameter]
P = ParamSpec("P")


class Uncompiled(torch.optim.Optimizer):
    """A base for optimizers. torch wraps these methods to keep torch.compile away from them, and the first call imports
    torch._dynamo, which takes as long as importing torch, and 150 MB. suanli doesn't compile optimizers."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


COMMON = ("head", "lr", "weight_decay", "backbone_lr_scale", "layer_lr_decay")  # every `build` takes these


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A parameter to train."""

    name: str
    parameter: nn.Parameter
    in_head: bool
    scale: float  # of its learning rate: 1 in the head

    @property
    def has_decay(self) -> bool:
        """Weight decay is for matrices and filters: pulling an offset or a scale towards 0 only biases it."""
        return self.parameter.ndim > 1 and not is_embedding(self.name)


def trained_parameters(
    named: Iterable[Named], *, head: Head, backbone_lr_scale: float, layer_lr_decay: float
) -> list[Trained]:
    """The parameters to train. Outside of the head, rates are `backbone_lr_scale` times as high, and for each layer
    nearer to the input `layer_lr_decay` times (Clark et al., "ELECTRA", arXiv:2003.10555). A scale of 0 freezes all but
    the head, so that no gradients are computed for them. Raises UsageError where none is left."""
    named = list(named)
    distances = head_distances(named, head)
    result = []
    for name, parameter in named:
        inside = in_head(name, head)
        scale = 1.0 if inside else backbone_lr_scale * layer_lr_decay ** distances[name]
        if backbone_lr_scale == 0 and not inside:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            result.append(Trained(name=name, parameter=parameter, in_head=inside, scale=scale))
    if not result:
        raise UsageError(
            "The model has no parameters to train.",
            fix="Choose a model with trainable parameters, or a backbone_lr_scale above 0.",
        )
    return result


def split_by_decay(trained: Iterable[Trained], *, lr: float, weight_decay: float) -> list[Group]:
    """Groups of equal rate, each with weight decay or without (biases, norms, embeddings): up to four, where all layers
    of the backbone learn at one rate."""
    groups: dict[tuple[bool, float, bool], Group] = {}
    for one in trained:
        rate, decay = lr * one.scale, weight_decay if one.has_decay else 0.0
        empty: Group = {"params": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        groups.setdefault((one.in_head, one.scale, one.has_decay), empty)["params"].append(one.parameter)
    return list(groups.values())


def check_arguments(build: Callable[P, torch.optim.Optimizer]) -> Callable[P, torch.optim.Optimizer]:
    """Turns an unknown or impossible argument of `build` into a UsageError that names the nearest allowed one."""
    name = build.__module__.rpartition(".")[2]
    known = list(inspect.signature(build).parameters)

    @functools.wraps(build)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> torch.optim.Optimizer:
        for argument in kwargs:
            if argument not in known:
                raise unknown(f"{name} argument", argument, [k for k in known[1:] if k not in COMMON])
        try:
            return build(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise UsageError(f"Optimizer {name} can't be built: {error}.", fix="Change that value.") from error

    return wrapper
