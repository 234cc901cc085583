"""One optimizer step on a batch, computed the way a `Step` says.

This is the part of training that speedups act on, and it knows nothing else: no data set, no schedule, no
files. The training loop, the planner's trials and people's own loops all learn through it, so what is
measured is what runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from suanli.compute.cuda_graph import CapturedStep
from suanli.compute.step_clock import StepClock
from suanli.core.types import Step
from suanli.parallel.group import ALONE, Group

OVERFLOWS = 17  # halvings that take a scaled loss from its first scale, 2^16, to 1
Loss = Callable[[Any, Any], torch.Tensor]  # outputs of the network and targets to a mean over the batch


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a step computed, on the CPU in float32: by these two ways of computing are compared. Not by the updates
    of the weights: Adam makes a full step of any gradient, also of one that is only rounding."""

    outputs: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]


class StepRunner:
    """Calling it with inputs and targets trains one step and gives the loss (a tensor of no dimensions,
    not waited for). Inputs are a tensor, a sequence of positional arguments or a mapping of named ones."""

    def __init__(
        self, step: Step, loss: Loss, *, clip_norm: float | None = None, group: Group = ALONE, batch_size: int = 0
    ) -> None:
        """In a `group` a step is one on the batches of all processes, `batch_size` examples together, and `loss` a
        mean over those here."""
        self.step, self._loss_of, self._clip_norm = step, loss, clip_norm
        if step.optimizer is None:
            raise ValueError("a step without an optimizer can't learn")
        self._optimizer = step.optimizer
        parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
        self.device = parameters[0].device
        self._parameters = [p for p in step.model.parameters() if p.requires_grad]
        self.clock = StepClock.of(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=step.loss_scaling)
        self._group, self._batch_size = group, batch_size
        self.ends: list[int] | None = None  # of the parts of a batch here, where they aren't of equal size
        self._spread = None if group.is_alone or step.sharded else wrap_in_ddp(step, self.device)
        self._recorded = CapturedStep(step.model, step.optimizer, self._learn) if step.graph else None
        self._kept: list[torch.Tensor] | None = None  # outputs, while `compute_numbers` wants them

    def __call__(self, inputs: Any, targets: Any) -> torch.Tensor:
        if self._recorded is None:
            return self._learn(inputs, targets)
        loss = self._recorded(inputs, targets)
        self.clock.mark("graph")
        return loss

    def forward(self, inputs: Any) -> Any:
        """Outputs of the network in training, in the precision and layout of the step."""
        if self._spread is not None and self._group.in_joint_step:
            return call(self.step, self._spread, inputs)
        return call(self.step, self.step.model if self.step.compute is None else self.step.compute, inputs)

    def backward(self, inputs: Any, targets: Any, *, whole: bool = False) -> torch.Tensor:
        """Forward and backward pass without a step: gradients are added. Gives the mean loss. `whole`: not in
        parts."""
        total = torch.zeros((), device=self.device)
        parts = list(_parts(inputs, targets, 1 if whole else self.step.micro_batches, self.ends))
        for number, (part, aims, share) in enumerate(parts, start=1):
            with self._averaging(number == len(parts)):
                outputs = self.forward(part)
                loss = self._loss_of(outputs, aims) * (share * self._weight(inputs))
                self.clock.mark("forward")
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.clock.mark("backward")
            total += loss.detach()
            if self._kept is not None:
                self._kept += list_tensors(outputs)
        return total

    def _weight(self, inputs: Any) -> float:
        """Of the loss here in the mean over all processes: by examples, so that shares of unequal size are right."""
        if not self._group.in_joint_step:
            return 1.0
        return self._group.size * len(next(iter(list_tensors(inputs)))) / self._batch_size

    def _averaging(self, last: bool) -> AbstractContextManager[None]:
        """The gradients are averaged over the processes in the backward pass of the last part."""
        return nullcontext() if self._spread is None or last else self._spread.no_sync()

    def _learn(self, inputs: Any, targets: Any) -> torch.Tensor:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._kept is not None:
            self._kept.clear()  # of the steps before a recording
        with self._group.joint_step():
            total = self.backward(inputs, targets)
        if self._clip_norm is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.clock.mark("optimizer")
        return total

    def compute_numbers(self, inputs: Any, targets: Any) -> Numbers:
        """Trains one step and tells what it computed. Dropout is off, since compiled code draws other
        random numbers. A scaled loss begins with a scale that is too large by design, and steps whose gradients
        overflow are left out: then it is the first step that counts."""
        self._kept = []
        try:
            with _without_dropout(self.step.model):
                for _ in range(OVERFLOWS):
                    self._kept.clear()
                    before = self.scaler.get_scale()
                    self(inputs, targets)
                    if self.scaler.get_scale() >= before:  # else it overflowed
                        break
            outputs = _plain(self._kept)
        finally:
            self._kept = None
        # The optimizer's step has taken the scale of the loss out of the gradients.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return Numbers(outputs=outputs, gradients=_plain(gradients))


