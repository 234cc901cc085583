"""Sorts named parameters into the groups that the optimizers here need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeAlias

import torch
from torch import nn

from suanli.core.errors import UsageError, unknown

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


COMMON = ("head", "lr", "weight_decay", "backbone_lr_scale")  # every `build` takes these


def in_head(name: str, head: str) -> bool:
    return name.startswith(f"{head}.")


def trainable_parameters(named: Iterable[Named], *, head: str, backbone_lr_scale: float) -> list[Named]:
    """The parameters to train. A scale of 0 freezes all but the head, so that no gradients are computed for them.
    Raises UsageError where none is left."""
    result = []
    for name, parameter in named:
        if backbone_lr_scale == 0 and not in_head(name, head):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            result.append((name, parameter))
    if not result:
        raise UsageError(
            "The model has no parameters to train.",
            fix="Choose a model with trainable parameters, or a backbone_lr_scale above 0.",
        )
    return result


def split_by_decay(
    named: Iterable[Named], *, head: str, lr: float, weight_decay: float, backbone_lr_scale: float
) -> list[Group]:
    """Up to four groups: backbone and head, each with weight decay and without (biases, norms, embeddings)."""
    groups: dict[tuple[bool, bool], Group] = {}
    for name, parameter in named:
        head_part, with_decay = in_head(name, head), has_decay(name, parameter)
        rate = lr if head_part else lr * backbone_lr_scale
        decay = weight_decay if with_decay else 0.0
        empty: Group = {"params": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        group = groups.setdefault((head_part, with_decay), empty)
        group["params"].append(parameter)
    return list(groups.values())


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices and filters: pulling an offset or a scale towards 0 only biases it."""
    return parameter.ndim > 1 and not is_embedding(name)


def is_embedding(name: str) -> bool:
    """Whether it is a table that is looked up or added, by the names that those have in practice."""
    return any(word in name for word in ("embed", "_token"))


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
