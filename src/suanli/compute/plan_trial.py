"""Trials of a plan on a copy of a training: what a copy must do, and how its numbers are compared."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from suanli.compute.step_runner import Numbers, apply_settings
from suanli.core.errors import MachineError, SuanliError
from suanli.core.types import Device, Plan, Step
from suanli.machine.device import is_out_of_memory

COMPILING_LIMIT_S = 600.0
FIRST_STEP_S, FIRST_STEP_TIMES = 10.0, 10.0  # that a first step may take: so long, and so many usual steps


class Trainee(Protocol):
    """A copy of a training, which trials may spoil."""

    @property
    def compute(self) -> Step: ...

    def advance(self) -> None:
        """Train one whole step, its input included, and wait for the device."""

    def compute_numbers(self, examples: int | None = None) -> Numbers:
        """Train one step on the first batch, or on so many of its examples, and return what it computed."""

    def switch(self, plan: Plan) -> None:
        """Compute by another plan from now on. Raises what `switch_plan` raises."""


class Subject(Protocol):
    """What is to be trained: makes copies to try plans on."""

    @property
    def device(self) -> Device: ...

    @property
    def key(self) -> str:
        """A digest of all that decides which plan is the best."""

    @property
    def family(self) -> str:
        """A digest of what trainings have in common that are likely to be fast by the same plans."""

    @property
    def step(self) -> Step: ...

    def trial(self, plan: Plan) -> Trainee: ...


def difference(expected: Numbers, actual: Numbers) -> float:
    """The relative error (L2 over all tensors together) of the outputs, or a quarter of the gradients' if that is
    larger: a gradient is a product of many rounded factors (measured in bfloat16: outputs off by up to 0.035,
    gradients by up to 0.12). Infinite as `relative_error`."""
    outputs = relative_error(expected.outputs, actual.outputs)
    return max(outputs, relative_error(expected.gradients, actual.gradients) / 4)


def relative_error(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """L2, over all tensors together; infinite where values aren't finite or shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in actual]:
        expected, actual = _join_micro_batches(expected), _join_micro_batches(actual)
        if [t.shape for t in expected] != [t.shape for t in actual]:
            return float("inf")
    squares = sum(float((a - b).double().square().sum()) for a, b in zip(expected, actual, strict=True))
    scale = sum(float(a.double().square().sum()) for a in expected)
    error = (squares / scale) ** 0.5 if scale else (squares and float("inf"))
    return error if error == error else float("inf")


def _join_micro_batches(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of the whole batch from those of its micro-batches: those of equal row shape are concatenated."""
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for output in outputs:
        by_shape.setdefault(tuple(output.shape[1:]), []).append(output if output.dim() else output.reshape(1))
    return [torch.cat(same) for same in by_shape.values()]


def run_check_step(subject: Subject, plan: Plan) -> Numbers:
    """What a step computes with this plan. Raises MachineError where a speedup fails."""
    try:
        with limit_time(COMPILING_LIMIT_S):
            trainee = subject.trial(plan)
            with apply_settings(trainee.compute):
                return trainee.compute_numbers()
    except SuanliError:
        raise
    except Exception as error:  # a compiler or a kernel library may raise anything
        if is_out_of_memory(error) or not plan.speedups:
            raise
        raise MachineError(
            f"The speedups {','.join(plan.speedups)} fail here: {first_line(error)}.",
            fix="Leave out the one that is named there, or use --speedups auto.",
        ) from error
    finally:
        free_memory(subject.device)


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message, for use in a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def free_memory(device: Device) -> None:
    """Return unused memory to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def limit_time(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when it takes longer. Works in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it didn't end within {limit_s:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    own_s, every_s = signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)  # repeated: a compiler may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if own_s:  # the caller's own alarm continues
            signal.setitimer(signal.ITIMER_REAL, max(0.001, own_s - (time.monotonic() - started)), every_s)
