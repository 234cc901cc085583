"""The planner's speedups for users with their own training loop, in three lines.

    step, plan = suanli.speed_up(model, optimizer, loss, (inputs, targets))
    for inputs, targets in batches:
        value = step(inputs, targets)   # instead of zero_grad, forward, loss, backward, optimizer.step

Model and optimizer stay the caller's objects: weights, schedulers and checkpoints work as before. Nothing is
trained while planning: trials run on copies.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from suanli.compute import planner
from suanli.compute.plan import apply_plan, switch_plan
from suanli.compute.step_runner import Loss, Numbers, StepRunner, apply_settings, call, list_tensors, map_tensors
from suanli.core.errors import UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.types import AnyPath, Device, Plan, Step
from suanli.machine import device, peak


class FastStep:
    """One training step, computed as the plan says: `step(inputs, targets)` returns the loss, a tensor without
    dimensions that may still be being computed.

    Process-wide settings of the plan (threads, TF32, the allocator) are on from the start until `close`, or until the
    end of a `with` block.
    """

    def __init__(self, step: Step, loss: Loss, clip_norm: float | None) -> None:
        self._step = step
        self._runner = StepRunner(step, _of_float32(step, loss), clip_norm=clip_norm)
        self._settings = ExitStack()
        self._settings.enter_context(apply_settings(step))

    def __call__(self, inputs: Any, targets: Any) -> torch.Tensor:
        return self._runner(inputs, targets)

    def forward(self, inputs: Any) -> Any:
        """The network's outputs in the precision and layout of the plan, for validation. As usual, call
        `model.eval()` before, and use `torch.inference_mode()` around it."""
        return call(self._step, self._step.model, inputs)

    def close(self) -> None:
        """Restore the settings of the process. Model and optimizer stay as they are."""
        self._settings.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def speed_up(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any, Any], torch.Tensor],
    example_batch: tuple[Any, Any],
    *,
    steps: int = 10_000,
    speedups: str = "auto",
    threads: int | None = None,
    clip_norm: float | None = None,
    cache_dir: AnyPath | None = None,
) -> tuple[FastStep, Plan]:
    """The fastest way to compute this training step here, measured on `example_batch`, and the plan behind it.

    `loss(outputs, targets)` is the mean over a batch. `example_batch` is (inputs, targets) on the model's device,
    of the size that training will use; inputs are a tensor, a sequence of positional arguments or a mapping of
    named ones. `steps` is roughly the number of steps to come: planning takes at most 5 % of their time, and
    compiling is tried only where they win its cost back. `clip_norm` limits the norm of the gradients before each step.

    Raises UsageError for a model without trainable parameters or the optimizer of another model, MachineError for a
    named speedup that can't be used here, GateError for one whose numbers are wrong.
    """
    subject = _OwnLoop(model, optimizer, loss, example_batch, clip_norm)
    devices = [subject.device.torch_name] if subject.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the caller's own random numbers don't change
        plan = planner.plan(subject, speedups, steps=steps, threads=threads, cache=cache_dir_of(cache_dir))
    return FastStep(apply_plan(plan, subject.step, subject.device), loss, clip_norm), plan


class _OwnLoop:
    """A user's training, on copies of which the planner tries plans."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        batch: tuple[Any, Any],
        clip_norm: float | None,
    ) -> None:
        own = {id(p) for p in model.parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p.requires_grad for p in parameters):
            raise UsageError("The model has no parameters to train.", fix="Give a model with trainable parameters.")
        if any(id(p) not in own for p in parameters):
            raise UsageError(
                "The optimizer holds parameters that aren't the model's.",
                fix="Create the optimizer from model.parameters(), after moving the model to its device.",
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"{type(optimizer).__name__} computes the loss several times in a step, which can't be sped up as one.",
                fix="Use an optimizer whose step needs no closure, such as AdamW.",
            )
        if not list_tensors(batch[0]):
            raise UsageError("The example batch holds no tensor.", fix="Give (inputs, targets) as training will.")
        self.device: Device = device.detect(str(parameters[0].device))
        self.step = Step(model=model, optimizer=optimizer)
        self.loss, self.batch, self.clip_norm = loss, batch, clip_norm

    def trial(self, plan: Plan) -> _OwnTrial:
        try:
            model, optimizer = copy.deepcopy((self.step.model, self.step.optimizer))
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"The model or its optimizer can't be copied ({error}), so nothing can be tried on a copy.",
                fix='Give a model that copy.deepcopy can copy, or speedups="none".',
            ) from error
        return _OwnTrial(self, replace(self.step, model=model, optimizer=optimizer), plan)

    @property
    def family(self) -> str:
        facts = [type(self.step.model).__qualname__, peak.fingerprint(self.device)]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()

    @property
    def key(self) -> str:
        optimizer = self.step.optimizer
        facts = [
            repr(self.step.model),
            [list(p.shape) for p in self.step.model.parameters()],
            type(optimizer).__qualname__,
            [(list(t.shape), str(t.dtype)) for t in list_tensors(self.batch)],
            self.clip_norm,
            peak.fingerprint(self.device),
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()


def _of_float32(step: Step, loss: Loss) -> Loss:
    """The caller's loss on outputs cast back to float32: a sum over many classes needs the precision."""
    if step.autocast_dtype is None:
        return loss

    def loss_of_float32(outputs: Any, targets: Any) -> torch.Tensor:
        return loss(map_tensors(outputs, lambda t: t.float() if t.dtype == step.autocast_dtype else t), targets)

    return loss_of_float32


class _OwnTrial:
    def __init__(self, subject: _OwnLoop, plain: Step, plan: Plan) -> None:
        self._subject, self._plain, self._plan = subject, plain, plan
        self._batch = subject.batch
        self._runner = self._make_runner(apply_plan(plan, plain, subject.device))

    def _make_runner(self, step: Step) -> StepRunner:
        return StepRunner(step, _of_float32(step, self._subject.loss), clip_norm=self._subject.clip_norm)

    def switch(self, plan: Plan) -> None:
        self._runner = self._make_runner(switch_plan(self._plan, plan, self._plain, self._subject.device))
        self._plan = plan

    @property
    def compute(self) -> Step:
        return self._runner.step

    def advance(self) -> None:
        self._runner(*self._batch)
        if self._runner.device.type == "cuda":
            torch.cuda.synchronize(self._runner.device)

    def compute_numbers(self, examples: int | None = None) -> Numbers:  # noqa: ARG002  # a batch may have any form
        torch.manual_seed(0)
        return self._runner.compute_numbers(*self._batch)
