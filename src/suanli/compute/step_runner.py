"""One optimizer step on a batch, computed the way a `Step` says.

This is the part of training that speedups change. It knows no data set, no schedule and no files. The training
loop, the planner's trials and users' own loops all run their steps here, so what is measured is what runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, Self

import torch
from torch import distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from suanli.compute.cuda_graph import CapturedStep
from suanli.compute.step_clock import StepClock
from suanli.core.types import Setting, Step
from suanli.parallel.group import ALONE, Group

MAX_OVERFLOWS = 17  # halvings that take the loss scale from its start, 2^16, to 1
Loss = Callable[[Any, Any], torch.Tensor]  # outputs of the network and targets to a mean over the batch


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a step computed, on the CPU in float32: used to compare two ways of computing it. The updates of the
    weights would not do: Adam makes a full step of any gradient, even of one that is only a rounding error."""

    outputs: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]


class StepRunner:
    """Calling it with inputs and targets trains one step and returns the loss: a tensor without dimensions, which may
    still be being computed. Inputs are a tensor, a sequence of positional arguments or a mapping of named ones."""

    def __init__(
        self,
        step: Step,
        loss: Loss,
        *,
        clip_norm: float | None = None,
        group: Group = ALONE,
        batch_size: int = 0,
        loss_adds_up: bool = False,
    ) -> None:
        """In a `group` of processes, a step is on the batches of all of them, `batch_size` examples in total, and
        `loss` is the mean over the examples of this process. With `loss_adds_up`, the losses of micro-batches and
        processes are parts of the batch's, instead of means. Raises ValueError for a step without an optimizer."""
        self.step, self._loss_of, self._clip_norm = step, loss, clip_norm
        if step.optimizer is None:
            raise ValueError("a step without an optimizer can't learn")
        self._optimizer = step.optimizer
        parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
        self.device = parameters[0].device
        self._parameters = [p for p in step.model.parameters() if p.requires_grad]
        self.clock = StepClock.of(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=step.loss_scaling)
        self._group, self._batch_size, self._loss_adds_up = group, batch_size, loss_adds_up
        self.ends: list[int] | None = None  # of this process's micro-batches, where they aren't of equal size
        self._ddp = None if group.is_alone or step.sharded else wrap_in_ddp(step, self.device)
        self._captured = self._capture()
        self._outputs: list[torch.Tensor] | None = None  # collected for `compute_numbers` only

    def __call__(self, inputs: Any, targets: Any) -> torch.Tensor:
        if self._captured is None:
            return self._train(inputs, targets)
        loss = self._captured(inputs, targets)
        self.clock.mark("graph")
        return loss

    def _capture(self) -> CapturedStep | None:
        return CapturedStep(self.step.model, self._optimizer, self._train) if self.step.graph else None

    def follow_gradients(self) -> None:
        """To be called where other parameters than before get gradients. In a group of processes a collective, with the
        cost of starting anew."""
        self._captured = self._capture()
        if self._ddp is not None:
            self._ddp = None  # ends its hooks on the parameters
            self._ddp = wrap_in_ddp(self.step, self.device)

    def forward(self, inputs: Any) -> Any:
        """The network's outputs in training, in the precision and layout of the step."""
        if self._ddp is not None and self._group.in_joint_step:
            return call(self.step, self._ddp, inputs)
        return call(self.step, self.step.model if self.step.compute is None else self.step.compute, inputs)

    def backward(self, inputs: Any, targets: Any, *, whole: bool = False) -> torch.Tensor:
        """Forward and backward pass without an optimizer step: gradients are added. Returns the mean loss. `whole`:
        the batch is not divided into micro-batches."""
        total = torch.zeros((), device=self.device)
        parts = list(_micro_batches(inputs, targets, 1 if whole else self.step.micro_batches, self.ends))
        for number, (part_inputs, part_targets, share) in enumerate(parts, start=1):
            with self._sync_gradients(number == len(parts)):
                outputs = self.forward(part_inputs)
                loss = self._loss_of(outputs, part_targets) * self._weight(inputs, share)
                self.clock.mark("forward")
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.clock.mark("backward")
            total += loss.detach()
            if self._outputs is not None:
                self._outputs += list_tensors(outputs)
        return total

    def _weight(self, inputs: Any, share: float) -> float:
        """The weight of the loss of a `share` of this process's examples in the mean over all processes: by examples,
        since processes may have different numbers of them."""
        if self._loss_adds_up:
            return float(self._group.size) if self._group.in_joint_step else 1.0
        if not self._group.in_joint_step:
            return share
        return share * (self._group.size * len(next(iter(list_tensors(inputs)))) / self._batch_size)

    def _sync_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over the processes only in the backward pass of the last micro-batch."""
        return nullcontext() if self._ddp is None or last else self._ddp.no_sync()

    def _train(self, inputs: Any, targets: Any) -> torch.Tensor:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._outputs is not None:
            self._outputs.clear()  # of the warm-up steps before a capture
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
        """Train one step and return what it computed. Dropout is off, since compiled code draws other random numbers.
        With loss scaling, the first scale is too large by design and the optimizer skips steps whose gradients
        overflow: then the first step without an overflow counts."""
        self._outputs = []
        try:
            with _disable_dropout(self.step.model):
                for _ in range(MAX_OVERFLOWS):
                    self._outputs.clear()
                    before = self.scaler.get_scale()
                    self(inputs, targets)
                    if self.scaler.get_scale() >= before:  # else it overflowed
                        break
            outputs = _to_cpu_float32(self._outputs)
        finally:
            self._outputs = None
        # The optimizer's step has taken the scale of the loss out of the gradients.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return Numbers(outputs=outputs, gradients=_to_cpu_float32(gradients))


class _ComputeModule(nn.Module):
    """The network as its step computes it, as the module that DistributedDataParallel needs."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.model = step.model
        self._compute = (step.compute or step.model.__call__,)  # hidden: its parameters are those of `model`

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compute[0](*args, **kwargs)


