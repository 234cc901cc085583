"""Batch norms that compute their statistics over the batch of all processes.

With them a network learns the same with any number of processes. torch's SyncBatchNorm runs on GPUs only; this one
runs wherever torch does, with the operations of torch's own batch norm. The processes communicate twice per layer: the
statistics in the forward pass, and two sums of gradients in the backward pass.

Source of the formulas: S. Ioffe and C. Szegedy, "Batch Normalization", ICML 2015; statistics of parts are combined as
in T. Chan, G. Golub and R. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from suanli.parallel.group import Group

Norm = nn.modules.batchnorm._BatchNorm


def batch_norms(model: nn.Module) -> list[Norm]:
    """The layers whose output depends on the other examples of a batch in training."""
    return [m for m in model.modules() if isinstance(m, Norm)]


def synchronize_batch_norms(model: nn.Module, group: Group) -> None:
    """From now on the batch norms of `model` communicate inside `group.joint_step()` while the model is in training
    mode."""
    for norm in batch_norms(model):
        norm.forward = partial(_forward, norm, norm.forward, group)  # type: ignore[method-assign]


def _forward(norm: Norm, local_forward: Any, group: Group, x: torch.Tensor) -> torch.Tensor:
    if not (group.in_joint_step and norm.training):
        return local_forward(x)  # type: ignore[no-any-return]
    weight = norm.weight if norm.affine else torch.ones(x.shape[1], device=x.device)
    bias = norm.bias if norm.affine else torch.zeros(x.shape[1], device=x.device)
    y, mean, variance, count = _Normalize.apply(x, weight, bias, norm.eps, group)  # type: ignore[no-untyped-call]
    if norm.track_running_stats and norm.running_mean is not None:
        _update_running_statistics(norm, mean, variance, count)
    return y  # type: ignore[no-any-return]


@torch.no_grad()
def _update_running_statistics(norm: Norm, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
    """As torch's batch norm does it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum or 0.0)
    norm.running_var.lerp_((variance * (count / (count - 1).clamp(min=1))).to(norm.running_var.dtype), momentum or 0.0)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, group: Group
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        channels = x.shape[1]
        mean, variance = _statistics(x)
        own = torch.cat([mean, variance, mean.new_tensor([x.numel() / channels])])
        parts = [torch.empty_like(own) for _ in range(group.size)]
        dist.all_gather(parts, own)
        statistics = torch.stack(parts)
        counts = statistics[:, -1:]
        count = counts.sum()
        share = counts / count
        means, variances = statistics[:, :channels], statistics[:, channels:-1]
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        y = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> Any:
        x, weight, mean, variance, count = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_layout(x))
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # This treats the statistics as constants. The gradient through them is the same at all positions of a channel,
        # except for a term that is linear in x.
        sums = torch.stack([d_bias, d_weight]).to(mean.dtype)
        dist.all_reduce(sums)
        slope = sums[1] / count * weight / (variance + ctx.eps)
        start = sums[0] / count * weight * torch.rsqrt(variance + ctx.eps) - slope * mean
        shape = (1, -1, *([1] * (x.dim() - 2)))
        dx = dx - torch.addcmul(start.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype))
        return dx, d_weight, d_bias, None, None


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, in float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type == "cpu":
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return mean, variance


def _layout(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
