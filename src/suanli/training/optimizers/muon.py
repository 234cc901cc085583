"""Muon for filters and hidden matrices, SGD with Nesterov momentum for the rest, in one optimizer.

Muon steps along the semi-orthogonal matrix nearest to the momentum, so that all directions of a layer move equally far;
a convolution filter bank (out, in, h, w) counts as the matrix (out, in*h*w). Biases, norms, embeddings and the head
have no such structure and get SGD with learning rates of their own. Matrices of equal shape are orthogonalised in one
batch: in small networks the number of calls is what costs.

`normalize_filters` keeps each filter bank at Frobenius norm sqrt(out), which makes `lr` a relative step. A norm layer
after the convolution cancels the change; use it only for networks that have one.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from suanli.core.types import Optimizer
from suanli.machine.device import has_matrix_units
from suanli.parallel import dtensor
from suanli.training.optimizers import _groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that is steepest at 0: small singular values grow fastest

SMALL_MATRIX = 1 << 18  # values, below which a CPU takes longer to convert it to bfloat16 than that saves


def orthogonalize(matrices: torch.Tensor, steps: int, dtype: torch.dtype, block: int = 1) -> torch.Tensor:
    """Roughly the semi-orthogonal factor of each matrix in (M, rows, columns), by Newton-Schulz iteration: singular
    values end between about 0.7 and 1.2, and 0 stays 0.

    A step multiplies by a polynomial of the Gram matrix, so a `block` of several steps can be computed on that alone,
    in float32 at least, before the matrix itself is multiplied, in `dtype`. Blocks above 3 amplify the rounding of
    bfloat16 too much."""
    x = (matrices.mT if (tall := matrices.shape[1] > matrices.shape[2]) else matrices).to(dtype)
    a, b, c = COEFFICIENTS
    for first in range(0, steps, block):
        gram = (x @ x.mT).to(dtype if block == 1 else torch.promote_types(matrices.dtype, torch.float32))
        norm = gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + 1e-7 if first == 0 else None
        if norm is not None:
            gram = gram / norm**2
        factor: torch.Tensor | None = None
        for step in range(first, end := min(first + block, steps)):
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            factor = polynomial if factor is None else polynomial @ factor
            if step + 1 < end:
                gram = polynomial @ gram @ polynomial
        assert factor is not None
        x = (factor if norm is None else factor / norm).to(dtype) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has matrix units for it: the iteration corrects its own rounding."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = device.type == "cpu" and has_matrix_units()
    return torch.bfloat16 if fast else torch.float32


class Muon(_groups.Uncompiled):
    """Groups with `muon` True get Muon, the others SGD. The state is one momentum buffer for each parameter."""

    def __init__(self, groups: list[_groups.Group], defaults: dict[str, Any]) -> None:
        if not 0 <= defaults["momentum"] < 1 or not 0 <= defaults["other_momentum"] < 1:
            raise ValueError("momentum must be at least 0 and less than 1")
        if any(group["lr"] < 0 for group in groups):
            raise ValueError("a learning rate is negative")
        if defaults["steps"] < 1:
            raise ValueError("steps must be at least 1")
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            tensors: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if not tensors:
                continue
            momentum = group["momentum"] if group["muon"] else group["other_momentum"]
            updates = self._nesterov(tensors, momentum)
            parameters = [dtensor.local_part(p) for p in tensors]
            if group["muon"]:
                self._normalize_and_decay(tensors, group)
                updates = _orthogonalize_updates(updates, tensors, group["steps"])
            elif group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if isinstance(group["lr"], torch.Tensor):  # a captured graph reads it anew at each replay
                torch._foreach_mul_(updates, -group["lr"])
                torch._foreach_add_(parameters, updates)
            else:
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss

    def _nesterov(self, parameters: list[torch.Tensor], momentum: float) -> list[torch.Tensor]:
        """Adds the gradients to the momentum and returns the Nesterov updates, as new tensors."""
        gradients = [dtensor.local_part(p.grad) for p in parameters if p.grad is not None]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            buffers.append(dtensor.local_part(state["momentum"]))
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))

    @staticmethod
    def _normalize_and_decay(parameters: list[torch.Tensor], group: _groups.Group) -> None:
        if group["normalize_filters"]:
            for parameter in parameters:
                if parameter.ndim > 2:
                    norm = dtensor.gather(parameter.norm())
                    dtensor.local_part(parameter).mul_(len(parameter) ** 0.5 / (norm + 1e-7))
        if group["weight_decay"]:
            local = [dtensor.local_part(p) for p in parameters]
            torch._foreach_mul_(local, 1 - group["lr"] * group["weight_decay"])


def _orthogonalize_updates(updates: list[torch.Tensor], like: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """Each process gathers the sharded matrices, one after the other, and keeps its own rows of the result."""
    if not any(dtensor.is_sharded(p) for p in like):
        return _orthogonalize_by_shape(updates, steps)
    result = []
    for update, parameter in zip(updates, like, strict=True):
        (step,) = _orthogonalize_by_shape([dtensor.gather(dtensor.from_local_part(update, parameter))], steps)
        result.append(step[dtensor.local_rows(parameter) or slice(None)])
    return result


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _orthogonalize_by_shape(updates: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    device, dtype = updates[0].device, updates[0].dtype
    on_cpu = device.type == "cpu"
    fast = dtype if dtype == torch.float64 else fast_dtype(device)
    # The order of columns doesn't matter, so filters are taken as they lie in memory: nothing is transposed.
    in_order = [u.permute(0, 2, 3, 1) if _is_channels_last(u) else u for u in updates]
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, update in enumerate(in_order):
        by_shape[len(update), update[0].numel()].append(i)
    result = list(updates)
    for (rows, columns), indices in by_shape.items():
        flat = torch.stack([in_order[i].reshape(rows, columns) for i in indices])
        small = on_cpu and rows * columns < SMALL_MATRIX
        step = orthogonalize(flat, steps, dtype if small else fast, block=3 if on_cpu else 1)  # calls cost on a GPU
        if rows > columns:  # it has only `columns` directions for its step: this keeps the step of a row equal
            step *= (rows / columns) ** 0.5
        for i, one in zip(indices, step, strict=True):
            one = one.view(in_order[i].shape)
            result[i] = one.permute(0, 3, 1, 2) if _is_channels_last(updates[i]) else one
    return result


@_groups.check_arguments
def build(
    named_parameters: Iterable[_groups.Named],
    *,
    head: _groups.Head,
    lr: float,
    weight_decay: float = 0.0,
    backbone_lr_scale: float = 1.0,
    layer_lr_decay: float = 1.0,
    momentum: float = 0.6,
    steps: int = 3,
    normalize_filters: bool = False,
    head_lr_scale: float = 1.0,
    bias_lr_scale: float = 1.0,
    other_momentum: float = 0.85,
) -> torch.optim.Optimizer:
    """`lr` is the rate of Muon. SGD has `head_lr_scale` times that on the head, and `bias_lr_scale` times that on
    biases, norms and embeddings, so one `lr` raises or lowers all rates."""
    trained = _groups.trained_parameters(
        named_parameters, head=head, backbone_lr_scale=backbone_lr_scale, layer_lr_decay=layer_lr_decay
    )
    groups: dict[tuple[bool, float, bool], _groups.Group] = {}
    for one in sorted(trained, key=lambda t: (not t.in_head, not t.has_decay)):
        rate = lr * ((head_lr_scale if one.in_head else 1.0) if one.has_decay else bias_lr_scale) * one.scale
        empty: _groups.Group = {"params": [], "lr": rate, "initial_lr": rate}
        empty |= {"weight_decay": weight_decay if one.has_decay else 0.0, "muon": one.has_decay and not one.in_head}
        groups.setdefault((one.in_head, one.scale, one.has_decay), empty)["params"].append(one.parameter)
    defaults = {
        "momentum": momentum,
        "other_momentum": other_momentum,
        "steps": steps,
        "normalize_filters": normalize_filters,
    }
    return Muon(list(groups.values()), defaults)


OPTIMIZER = Optimizer(usual_lr=0.02, name="muon", build=build, source="https://kellerjordan.github.io/posts/muon/")