def wrap_in_ddp(step: Step, device: torch.device) -> DistributedDataParallel:
    """A collective: the network with gradients averaged over all processes, in buckets, while the backward pass is
    still running. Every process gets the weights of the first one."""
    # Buffers aren't broadcast: batch norms see the whole batch, so they agree. torch 2.13 renamed the argument.
    parameters = inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}
    ddp = DistributedDataParallel(
        _ComputeModule(step),
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **buffers,  # type: ignore[arg-type]
    )
    if step.reduce_dtype is not None:
        # A lambda, since torch compares a hook's annotations with types, and in this file they are strings.
        ddp.register_comm_hook(step.reduce_dtype, lambda dtype, bucket: _average(dtype, bucket))
    return ddp


def _average(dtype: torch.dtype, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket over all processes, sent as `dtype`. torch's own hook for this refuses gloo and rounds twice."""
    gradients = bucket.buffer()
    reduced = torch.div(gradients, dist.get_world_size(), out=torch.empty_like(gradients, dtype=dtype))
    work = dist.all_reduce(reduced, async_op=True)
    assert work is not None
    average: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: gradients.copy_(done.value()[0]))
    return average


def call(step: Step, function: Callable[..., Any], inputs: Any) -> Any:
    """Call `function` on inputs in the precision and layout of the step."""
    if step.memory_format is not None:
        layout = step.memory_format
        inputs = map_tensors(inputs, lambda t: t.to(memory_format=layout) if t.dim() == 4 else t)
    if step.autocast_dtype is None:
        return _call_unpacked(function, inputs)
    device = next((t.device.type for t in list_tensors(inputs)), "cpu")
    with torch.autocast(device, dtype=step.autocast_dtype):
        return _call_unpacked(function, inputs)


def _call_unpacked(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, Sequence) else function(inputs)


class AppliedSettings:
    """The process-wide settings of a step, on until the end of a `with` block."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._active: dict[Setting, AbstractContextManager[object]] = {}

    def change(self, step: Step) -> None:
        """From now on those of `step`. A setting that both have stays on: turning the allocator's off would give back
        the memory that it keeps."""
        self._end([setting for setting in self._active if setting not in step.settings])
        for setting in step.settings:
            if setting not in self._active:
                active = setting()
                active.__enter__()
                self._active[setting] = active

    def _end(self, settings: list[Setting]) -> None:
        for setting in reversed(settings):
            self._active.pop(setting).__exit__(None, None, None)

    def __enter__(self) -> Self:
        self.change(self._step)
        return self

    def __exit__(self, *_: object) -> None:
        self._end(list(self._active))


@contextmanager
def apply_settings(step: Step) -> Iterator[None]:
    """The step's process-wide settings are on while the block runs."""
    with AppliedSettings(step):
        yield


@contextmanager
def force_eager(step: Step) -> Iterator[None]:
    """The network runs without its compiled code while the block runs: evaluation would compile it again for every
    batch size."""
    if step.compute is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _disable_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    before = [m.p for m in dropouts]
    for module in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(dropouts, before, strict=True):
            module.p = p


def _micro_batches(
    inputs: Any, targets: Any, parts: int, ends: list[int] | None = None
) -> Iterator[tuple[Any, Any, float]]:
    """The batch in `parts` micro-batches, each with its share of the examples."""
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
    """Apply `change` to every tensor inside; containers keep their form."""
    if isinstance(value, torch.Tensor):  # nearly always, and walking a tree costs more than some kernels
        return change(value)
    return torch.utils._pytree.tree_map_only(torch.Tensor, change, value)


def list_tensors(value: Any) -> list[torch.Tensor]:
    """All tensors inside, at any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _to_cpu_float32(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().float().cpu().contiguous() for t in tensors)