class _ComputeModule(nn.Module):
    """The network as its step computes it, as a module: what DistributedDataParallel wants."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.model = step.model
        self._compute = (step.compute or step.model.__call__,)  # hidden: its parameters are those of `model`

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compute[0](*args, **kwargs)


def wrap_in_ddp(step: Step, device: torch.device) -> DistributedDataParallel:
    """A collective: the network with gradients that are averaged over all processes, in buckets, while the backward
    pass goes on. Every process gets the first one's weights."""
    # Not the buffers at each step: batch norms see the whole batch, so they agree. torch 2.13 has renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    made = DistributedDataParallel(
        _ComputeModule(step),
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **buffers,  # type: ignore[arg-type]
    )
    if step.reduce_dtype is not None:
        # Not the function itself: torch compares its annotations with types, and here they are words.
        made.register_comm_hook(step.reduce_dtype, lambda dtype, bucket: _average(dtype, bucket))
    return made


def _average(dtype: torch.dtype, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Of a bucket over all processes, sent as `dtype`. torch's own hook of this kind refuses gloo, and rounds twice."""
    mine = bucket.buffer()
    sent = torch.div(mine, dist.get_world_size(), out=torch.empty_like(mine, dtype=dtype))
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    averaged: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: mine.copy_(done.value()[0]))
    return averaged


def call(step: Step, function: Callable[..., Any], inputs: Any) -> Any:
    """`function` on inputs in the precision and layout of the step."""
    if step.memory_format is not None:
        layout = step.memory_format
        inputs = map_tensors(inputs, lambda t: t.to(memory_format=layout) if t.dim() == 4 else t)
    if step.autocast_dtype is None:
        return _unpacked(function, inputs)
    device = next((t.device.type for t in list_tensors(inputs)), "cpu")
    with torch.autocast(device, dtype=step.autocast_dtype):
        return _unpacked(function, inputs)


def _unpacked(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, Sequence) else function(inputs)


@contextmanager
def apply_settings(step: Step) -> Iterator[None]:
    """The step's switches of the whole process are on while the block runs."""
    with ExitStack() as stack:
        for setting in step.settings:
            stack.enter_context(setting())
        yield


@contextmanager
def force_eager(step: Step) -> Iterator[None]:
    """Compiled code gives way to the network itself while the block runs: in evaluation it would be compiled
    once more, for every size of batch."""
    if step.compute is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    before = [m.p for m in dropouts]
    for module in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(dropouts, before, strict=True):
            module.p = p


def _parts(inputs: Any, targets: Any, parts: int, ends: list[int] | None = None) -> Iterator[tuple[Any, Any, float]]:
    """The batch in `parts`, each with its share of the examples."""
    examples = len(next(iter(list_tensors(inputs))))
    if parts == 1:
        yield inputs, targets, 1.0
        return
    count = min(parts, examples)
    if ends is None or ends[-1] != examples:
        ends = [examples * i // count for i in range(count + 1)]
    for first, last in pairwise(ends):
        take = itemgetter(slice(first, last))
        yield map_tensors(inputs, take), map_tensors(targets, take), (last - first) / examples


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`change` of every tensor inside, the containers as they are."""
    if isinstance(value, torch.Tensor):  # nearly always, and walking a tree costs more than some kernels
        return change(value)
    return torch.utils._pytree.tree_map_only(torch.Tensor, change, value)


def list_tensors(value: Any) -> list[torch.Tensor]:
    """All tensors inside, however they are nested."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _plain(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().float().cpu().contiguous() for t in tensors)
