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

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from suanli.core.types import Optimizer
from suanli.parallel import dtensor
from suanli.training.optimizers import _groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that is steepest at 0: small singular values grow fastest


def orthogonalize(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Roughly the semi-orthogonal factor of each matrix in (M, rows, columns), by Newton-Schulz iteration: singular
    values end between about 0.7 and 1.2, and 0 stays 0."""
    x = matrices.to(dtype)
    if wide := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if wide else x).to(matrices.dtype)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has fast matrix products in it: the iteration corrects its own rounding."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.Optimizer):
    """Groups with `muon` True get Muon, the others SGD. The state is one momentum buffer for each parameter."""

    def __init__(self, groups: list[_groups.Group], defaults: dict[str, Any]) -> None:
        if not 0 <= defaults["momentum"] < 1 or not 0 <= defaults["other_momentum"] < 1:
            raise ValueError("momentum must be at least 0 and less than 1")
        if any(group["lr"] < 0 for group in groups):
            raise ValueError("a learning rate is negative")
        if defaults["steps"] < 1:
            raise ValueError("steps must be at least 1")
        super().__init__(groups, defaults)

    # torch wraps these to keep torch.compile away from them, and the first call imports torch._dynamo, which takes as
    # long as importing torch, and 150 MB. suanli doesn't compile optimizers.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

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


def _orthogonalize_by_shape(updates: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    dtype = torch.float64 if updates[0].dtype == torch.float64 else fast_dtype(updates[0].device)
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, update in enumerate(updates):
        by_shape[len(update), update[0].numel()].append(i)
    result = list(updates)
    for (rows, columns), indices in by_shape.items():
        flat = torch.stack([updates[i].reshape(rows, columns) for i in indices])
        # A tall matrix has only `columns` directions for its step: this keeps the step of a row equal.
        step = orthogonalize(flat, steps, dtype) * max(1.0, rows / columns) ** 0.5
        for i, one in zip(indices, step, strict=True):
            result[i] = one.view(updates[i].shape)
    return result


@_groups.check_arguments
def build(
    named_parameters: Iterable[_groups.Named],
    *,
    head: str,
    lr: float,
    weight_decay: float = 0.0,
    backbone_lr_scale: float = 1.0,
    momentum: float = 0.6,
    steps: int = 3,
    normalize_filters: bool = False,
    head_lr_scale: float = 1.0,
    bias_lr_scale: float = 1.0,
    other_momentum: float = 0.85,
) -> torch.optim.Optimizer:
    """`lr` is the rate of Muon. SGD has `head_lr_scale` times that on the head, and `bias_lr_scale` times that on
    biases, norms and embeddings, so one `lr` raises or lowers all rates."""
    named = _groups.trainable_parameters(named_parameters, head=head, backbone_lr_scale=backbone_lr_scale)
    groups: list[_groups.Group] = []
    for inside, scale in ((True, 1.0), (False, backbone_lr_scale)):
        part = [(n, p) for n, p in named if _groups.in_head(n, head) == inside]
        matrices = [p for n, p in part if _groups.has_decay(n, p)]
        others = [p for n, p in part if not _groups.has_decay(n, p)]
        groups += [
            _group(matrices, lr * (head_lr_scale if inside else 1.0) * scale, weight_decay, muon=not inside),
            _group(others, lr * bias_lr_scale * scale, 0.0, muon=False),
        ]
    defaults = {
        "momentum": momentum,
        "other_momentum": other_momentum,
        "steps": steps,
        "normalize_filters": normalize_filters,
    }
    return Muon([g for g in groups if g["params"]], defaults)


def _group(parameters: list[nn.Parameter], lr: float, weight_decay: float, *, muon: bool) -> _groups.Group:
    return {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "muon": muon}


OPTIMIZER = Optimizer(usual_lr=0.02, name="muon", build=build, source="https://kellerjordan.github.io/posts/muon/")
